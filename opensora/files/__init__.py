"""Files: bounded reads of files from outside (`reading`), atomic writes of our own (`atomic`), our cache (`cache`)."""

from opensora.files.atomic import atomic_create, atomic_write
from opensora.files.cache import cache_path
from opensora.files.reading import (
    MAX_JSON_BYTES,
    check_file_name,
    error_message,
    file_digest,
    open_bounded,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
)

__all__ = [
    "MAX_JSON_BYTES", "atomic_create", "atomic_write", "cache_path", "check_file_name", "error_message", "file_digest",
    "open_bounded", "open_regular", "parse_json", "read_bytes", "read_json",
]  # fmt: skip
