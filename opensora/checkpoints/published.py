"""Names of published weight files, and where they can be had. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import NamedTuple

HUB = "https://huggingface.co"
DIT = "https://dl.fbaipublicfiles.com/DiT/models"


class Published(NamedTuple):
    """A file: its repository on the hub and its name there, or its address elsewhere, or neither if it is nowhere."""

    repository: str | None = None
    file: str = ""
    url: str | None = None

    @property
    def address(self) -> str | None:
        """Where a person can download it."""
        return f"{HUB}/{self.repository}/blob/main/{self.file}" if self.repository else self.url


def _of(repository: str, *names: str) -> dict[str, Published]:
    return {name: Published(repository, name) for name in names}


PUBLISHED: dict[str, Published] = {
    **_of("hpcai-tech/Open-Sora", "OpenSora-v1-16x256x256.pth", "OpenSora-v1-HQ-16x256x256.pth",
          "OpenSora-v1-HQ-16x512x512.pth"),
    **_of("PixArt-alpha/PixArt-alpha", "PixArt-XL-2-256x256.pth", "PixArt-XL-2-SAM-256x256.pth",
          "PixArt-XL-2-512x512.pth", "PixArt-XL-2-1024-MS.pth"),
    **_of("PixArt-alpha/PixArt-Sigma", "PixArt-Sigma-XL-2-256x256.pth", "PixArt-Sigma-XL-2-512-MS.pth",
          "PixArt-Sigma-XL-2-1024-MS.pth", "PixArt-Sigma-XL-2-2K-MS.pth"),
    "Latte-XL-2-256x256-ucf101.pt": Published("maxin-cn/Latte", "ucf101.pt"),
    "DiT-XL-2-256x256.pt": Published(url=f"{DIT}/DiT-XL-2-256x256.pt"),
    "DiT-XL-2-512x512.pt": Published(url=f"{DIT}/DiT-XL-2-512x512.pt"),
    "PixArt-1B-2.pth": Published(),  # named by configurations of its authors, who have not published it
}  # fmt: skip


def published(name: str) -> Published | None:
    """What a bare file name stands for, however its parts are spelt (`1024MS`, `1024-MS`, `2k_MS`); None if unknown."""
    plain = {_plain(known): found for known, found in PUBLISHED.items()}
    return plain.get(_plain(name))


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()
