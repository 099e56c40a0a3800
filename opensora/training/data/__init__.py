"""Where the batches of a training run come from, and at which position of its data it stands."""
