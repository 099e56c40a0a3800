"""Step caches: sampling that skips some of the model's evaluations, and the calibration that says which."""
