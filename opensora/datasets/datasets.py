"""Videos and images of a table as training samples: a temporal crop at a size, with its caption.

The crop is a function of (seed, epoch, row). Unreadable files are skipped, never replaced: the sample is an
`UnreadableRow`, which `collate` separates, and a `Quarantine` counts and lists; it stops a run with too many.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from opensora.config.schema import check
from opensora.datasets.bucket import random_words
from opensora.datasets.quarantine import UnreadableRow
from opensora.datasets.table import read_table
from opensora.datasets.transforms import get_transform
from opensora.datasets.video import is_image as _is_image
from opensora.datasets.video import read_image, read_span
from opensora.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGE_FPS = 120  # size conditioning of images
CAPTIONS = ("mostly", "required", "optional")  # rows that must have a caption: nearly all, all, none
CROPS = 4  # id of this random stream; bucket.py and samplers.py use 0 to 3


def num_starts(total: int, num_frames: int, interval: int) -> int:
    """The number of start frames of a crop in a video of `total` frames; 0 if it has fewer than `num_frames`."""
    return 0 if total < num_frames else max(total - num_frames * interval, 0) + 1


def frame_indices(total: int, num_frames: int, interval: int, start: int) -> list[int]:
    """`num_frames` evenly spaced indices over the `num_frames * interval` frames (or all) from `start` on.

    They include the first and the last frame of that span, so that the spacing is slightly more than `interval`.
    """
    length = min(num_frames * interval, total)
    return [start + step * (length - 1) // max(num_frames - 1, 1) for step in range(num_frames)]


def to_model_range(video: Tensor) -> Tensor:
    """Converts uint8 to float32 in [-1, 1], on the tensor's device; float32 stays unchanged."""
    return video if video.is_floating_point() else video.float().div(127.5).sub(1)


