"""Writes the table of a data set."""

from __future__ import annotations

from collections.abc import Callable

from opensora.curation.convert import folders, tables, vidprom, webdataset
from opensora.curation.convert.kinds import KINDS
from opensora.curation.convert.request import ConvertRequest
from opensora.curation.tables.scratch import scratch
from opensora.curation.tables.stream import TableStream
from opensora.curation.tables.writing import check_target, write_table
from opensora.datasets.folder_table import IMAGES, VIDEOS
from opensora.errors import ConfigError, did_you_mean

READERS: dict[str, Callable[[ConvertRequest], TableStream]] = {
    "video": lambda request: folders.media(request, VIDEOS),
    "image": lambda request: folders.media(request, IMAGES),
    "imagenet": folders.imagenet,
    "ucf101": folders.ucf101,
    "jsonl": tables.renamed,
    "hf": tables.hugging_face,
}


def convert(request: ConvertRequest) -> int:
    """Writes the table of a data set, in the order of its files or rows; returns the number of rows.

    Raises ConfigError for an unknown kind, a missing or empty root, and as `write_table` does; MediaError for damaged
    tars. Then neither the table nor extracted files are left.
    """
    if request.kind not in KINDS:
        raise ConfigError(f"kind '{request.kind}' is not known{did_you_mean(request.kind, KINDS)}: {', '.join(KINDS)}")
    check_target(request.target, request.force)
    if request.kind == "webdataset":
        return webdataset.convert(request)
    if request.kind == "vidprom":
        with scratch() as store:
            return write_table(vidprom.prompted(request, store), request.target, request.force)
    return write_table(READERS[request.kind](request), request.target, request.force)
