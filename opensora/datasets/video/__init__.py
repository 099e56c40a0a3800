"""Images and videos in and out: the only package that opens media.

`reader`, `writer` and `span` are the interface; `container`, `frame_times` and `webp` open and index files.
"""

from opensora.datasets.video.contact_sheet import contact_sheet, tile
from opensora.datasets.video.container import IMAGE_SUFFIXES, VIDEO_SUFFIXES, check_pixels, check_side
from opensora.datasets.video.reader import (
    MAX_PIXELS,
    count_frames,
    image_to_uint8,
    is_image,
    iterate_video,
    read_image,
    read_metadata,
    read_span,
    read_video,
    shown_times,
)
from opensora.datasets.video.span import Crop, Span
from opensora.datasets.video.writer import (
    encode_animation,
    encode_image,
    encode_jpeg,
    encode_video,
    fit_within,
    to_uint8,
    write_image,
    write_video,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "VIDEO_SUFFIXES",
    "Crop",
    "Span",
    "check_pixels",
    "check_side",
    "contact_sheet",
    "count_frames",
    "encode_animation",
    "encode_image",
    "encode_jpeg",
    "encode_video",
    "fit_within",
    "image_to_uint8",
    "is_image",
    "iterate_video",
    "read_image",
    "read_metadata",
    "read_span",
    "read_video",
    "shown_times",
    "tile",
    "to_uint8",
    "write_image",
    "write_video",
]  # fmt: skip
