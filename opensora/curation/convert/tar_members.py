"""The files within a tar from anyone: plain files of bounded number; headers of bounded size."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

from opensora.errors import MediaError, printable
from opensora.files import error_message, open_bounded

MAX_BYTES = 2**44  # of a tar
MAX_MEMBERS = 200_000  # of a tar
MAX_READ = 2**20  # bytes that a header may take


class Member:
    """A file of a tar, to be read before the next one: its name, and the key of its sample.

    The key is the name up to the first dot of its last part: `a/b` of `a/b.seg.mp4`.
    """

    def __init__(self, tar: Path, name: str, file: IO[bytes]) -> None:
        self.tar, self.name, self.file = tar, name, file
        folder, slash, last = name.rpartition("/")
        self.key = folder + slash + (last.split(".")[0] or last)

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes. Raises MediaError for a tar that is cut."""
        try:
            return self.file.read(size)
        except (tarfile.TarError, OSError) as error:
            raise MediaError(f"{self.tar}: {printable(self.name)}: {error_message(error)}; replace it") from error


class _BoundedFile:
    """A file whose single reads are bounded, so that a header cannot ask for more memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_READ:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def members(path: Path) -> Iterator[Member]:
    """The plain files of an uncompressed tar in order; folders are skipped.

    Raises MediaError for links, devices and sparse files, too many members, and a damaged or compressed tar.
    """
    try:
        with (
            open_bounded(path, MAX_BYTES) as file,
            tarfile.open(fileobj=cast(BinaryIO, _BoundedFile(file)), mode="r:") as tar,
        ):
            end = -1
            for number, member in enumerate(tar):
                if number >= MAX_MEMBERS:
                    raise MediaError(f"{path}: holds more than {MAX_MEMBERS:,} members; split it")
                if member.offset_data <= end or member.size < 0:
                    raise tarfile.ReadError("members that overlap")
                end = member.offset
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    shown = printable(member.name[:80])
                    raise MediaError(f"{path}: '{shown}' is no plain file, but a link, device or sparse; remove it")
                content = tar.extractfile(member)
                assert content is not None, "a plain file has content"
                yield Member(path, member.name, content)
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        reason = error_message(error)
        raise MediaError(f"{path}: is no valid uncompressed tar ({reason}); decompress it, or replace it") from error
