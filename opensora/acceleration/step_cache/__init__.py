"""Step caches: sampling that skips evaluations of the model, and the calibration that chooses them."""