class _TableDataset(Dataset):
    """Base of both data sets. `as_uint8` returns 8-bit frames, a quarter of the memory."""

    def __init__(
        self, data_path: str | Path | None, interval: int, transform: str, captions: str, seed: int, as_uint8: bool
    ) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ConfigError(f"dataset.frame_interval must be a positive integer; it is {interval!r}")
        check(Literal[CAPTIONS], captions, "dataset.captions")
        self.table = read_table(data_path)
        self.frame_interval, self.transform, self.seed, self.as_uint8 = interval, transform, seed, as_uint8
        self.captions = captions
        self.to_size = get_transform(transform)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # visible to persistent workers

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that determines the crops."""
        self._epoch.fill_(epoch)

    def at(self, epoch: int) -> Self:
        """A shallow copy with the crops of an epoch, for threads that read several epochs at once."""
        other = copy.copy(self)
        other._epoch = torch.tensor(epoch)
        return other

    def name(self, index: Any) -> str:
        """The file of a sample, with its span and crop."""
        return self.table.name(self._row(index))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> dict[str, Any] | UnreadableRow:
        try:
            return self.read(index)
        except MediaError as error:
            row = self._row(index)
            path = self.table.path[row]
            reason = str(error).removeprefix(f"{path}: ").removeprefix(f"{self.table.file(row)}: ")
            return UnreadableRow(row, path, reason)

    def read(self, index: Any) -> dict[str, Any]:
        """The sample of an index. Raises MediaError for an unreadable file."""
        raise NotImplementedError

    def _row(self, index: Any) -> int:
        return int(index)

    def _clip(self, row: int, num_frames: int, size: tuple[int, int], start: int | None) -> tuple[Tensor, float]:
        """A crop [3, num_frames, H, W] of a video or an image [3, 1, H, W], and frames per second."""
        path, span, crop = self.table.file(row), self.table.span(row), self.table.crop(row)
        self._check(size)

        def cropped(frame: np.ndarray) -> np.ndarray:
            return frame if crop is None else crop.of(frame, path)

        if _is_image(path):
            if span is not None:
                raise MediaError(f"{path}: is an image, which has no span {span}; empty start_pts and end_pts")
            return self._sized(cropped(read_image(path)), size), IMAGE_FPS

        within = "" if span is None else f" in {span}"

        def choose(total: int) -> Sequence[int]:
            starts = num_starts(total, num_frames, self.frame_interval)
            if not starts:
                raise MediaError(f"{path}: has {total} frames{within}, fewer than the {num_frames} requested")
            first = self._random(row, starts) if start is None else start
            return frame_indices(total, num_frames, self.frame_interval, first)

        frames, fps = read_span(path, choose, lambda frame: self._sized(cropped(frame)[None], size), span)
        return torch.cat(frames, dim=1), fps

    def _random(self, row: int, count: int) -> int:
        """A random integer in [0, count)."""
        return int(random_words(1, self.seed, int(self._epoch), CROPS, row)[0] % np.uint64(count))

    def _check(self, size: tuple[int, int]) -> None:
        if self.transform == "center" and size[0] != size[1]:
            problem = f"transform_name 'center' makes squares, not {size[0]}x{size[1]}"
            raise ConfigError(f"dataset: {problem}; set transform_name='resize_crop'")

    def _sized(self, frames: np.ndarray, size: tuple[int, int]) -> Tensor:
        video = self.to_size(frames, size)
        return video.add(1).mul(127.5).round().clamp(0, 255).byte() if self.as_uint8 else video

    def _captioned(self, row: int, sample: dict[str, Any]) -> dict[str, Any]:
        return sample if self.table.text is None else {**sample, "text": self.table.text[row]}


class VideoTextDataset(_TableDataset):
    """Samples of one size: `video` float32 [3, T, H, W] in [-1, 1], `fps` of the file, and `text` if the table has it.

    An image is repeated `num_frames` times. `image_size` is (H, W). Raises ConfigError for invalid settings or tables.
    """

    def __init__(
        self,
        data_path: str | Path | None = None,
        num_frames: int = 16,
        frame_interval: int = 1,
        image_size: tuple[int, int] = (256, 256),
        transform_name: str = "center",
        captions: str = CAPTIONS[0],
        *,
        seed: int = 1024,
        as_uint8: bool = False,
    ) -> None:
        super().__init__(data_path, frame_interval, transform_name, captions, seed, as_uint8)
        if not isinstance(num_frames, int) or num_frames < 1:
            raise ConfigError(f"dataset.num_frames must be a positive integer; it is {num_frames!r}")
        self.num_frames, self.image_size = num_frames, _size(image_size)
        self._check(self.image_size)

    def read(self, index: int, start: int | None = None) -> dict[str, Any]:
        """Reads the sample of a row, from frame `start` if given. Raises MediaError if it cannot be read."""
        row = self._row(index)
        video, fps = self._clip(row, self.num_frames, self.image_size, start)
        video = video.expand(-1, self.num_frames, -1, -1).contiguous()
        return self._captioned(row, {"video": video, "fps": fps})


class VariableVideoTextDataset(_TableDataset):
    """Samples of the sizes that a bucket sampler requests, by index `row-T-H-W`.

    `video` is float32 [3, T, H, W] in [-1, 1]; `num_frames`, `height`, `width`, `ar` (H / W) and `fps` (floor-divided
    by the interval; 120 for images) are the size conditioning; `text` is present if the table has it. The arguments
    `num_frames` and `image_size` have no effect, `dummy_text_feature` omits texts. Raises ConfigError.
    """

    def __init__(
        self,
        data_path: str | Path | None = None,
        num_frames: int | None = None,
        frame_interval: int = 1,
        image_size: tuple[int | None, int | None] | None = None,
        transform_name: str = "resize_crop",
        dummy_text_feature: bool = False,
        captions: str = CAPTIONS[0],
        *,
        seed: int = 1024,
        as_uint8: bool = False,
    ) -> None:
        super().__init__(data_path, frame_interval, transform_name, captions, seed, as_uint8)
        self.with_text = not dummy_text_feature

    def _row(self, index: str) -> int:
        return _parsed(index)[0]

    def read(self, index: str, start: int | None = None) -> dict[str, Any]:
        """Reads the sample of an index, from frame `start` if given. Raises MediaError if it cannot be read."""
        row, num_frames, height, width = _parsed(index)
        video, fps = self._clip(row, num_frames, (height, width), start)
        if video.shape[1] != num_frames:
            problem = f"is an image where the table says {num_frames} frames or more"
            raise MediaError(f"{self.table.path[row]}: {problem}; write 1 in its column num_frames")
        fps = fps if _is_image(self.table.file(row)) else fps // self.frame_interval
        conditioning = {"num_frames": num_frames, "height": height, "width": width, "ar": height / width, "fps": fps}
        sample = {"video": video, **conditioning}
        return self._captioned(row, sample) if self.with_text else sample


def collate(samples: Iterable[dict[str, Any] | UnreadableRow]) -> dict[str, Any]:
    """Batches samples: tensors stacked, numbers as tensors [B], texts as a list; unreadable ones in `unreadable`.

    A batch of only unreadable samples has no other key.
    """
    samples = list(samples)
    whole = [sample for sample in samples if not isinstance(sample, UnreadableRow)]
    batch: dict[str, Any] = {"unreadable": [sample for sample in samples if isinstance(sample, UnreadableRow)]}
    for name in whole[0] if whole else ():
        values = [sample[name] for sample in whole]
        if isinstance(values[0], Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(values[0], str):
            batch[name] = values
        else:
            batch[name] = torch.from_numpy(np.array(values))
    return batch


def _parsed(index: str) -> tuple[int, int, int, int]:
    """(row, T, H, W) of `row-T-H-W`."""
    parts = [int(part) for part in index.split("-")] if isinstance(index, str) else []
    if len(parts) != 4 or min(parts[1:]) < 1:
        raise ValueError(f"an index is row-T-H-W, as a bucket sampler gives it; not {index!r}")
    row, num_frames, height, width = parts
    return row, num_frames, height, width


def _size(size: Any) -> tuple[int, int]:
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
        return tuple(size)
    raise ConfigError(f"dataset.image_size must be (height, width) in pixels; it is {size!r}")
