"""Recognizes files by their first bytes, to say what a file is that is not weights."""

from __future__ import annotations

from pathlib import Path

HEAD = 4096  # bytes that are read

LFS = b"version https://git-lfs.github.com/spec/"
ARCHIVE = "is a compressed archive; unpack it, and give the file inside"
STARTS = (
    (LFS, "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"),
    (b"\x1f\x8b", ARCHIVE), (b"BZh", ARCHIVE), (b"\xfd7zXZ\x00", ARCHIVE), (b"\x28\xb5\x2f\xfd", ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", ARCHIVE), (b"Rar!", ARCHIVE),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, of Keras; give the weights as .safetensors or .pt"),
    (b"\x93NUMPY", "is a NumPy array, not named tensors; give the weights as .safetensors or .pt"),
    (b"\x89PNG", "is an image"), (b"\xff\xd8\xff", "is an image"), (b"GIF8", "is an image"),
    (b"%PDF", "is a PDF document"), (b"\x1a\x45\xdf\xa3", "is a video"), (b"\x7fELF", "is a program"),
)  # fmt: skip
TEXT = "is a text file, not weights; download it again"
HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")
PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
ZIP, GGUF = b"PK\x03\x04", b"GGUF"


def other_kind(path: Path) -> str | None:
    """What a file that cannot be weights is, as the rest of a sentence with the remedy; else None."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return "is empty: truncated, damaged or never copied; get it again"
    if found := next((kind for start, kind in STARTS if head.startswith(start)), None):
        return found
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(HTML):
        return "is a web page, not the file itself: the download was refused or misdirected; download it again"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it, and give the file inside"
    if head[4:8] == b"ftyp":
        return "is a video"
    if head[:1] == b"\x08" and b"pytorch" in head[:64]:
        return "is an ONNX program; give the weights it was exported from, as .safetensors or .pt"
    if not any(head) and len(head) > 8:
        return "begins with nothing but zeros: an unfinished copy or download; get it again"
    return TEXT if _is_text(head) else None


def weights_by_content(path: Path) -> str | None:
    """The suffix of a weight file by its content; None if unknown."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith((ZIP, *PICKLES)):
        return ".pt"
    if head.startswith(GGUF):
        return ".gguf"
    return ".safetensors" if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size else None


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:  # the end may split a character
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return all(letter.isprintable() or letter in "\t\r\n\f" for letter in text)


def wrong_text(path: Path) -> str | None:
    """As `other_kind`, for a file that should be text such as JSON."""
    kind = other_kind(path)
    return None if kind == TEXT else kind
