"""Training checkpoints: written, verified, restored, exported."""
