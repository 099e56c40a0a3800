"""The training loop, its data, losses, checkpoints and reports. May import `pipeline` and below."""
