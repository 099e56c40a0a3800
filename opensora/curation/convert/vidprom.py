"""VidProM: videos of several models, named by the UUID of their prompt."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from opensora.curation.convert.folders import split_folder
from opensora.curation.convert.request import ConvertRequest
from opensora.curation.tables.reading import open_table
from opensora.curation.tables.scratch import Scratch
from opensora.curation.tables.stream import Row, TableStream, text_of
from opensora.datasets.folder_table import VIDEOS, find_media
from opensora.errors import ConfigError

log = logging.getLogger("opensora")

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.IGNORECASE)


def prompted(request: ConvertRequest, store: Scratch) -> TableStream:
    """`path, text` of the videos whose prompt is in the table `info` (columns uuid and prompt); others are left out.

    Raises ConfigError without a table, or if no video has a prompt.
    """
    if not request.info:
        raise ConfigError("vidprom needs --info TABLE with the columns uuid and prompt, such as VidProM_unique.csv")
    prompts = open_table(request.info)
    uuid, prompt = prompts.index("uuid"), prompts.index("text")
    known = store.mapping((text_of(row[uuid]).lower(), text_of(row[prompt])) for row in prompts.rows)
    rows: list[Row] = []
    lost: list[Path] = []
    for file in find_media(split_folder(request, None), suffixes=VIDEOS):
        name = _UUID.search(file.stem)
        text = known.get(name[0].lower()) if name else None
        if text is None:
            lost.append(file)
        else:
            rows.append([str(file), text])
    if not rows:
        raise ConfigError(
            f"{request.root}: none of {len(lost)} videos has a prompt in {request.info}; is it the table?"
        )
    if lost:
        log.warning("left out, without a prompt in %s: %d, the first %s", request.info, len(lost), lost[0])
    return TableStream(request.root, ("path", "text"), rows)
