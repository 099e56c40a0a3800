"""Images and videos given as arrays, tensors or PIL images, for the places that also take paths and URLs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
import torch
from torch import Tensor

from opensora.datasets.video import MAX_PIXELS, check_pixels, check_side, image_to_uint8, to_uint8
from opensora.errors import MediaError
from opensora.files import error_message
from opensora.pipeline.reference_path import MAX_FRAMES

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels: TypeAlias = Union[np.ndarray, Tensor, "Image", Sequence["np.ndarray | Image"]]
MediaInput: TypeAlias = Union[str, "os.PathLike[str]", Pixels]

TOLERANCE = 1e-3  # of float levels beyond their range, which rounding explains


@dataclass(frozen=True, eq=False)
class InMemoryMedia:
    """An image (one frame) or a video as uint8 [T, H, W, 3]; its `name` stands where a path would."""

    frames: np.ndarray
    sha256: str = field(init=False)  # of "TxHxW:" and the pixels in row-major order

    def __post_init__(self) -> None:
        size = "x".join(map(str, self.frames.shape[:3]))
        digest = hashlib.sha256(f"{size}:".encode())
        digest.update(np.ascontiguousarray(self.frames).data)
        object.__setattr__(self, "sha256", digest.hexdigest())

    @classmethod
    def from_pixels(cls, pixels: Pixels, argument: str = "reference") -> InMemoryMedia:
        """Copies pixels and converts them to uint8.

        NumPy: uint8, or float in [0, 1], of shape [H, W, 3] or [T, H, W, 3]. PyTorch: uint8, or float in [-1, 1], of
        shape [3, H, W] or [3, T, H, W]. PIL: an image. A list holds the images of a video, all of one size. Raises
        MediaError, which names `argument`, for other types and shapes, levels out of range and sizes beyond the bounds
        of files.
        """
        if isinstance(pixels, Sequence) and not isinstance(pixels, str | bytes):
            frames = _stacked([_to_frames(one, f"{argument}[{index}]") for index, one in enumerate(pixels)], argument)
        else:
            frames = _to_frames(pixels, argument)
        _check_bounds(frames, argument)
        frames.flags.writeable = False
        return cls(frames)

    @property
    def name(self) -> str:
        """`memory:` and the first 16 hexadecimal digits of the hash."""
        return f"memory:{self.sha256[:16]}"


def media_sources(**inputs: MediaInput | None) -> tuple[dict[str, str], list[InMemoryMedia]]:
    """Settings such as `image` as the texts that `InferenceSettings` takes, and the media in memory that they name.

    A path stays a path; None is left out. Raises MediaError as `InMemoryMedia.from_pixels` does.
    """
    sources: dict[str, str] = {}
    media: list[InMemoryMedia] = []
    for argument, value in inputs.items():
        if isinstance(value, str | os.PathLike):
            sources[argument] = os.fspath(value)
        elif value is not None:
            media.append(InMemoryMedia.from_pixels(value, argument))
            sources[argument] = media[-1].name
    return sources, media


def _to_frames(pixels: object, argument: str) -> np.ndarray:
    """A copy as uint8 [T, H, W, 3] in row-major order."""
    if isinstance(pixels, np.ndarray):
        return _from_array(pixels, argument)
    if isinstance(pixels, Tensor):
        return _from_tensor(pixels, argument)
    from PIL import Image

    if isinstance(pixels, Image.Image):
        check_side(argument, pixels.height, pixels.width)
        try:
            return image_to_uint8(pixels, argument)[None]
        except OSError as error:  # an image of a file that is read only now
            raise MediaError(
                f"{argument}: cannot be read as an image ({error_message(error)}); give another"
            ) from error
    kinds = "a path, a NumPy array, a PyTorch tensor, a PIL image or a list of images"
    raise MediaError(f"{argument} is of type {type(pixels).__name__}; give {kinds}")


def _from_array(array: np.ndarray, argument: str) -> np.ndarray:
    if array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
        raise MediaError(f"{argument} is an array of shape {list(array.shape)}; give [H, W, 3] or [T, H, W, 3]")
    if array.dtype == np.uint8:
        frames = np.array(array, order="C")
    elif np.issubdtype(array.dtype, np.floating):
        _check_range(float(array.min()), float(array.max()), 0, argument)
        frames = (array.clip(0, 1).astype(np.float32) * 255 + 0.5).astype(np.uint8)
    else:
        raise MediaError(f"{argument} is an array of {array.dtype}; give uint8, or float in [0, 1]")
    return frames.reshape(-1, *frames.shape[-3:])


def _from_tensor(tensor: Tensor, argument: str) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.ndim not in (3, 4) or tensor.shape[0] != 3 or 0 in tensor.shape:
        raise MediaError(f"{argument} is a tensor of shape {list(tensor.shape)}; give [3, H, W] or [3, T, H, W]")
    if tensor.ndim == 3:
        tensor = tensor[:, None]
    if tensor.dtype == torch.uint8:
        return np.array(tensor.permute(1, 2, 3, 0).cpu().numpy(), order="C")
    if tensor.is_floating_point():
        _check_range(float(tensor.min()), float(tensor.max()), -1, argument)
        return to_uint8(tensor)
    raise MediaError(f"{argument} is a tensor of {tensor.dtype}; give uint8, or float in [-1, 1]")


def _check_range(lowest: float, highest: float, least: int, argument: str) -> None:
    if not least - TOLERANCE <= lowest <= highest <= 1 + TOLERANCE:  # NaN fails too
        found = f"from {lowest:.4g} to {highest:.4g}"
        raise MediaError(f"{argument} has levels {found}; scale float levels to [{least}, 1], or give uint8")


def _stacked(images: Sequence[np.ndarray], argument: str) -> np.ndarray:
    """One video of single images [1, H, W, 3]."""
    if not images:
        raise MediaError(f"{argument} is an empty list; give at least one image")
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1 or shapes[0][0] > 1:
        raise MediaError(f"{argument} is a list of images of {len(shapes)} shapes; give single images of one size")
    return np.concatenate(images)


def _check_bounds(frames: np.ndarray, argument: str) -> None:
    num_frames, height, width, _ = frames.shape
    check_side(argument, height, width)
    check_pixels(argument, num_frames, height, width, MAX_PIXELS)
    if num_frames > MAX_FRAMES:
        raise MediaError(f"{argument}: holds {num_frames} frames, over the limit of {MAX_FRAMES}; make it shorter")
