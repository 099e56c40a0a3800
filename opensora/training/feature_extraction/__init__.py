"""Latents and text features, encoded once and stored for training."""
