"""Sections of data sets, and the schemas of bucket_config, mask_ratios and cache_table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from opensora.config.schema import (
    Count,
    FilePath,
    Int,
    Many,
    Name,
    NonNegative,
    Number,
    Pair,
    Positive,
    Schema,
    Share,
    as_tuple,
    described_as,
)
from opensora.config.sections.common import MAX_SIDE, Frames, Real, Section, Side, arg

Interval = Annotated[Positive, Field(le=1_000)]
Seed = Annotated[Int, Field(ge=-(2**63))]
Transform = Literal["center", "resize_crop"]
Captions = Literal["mostly", "required", "optional"]


CAPTIONS = "rows that must have a caption: mostly (95 %), required (all) or optional (none)"


class _TableDataset(Section):
    data_path: FilePath | None = arg(None, "table of videos (CSV, JSON lines, Parquet)", "data.csv")
    frame_interval: Interval = arg(1, "step between sampled frames", 3)
    seed: Seed = arg(1024, "random seed; training sets that of the run")
    as_uint8: bool = arg(False, "return frames as uint8; training sets it")


class VideoTextDataset(_TableDataset):
    """Clips of one size from a table."""

    num_frames: Frames = arg(16, "frames per clip; 1 for images")
    image_size: Pair[Side] = arg((256, 256), "height and width in pixels")
    transform_name: Transform = arg("center", "resizing: center (squares only) or resize_crop")
    captions: Captions = arg("mostly", CAPTIONS)


class VariableVideoTextDataset(_TableDataset):
    """Clips from a table, in the sizes of bucket_config."""

    num_frames: Frames | None = arg(None, "accepted without effect; bucket_config decides", 16)
    image_size: Pair[Side | None] | None = arg(None, "accepted without effect; bucket_config decides", (None, None))
    transform_name: Transform = arg("resize_crop", "resizing: center (squares only) or resize_crop")
    dummy_text_feature: bool = arg(False, "load text features instead of captions")
    captions: Captions = arg("mostly", CAPTIONS)


class EncodedDataset(Section):
    """Features that `opensora extract` encoded."""

    data_path: FilePath | None = arg(None, "folder of the features", "features")
    num_frames: Frames | None = arg(None, "accepted without effect; the features decide", 16)
    image_size: Pair[Side | None] | None = arg(None, "accepted without effect; the features decide", (64, 64))
    frame_interval: Interval | None = arg(None, "accepted without effect; the features decide", 3)
    transform_name: Transform | None = arg(None, "accepted without effect; the features decide", "center")
    captions: Captions | None = arg(None, "accepted without effect; the features decide", "mostly")


_Share = Annotated[Number, Field(gt=0, le=1e6)]
_NumClips = Annotated[Positive, Field(le=10**9)]
_SIZES = "(num_frames, height, width, share) or (num_frames, height, width, share, num_clips), all above 0"
_Size = Annotated[
    tuple[Frames, Side, Side, _Share] | tuple[Frames, Side, Side, _Share, _NumClips], as_tuple, described_as(_SIZES)
]
_Sizes = Annotated[Many[_Size], Field(max_length=1_000)]


class _RenderedClips(Section):
    num_frames: Frames | None = arg(None, "frames per clip, for a single size", 17)
    image_size: Pair[Side] | None = arg(None, "height and width in pixels, for a single size", (64, 64))
    sizes: _Sizes | None = arg(None, f"several sizes: {_SIZES}", [(17, 64, 64, 0.5), (1, 64, 64, 0.5)])
    continued: _Sizes | None = arg(None, "sizes of clips whose first half is given as a condition", [(34, 64, 64, 0.1)])
    num_clips: _NumClips | None = arg(None, "number of different clips; None: unlimited", 9000)
    fps: Annotated[Real, Field(gt=0, le=1_000)] = arg(24, "frame rate that the model is conditioned on")
    features: FilePath | None = arg(None, "folder of the clips' encoded features", "outputs/features")
    crop: Pair[Side] | None = arg(None, "autoencoders: height and width of a random window of each clip", (64, 64))
    seed: Seed = arg(0, "random seed of the scenes")


class ShapeClips(_RenderedClips):
    """Rendered clips of moving shapes, with captions."""


class WorldClips(_RenderedClips):
    """Rendered clips of a drawn world of things, scenes and camera moves, with captions."""


_Batch = Annotated[Count, Field(le=100_000)]
BucketBatch = _Batch | Pair[_Batch] | None
BucketKeep = NonNegative | Pair[Share] | None
BUCKET = "(keep probability, batch size), such as (0.5, 4) or ((0.5, 0.3), None)"
BucketValue = Annotated[tuple[BucketKeep, BucketBatch], as_tuple, described_as(BUCKET)]
_number = BeforeValidator(lambda key: int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key)
BucketFrames = Annotated[Frames, _number]
BucketConfig = dict[Name | Annotated[Int, Field(ge=1, le=MAX_SIDE)], dict[BucketFrames, BucketValue]]
MaskRatios = dict[Name, Share]


class CacheTable(Schema):
    """A calibrated step cache: which evaluations are computed."""

    halves: Annotated[str, Field(pattern=r"^[12][012]*$", max_length=10_000)] = arg(
        "2", "one digit per evaluation: 2 computes the cond and uncond branches, 1 only cond, 0 none"
    )
    text: Many[Pair[Number]] = arg((), "extrapolation weights of the two latest cond predictions")
    guidance: Many[Pair[Number]] = arg((), "extrapolation weights of the two latest differences cond - uncond")
