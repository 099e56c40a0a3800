"""Draws a line of text in the lower right corner of every frame, such as "AI generated"."""

from __future__ import annotations

import numpy as np

from opensora.config.schema import shown
from opensora.errors import ConfigError

DEFAULT = "AI generated"
FONT_HEIGHT = 1 / 20  # of the short side of a frame
MAX_CHARACTERS = 1000
MIN_FONT, SMALLEST_FONT = 8, 6  # pixels; below MIN_FONT only where the text would not fit


def text_of(setting: bool | str) -> str:
    """The text of a setting: the default for True, empty for False."""
    return DEFAULT if setting is True else setting or ""


def check(setting: bool | str, size: tuple[int, int]) -> None:
    """Raises ConfigError for a text that the font lacks, or that is unreadable on frames of `size` (H, W)."""
    draw(np.empty((0, *size, 3), np.uint8), setting)


def draw(frames: np.ndarray, setting: bool | str) -> np.ndarray:
    """Draws the text on frames uint8 [T, H, W, 3], white with a black edge. Returns new frames."""
    if not setting:
        return frames
    mark = _mark(text_of(setting), *frames.shape[1:3]).astype(np.uint16)
    white, opacity, marked = mark[..., :1], mark[..., 1:], frames.copy()
    corner = marked[:, -mark.shape[0] :, -mark.shape[1] :]
    corner[:] = (corner * (255 - opacity) + white * opacity + 127) // 255
    return marked


def _mark(text: str, height: int, width: int) -> np.ndarray:
    """Brightness and opacity uint8 [h, w, 2] of the text."""
    from PIL import Image, ImageDraw, ImageFont

    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"watermark {shown(text)} has {len(text):,} characters; give at most {MAX_CHARACTERS}")
    for points in range(max(round(min(height, width) * FONT_HEIGHT), MIN_FONT), SMALLEST_FONT - 1, -1):
        font, edge, margin = ImageFont.load_default(points), max(points // 12, 1), points // 4
        left, top, right, bottom = map(int, font.getbbox(text, stroke_width=edge))
        if right - left + 2 * margin <= width and bottom - top + 2 * margin <= height:
            break
    else:
        remedy = "make them larger, or give a shorter text"
        raise ConfigError(f"watermark {text!r} cannot be read on frames of {height}x{width}; {remedy}")
    unknown = font.getmask("\U0010ffff")
    if not text.strip() or any(bytes(font.getmask(one)) == bytes(unknown) or not one.isprintable() for one in text):
        raise ConfigError(f"watermark {text!r} cannot be drawn; write a text in Latin letters without accents")
    mark = Image.new("LA", (right - left + margin, bottom - top + margin))
    draw = ImageDraw.Draw(mark)
    draw.text((-left, -top), text, fill=(255, 255), font=font, stroke_width=edge, stroke_fill=(0, 255))
    return np.asarray(mark)
