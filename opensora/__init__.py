"""Open-Sora 1.2 rebuilt on plain PyTorch: text, image or video in, video out."""

__version__ = "0.1.0"
