"""A small drawn world: things, scenes, motions and camera moves, rendered with captions from a seed."""
