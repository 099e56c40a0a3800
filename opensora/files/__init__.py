"""Files: bounded reads of files from outside (`reading`), atomic writes of our own (`atomic`)."""

from opensora.files.atomic import adding, replacing
from opensora.files.reading import (
    MAX_JSON_BYTES,
    file_digest,
    open_regular,
    opened,
    parse_json,
    plain_name,
    read_bytes,
    read_json,
    why,
)

__all__ = [
    "MAX_JSON_BYTES", "adding", "file_digest", "open_regular", "opened", "parse_json", "plain_name", "read_bytes",
    "read_json", "replacing", "why",
]  # fmt: skip
