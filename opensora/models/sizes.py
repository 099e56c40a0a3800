"""What multi-resolution models are told about the clip's size, beside the noise and the text."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora.errors import ConfigError

IMAGE_FPS = 120  # the frame rate that stands for a still image


def size_conditioning(
    kind: str | None,
    batch_size: int,
    image_size: tuple[int, int],
    num_frames: int,
    fps: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """The size arguments of a model's forward, the same for every sample of the batch.

    `kind` is a configuration's `multi_resolution`: "STDiT2" or "OpenSora" give height, width, num_frames, ar and fps,
    each [B]; "PixArtMS" gives hw [B, 2] and ar [B, 1]; None gives nothing. `image_size` is (H, W) in pixels, ar is
    H / W. Keep the default float32: bfloat16 has no 854 (it becomes 856). Raises ConfigError for another kind.
    """
    height, width = image_size

    def column(value: float) -> Tensor:
        return torch.full((batch_size,), value, dtype=dtype, device=device)

    if kind is None:
        return {}
    if kind == "PixArtMS":
        return {"ar": column(height / width)[:, None], "hw": torch.stack([column(height), column(width)], dim=1)}
    if kind in ("STDiT2", "OpenSora"):
        return {
            "height": column(height),
            "width": column(width),
            "num_frames": column(num_frames),
            "ar": column(height / width),
            "fps": column(fps if num_frames > 1 else IMAGE_FPS),
        }
    raise ConfigError(f"multi_resolution {kind!r} is not known; choose 'STDiT2', 'OpenSora', 'PixArtMS' or None")
