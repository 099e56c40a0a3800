"""Moving shapes with captions: rendered, batched, and read back out of generated frames."""
