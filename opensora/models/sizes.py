"""Size conditioning: the arguments by which multi-resolution models know the size and frame rate of a clip."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora.errors import ConfigError

IMAGE_FPS = 120  # the frame rate that stands for a still image


def conditioning_kind(model_type: str) -> str:
    """The `multi_resolution` of a registered model, where a configuration does not say."""
    return "PixArtMS" if model_type.startswith("PixArtMS") else "STDiT2"


def size_conditioning(
    kind: str | None, batch_size: int, image_size: tuple[int, int], num_frames: int, fps: float,
    dtype: torch.dtype = torch.float32, device: torch.device | str | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The size arguments of a model's forward, the same for every sample of the batch.

    `kind` is a configuration's `multi_resolution`: "STDiT2" or "OpenSora" give height, width, num_frames, ar and fps,
    each [B]; "PixArtMS" gives hw [B, 2] and ar [B, 1]; None gives nothing. `image_size` is (H, W) in pixels, ar is
    H / W. Keep the default float32: bfloat16 has no 854 (it becomes 856). Raises ConfigError for another kind.
    """
    height, width = image_size
    ar, fps = height / width, fps if num_frames > 1 else IMAGE_FPS
    if kind is None:
        values = {}
    elif kind == "PixArtMS":
        values = {"ar": [ar], "hw": [height, width]}
    elif kind in ("STDiT2", "OpenSora"):
        values = {"height": height, "width": width, "num_frames": num_frames, "ar": ar, "fps": fps}
    else:
        raise ConfigError(f"multi_resolution {kind!r} is not known; choose 'STDiT2', 'OpenSora', 'PixArtMS' or None")
    return {name: torch.tensor([value] * batch_size, dtype=dtype, device=device) for name, value in values.items()}
