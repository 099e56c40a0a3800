"""Histograms as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opensora.curation.analysis.figures import Figures
from opensora.curation.analysis.series import Bar
from opensora.datasets.video.writer import encode_image
from opensora.errors import ConfigError, printable
from opensora.files import atomic_write

LABEL, BAR, NUMBER, LINE = 260, 420, 80, 20  # pixels: label, widest bar, number, height of a line
COLOR, INK, PAPER = "#2b6cb0", "#222222", "#ffffff"
MAX_LABEL = 40  # characters


def save_pictures(figures: Figures, folder: str | Path) -> list[Path]:
    """Writes `01-NAME.png`, ... with a histogram of each column into a folder; replaces those of an earlier run."""
    shown = figures.histograms()
    targets = [Path(folder) / f"{number:02}-{_plain(title)}.png" for number, (title, _) in enumerate(shown, start=1)]
    if not targets:
        raise ConfigError(f"{figures.source}: has nothing to draw; add columns with opensora data edit --info")
    with atomic_write(*targets, make_folders=True, error=ConfigError) as temporaries:
        for (title, bars), path in zip(shown, temporaries, strict=True):
            encode_image(histogram(title, bars), path)
    return targets


def histogram(title: str, bars: Sequence[Bar]) -> np.ndarray:
    """Horizontal bars with labels and shares, uint8 [H, W, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (LABEL + BAR + NUMBER, LINE * (len(bars) + 2)), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    draw.text((10, 4), _shown(title), fill=INK, font=font)
    most = max((bar.share for bar in bars), default=1)
    for number, bar in enumerate(bars, start=1):
        top, length = number * LINE + 4, round(BAR * bar.share / most)
        draw.text((LABEL - 8, top + 7), _shown(bar.label), fill=INK, font=font, anchor="rm")
        draw.rectangle((LABEL, top, LABEL + length, top + LINE - 6), fill=COLOR)
        draw.text((LABEL + length + 6, top + 7), f"{bar.share:.1%}", fill=INK, font=font, anchor="lm")
    return np.asarray(image)


def _shown(text: str) -> str:
    """What the font can draw on one line."""
    plain = printable(text).replace("\n", " ").replace("\t", " ").encode("latin-1", "replace").decode("latin-1")
    return plain if len(plain) <= MAX_LABEL else f"{plain[: MAX_LABEL - 3]}..."


def _plain(title: str) -> str:
    """A column's name as part of a file name."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in title)[:40]
