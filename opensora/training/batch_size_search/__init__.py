"""The largest batch of each bucket, found with real training steps."""
