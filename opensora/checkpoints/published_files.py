"""Published weight files and where to get them. Light to import."""

from __future__ import annotations

import re
from typing import NamedTuple

HUB = "https://huggingface.co"
DIT = "https://dl.fbaipublicfiles.com/DiT/models"


class Published(NamedTuple):
    """A published file: hub repository and file name, or a URL, or neither if it was never published."""

    repository: str | None = None
    file: str = ""
    url: str | None = None

    @property
    def address(self) -> str | None:
        """URL for a manual download."""
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
    """The published file of a bare name, ignoring case, `-` and `_` (`1024MS`, `1024-MS`, `2k_MS`); None if unknown."""
    plain = {_plain(known): found for known, found in PUBLISHED.items()}
    return plain.get(_plain(name))


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()
