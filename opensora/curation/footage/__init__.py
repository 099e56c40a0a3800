"""Rendered footage with known truth: scenes, transitions, camera moves, texts, copies and faults, from a seed."""
