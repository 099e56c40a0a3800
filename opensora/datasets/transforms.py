"""Resizes frames to a size with a center crop, and maps them to [-1, 1].

Videos are resized bilinearly without antialiasing, images with Pillow's bicubic filter, with different rounding of
sizes and offsets, exactly as in the training of the published models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from opensora.errors import ConfigError, MediaError, did_you_mean

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of the images that CLIP was trained on
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MAX_EXCESS = 64  # largest ratio of resized pixels to cropped pixels


def resize_crop(frames: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resizes uint8 frames [T, h, w, 3] or an image [h, w, 3] to cover `size` (H, W), and crops the center.

    Returns float32 [3, T, H, W] in [-1, 1], T = 1 for an image. Raises MediaError for an extreme aspect ratio.
    """
    height, width = _check(frames, size)
    by_height, by_width = size[0] / height, size[1] / width
    scaled = (size[0], round(width * by_height)) if by_height > by_width else (round(height * by_width), size[1])
    if frames.ndim == 3:
        return _crop(_levels(_resize_image(frames, scaled, "BICUBIC")), size, round)
    if 2 * size[0] * size[1] <= height * width:
        return torch.stack([_resized_center(frame, scaled, size) for frame in frames], dim=1)
    return _crop(interpolate(_levels(frames), scaled, mode="bilinear"), size, math.floor)


def center(frames: np.ndarray, size: tuple[int, int]) -> Tensor:
    """As `resize_crop`, with other rounding, and images halved by a box filter first. ConfigError unless square."""
    (height, width), side = _check(frames, size), size[0]
    if side != size[1]:
        raise ConfigError(f"transform 'center' makes squares, not {size[0]}x{size[1]}; use 'resize_crop'")
    if frames.ndim == 3:
        while min(height, width) >= 2 * side:
            height, width = height // 2, width // 2
            frames = _resize_image(frames, (height, width), "BOX")
        scale = side / min(height, width)
        scaled = round(height * scale), round(width * scale)
        return _crop(_levels(_resize_image(frames, scaled, "BICUBIC")), size, math.floor)
    scale = side / min(height, width)
    while math.floor(min(height, width) * scale) < side:  # 161 * (256 / 161) falls short of 256 in floating point
        scale = math.nextafter(scale, math.inf)
    return _crop(interpolate(_levels(frames), scale_factor=scale, mode="bilinear"), size, round)


def clip_pixels(image: np.ndarray, side: int) -> Tensor:
    """An image uint8 [h, w, 3] as CLIP sees it: the shorter side resized to `side`, the center cropped, normalized.

    Returns float32 [3, side, side]. Raises MediaError for an extreme aspect ratio.
    """
    height, width = _check(image, (side, side))
    short = min(height, width)
    scaled = int(side * height / short), int(side * width / short)
    resized = _resize_image(image, scaled, "BICUBIC")
    top, left = (scaled[0] - side) // 2, (scaled[1] - side) // 2
    pixels = resized[top : top + side, left : left + side].astype(np.float32) / 255
    return torch.from_numpy((pixels - CLIP_MEAN) / CLIP_STD).permute(2, 0, 1)


TRANSFORMS = {"resize_crop": resize_crop, "center": center}


def get_transform(name: str) -> Callable[[np.ndarray, tuple[int, int]], Tensor]:
    """The transform of a name. Raises ConfigError if unknown."""
    if name not in TRANSFORMS:
        hint = did_you_mean(name, TRANSFORMS) or f"; choose one of {', '.join(TRANSFORMS)}"
        raise ConfigError(f"transform {name!r} is not known{hint}")
    return TRANSFORMS[name]


def _check(frames: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of `frames`."""
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are uint8 [T, H, W, 3], an image [H, W, 3]; not {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[-3:-1]
    if not 1 / MAX_EXCESS <= (height * size[1]) / (width * size[0]) <= MAX_EXCESS:
        wanted = f"{size[0]}x{size[1]}"
        raise MediaError(f"an image of {height}x{width} pixels is too long and thin to fill {wanted}; crop it first")
    return height, width


def _resize_image(image: np.ndarray, size: tuple[int, int], filter_name: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling[filter_name]))


def _resized_center(frame: np.ndarray, scaled: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """float32 [3, H, W]: the center crop of a frame resized to `scaled`, equal to `interpolate` and `_crop`.

    Reads only the source pixels that contribute, which is faster for strong downscaling.
    """
    rows, down = _taps(frame.shape[0], scaled[0], size[0])
    columns, right = _taps(frame.shape[1], scaled[1], size[1])
    channels = (3 * columns[:, None] + np.arange(3)).ravel()
    picked = frame.take(rows, axis=0).reshape(len(rows), -1).take(channels, axis=1)
    levels = torch.from_numpy(picked).view(2, size[0], 2, 3 * size[1]).float()
    lines = torch.lerp(levels[:, :, 0], levels[:, :, 1], right.repeat_interleave(3))  # [2, H, 3 W]
    middle = torch.lerp(lines[0], lines[1], down[:, None])
    return middle.mul_(2 / 255).sub_(1).view(*size, 3).permute(2, 0, 1)


@lru_cache(maxsize=256)
def _taps(have: int, scaled: int, want: int) -> tuple[np.ndarray, Tensor]:
    """Bilinear taps of the center `want` of `scaled` pixels: two source indices [2 * want], and the second's weight.

    Positions are rounded to float32 where `interpolate` rounds them.
    """
    first = (scaled - want) // 2
    step = np.float64(np.float32(have) / np.float32(scaled))
    places = np.maximum((step * (np.arange(first, first + want) + 0.5) - 0.5).astype(np.float32), 0)
    low = np.minimum(places.astype(np.int64), have - 1)
    return np.concatenate((low, np.minimum(low + 1, have - 1))), torch.from_numpy(places - low.astype(np.float32))


def _levels(frames: np.ndarray) -> Tensor:
    """Converts uint8 [T, H, W, 3] or [H, W, 3] to float32 [T, 3, H, W] in [0, 1]."""
    frames = frames.reshape(-1, *frames.shape[-3:]).copy()  # may be read-only or have negative strides
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().contiguous() / 255


def _crop(levels: Tensor, size: tuple[int, int], rounding: Callable[[float], int]) -> Tensor:
    """The center crop [3, T, H, W] in [-1, 1] of [T, 3, h, w] in [0, 1]."""
    top, left = (rounding((have - want) / 2) for have, want in zip(levels.shape[2:], size, strict=True))
    middle = levels[..., top : top + size[0], left : left + size[1]]
    return middle.sub(0.5).div(0.5).transpose(0, 1).contiguous()
