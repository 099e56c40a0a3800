"""Checkpoint files: found, read within bounds, mapped to models, saved, converted.

May import `distributed` and what lies below it.
"""
