"""Sections of data sets, and the tables that say what is trained at which size and with which frames given."""

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
    worded,
)
from opensora.config.sections.common import MAX_SIDE, Frames, Real, Section, Side, arg

Interval = Annotated[Positive, Field(le=1_000)]
Seed = Annotated[Int, Field(ge=-(2**63))]
Transform = Literal["center", "resize_crop"]
Captions = Literal["mostly", "required", "optional"]


CAPTIONS = "which rows must have a text: nearly all (mostly: 95 %), all (required), or none (optional)"


class _Table(Section):
    data_path: FilePath | None = arg(None, "table of the videos", "data.csv")
    frame_interval: Interval = arg(1, "step between the frames that are taken", 3)
    seed: Seed = arg(1024, "of its random choices; training sets that of the run")
    as_uint8: bool = arg(False, "frames in 8 bits; training sets it")


class VideoTextDataset(_Table):
    """Clips of one size out of a table."""

    num_frames: Frames = arg(16, "frames of a clip; 1 for images")
    image_size: Pair[Side] = arg((256, 256), "height and width in pixels")
    transform_name: Transform = arg("center", "how frames get their size: center (squares), resize_crop")
    captions: Captions = arg("mostly", CAPTIONS)


class VariableVideoTextDataset(_Table):
    """Clips of the sizes of bucket_config, out of a table."""

    num_frames: Frames | None = arg(None, "accepted from older files; bucket_config decides", 16)
    image_size: Pair[Side | None] | None = arg(None, "accepted from older files; bucket_config decides", (None, None))
    transform_name: Transform = arg("resize_crop", "how frames get their size: center (squares), resize_crop")
    dummy_text_feature: bool = arg(False, "the texts come from load_text_features")
    captions: Captions = arg("mostly", CAPTIONS)


class EncodedDataset(Section):
    """Features that scripts/misc/extract_feat.py encoded."""

    data_path: FilePath | None = arg(None, "folder of the features", "features")
    num_frames: Frames | None = arg(None, "accepted from the table's section; the features decide", 16)
    image_size: Pair[Side | None] | None = arg(None, "accepted from the table's section; the features decide", (64, 64))
    frame_interval: Interval | None = arg(None, "accepted from the table's section; the features decide", 3)
    transform_name: Transform | None = arg(None, "accepted from the table's section; the features decide", "center")
    captions: Captions | None = arg(None, "accepted from the table's section; the features decide", "mostly")


_Share = Annotated[Number, Field(gt=0, le=1e6)]
_NumClips = Annotated[Positive, Field(le=10**9)]
_SIZES = "(num_frames, height, width, share) or (num_frames, height, width, share, num_clips), all above 0"
_Size = Annotated[
    tuple[Frames, Side, Side, _Share] | tuple[Frames, Side, Side, _Share, _NumClips], as_tuple, worded(_SIZES)
]
_Sizes = Annotated[Many[_Size], Field(max_length=1_000)]


class ShapeClips(Section):
    """Rendered clips of moving shapes, with captions."""

    num_frames: Frames | None = arg(None, "frames of a clip, of one size", 17)
    image_size: Pair[Side] | None = arg(None, "height and width in pixels, of one size", (64, 64))
    sizes: _Sizes | None = arg(None, f"several sizes: {_SIZES}", [(17, 64, 64, 0.5), (1, 64, 64, 0.5)])
    continued: _Sizes | None = arg(None, "the same, of clips that go on after their first half", [(34, 64, 64, 0.1)])
    num_clips: _NumClips | None = arg(None, "how many different clips there are; without it, ever new ones", 9000)
    fps: Annotated[Real, Field(gt=0, le=1_000)] = arg(24, "frames a second that the model is told")
    features: FilePath | None = arg(None, "folder of the clips' encoded features", "outputs/features")
    seed: Seed = arg(0, "of the scenes")


_Batch = Annotated[Count, Field(le=100_000)]
BucketBatch = _Batch | Pair[_Batch] | None
BucketKeep = NonNegative | Pair[Share] | None
BUCKET = "(keep, batch size), such as (0.5, 4) or ((0.5, 0.3), None)"
BucketEntry = Annotated[tuple[BucketKeep, BucketBatch], as_tuple, worded(BUCKET)]
_number = BeforeValidator(lambda key: int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key)
BucketFrames = Annotated[Frames, _number]
BucketConfig = dict[Name | Annotated[Int, Field(ge=1, le=MAX_SIDE)], dict[BucketFrames, BucketEntry]]
MaskRatios = dict[Name, Share]


class CacheTable(Schema):
    """Which evaluations of a run are computed, found by a calibration."""

    halves: Annotated[str, Field(pattern=r"^[12][012]*$", max_length=10_000)] = arg(
        "2", "2: both halves, 1: with text, 0: none"
    )
    text: Many[Pair[Number]] = arg((), "weights of the latest two values, with text")
    guidance: Many[Pair[Number]] = arg((), "the same, of their difference to that without text")
