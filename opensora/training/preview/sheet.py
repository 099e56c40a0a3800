"""Clips of training steps as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from opensora.errors import printable
from opensora.training.preview.clips import ShownClip

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FRAMES = 8  # shown of a clip
SIDE, GAP, FRAME, LINE = 140, 8, 4, 18  # pixels: long side of a frame, distance, border, line of text
PAPER, INK, GIVEN, GENERATED, DROPPED = "#ffffff", "#222222", "#2f9e44", "#adb5bd", "#c92a2a"
MAX_LINES, MAX_NAME = 6, 90  # lines of a caption, characters of a name
WIDTH = FRAMES * (SIDE + 2 * FRAME + GAP) + GAP


def draw_sheet(clips: Sequence[ShownClip]) -> np.ndarray:
    """A picture uint8 [H, W, 3]: for each clip its name, up to FRAMES evenly spaced frames, and its caption.

    Frames have a green border where the model is given them, a grey one where it generates them. What the text encoder
    does not see is red.
    """
    from PIL import Image

    parts = [_clip(clip) for clip in clips]
    legend = _legend()
    sheet = Image.new("RGB", (WIDTH, legend.height + sum(part.height for part in parts)), PAPER)
    top = 0
    for part in (legend, *parts):
        sheet.paste(part, (0, top))
        top += part.height
    return np.asarray(sheet)


def _legend() -> Picture:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, LINE + 2 * GAP), PAPER)
    draw, left = ImageDraw.Draw(image), GAP
    for color, text in (
        (GIVEN, "given to the model"),
        (GENERATED, "generated"),
        (DROPPED, "text that it does not see"),
    ):
        draw.rectangle((left, GAP + 3, left + 12, GAP + 15), fill=color)
        draw.text((left + 20, GAP), text, fill=INK, font=_font())
        left += 200
    return image


def _clip(clip: ShownClip) -> Picture:
    from PIL import Image, ImageDraw

    frames = clip.frames.permute(1, 2, 3, 0).numpy()
    count, height, width = frames.shape[:3]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    lines = _caption_lines(clip)
    image = Image.new("RGB", (WIDTH, 3 * GAP + LINE + size[1] + 2 * FRAME + LINE * len(lines)), PAPER)
    draw, top = ImageDraw.Draw(image), GAP
    draw.text((GAP, top), _title(clip, count, height, width), fill=INK, font=_font())
    top += LINE
    for place, index in enumerate(np.unique(np.linspace(0, count - 1, FRAMES).round().astype(int))):
        left = GAP + place * (SIDE + 2 * FRAME + GAP)
        box = (left, top, left + size[0] + 2 * FRAME - 1, top + size[1] + 2 * FRAME - 1)
        draw.rectangle(box, fill=GIVEN if clip.given[index] else GENERATED)
        image.paste(Image.fromarray(frames[index]).resize(size, Image.Resampling.BOX), (left + FRAME, top + FRAME))
    top += size[1] + 2 * FRAME + GAP
    for line in lines:
        left = GAP
        for word, color in line:
            draw.text((left, top), word, fill=color, font=_font())
            left += round(_font().getlength(f"{word} "))
        top += LINE
    return image


def _title(clip: ShownClip, count: int, height: int, width: int) -> str:
    caption = clip.caption
    tokens = "" if caption.tokens is None else f", {caption.tokens} tokens"
    dropped = f", {caption.dropped_tokens} of them dropped" if caption.dropped_tokens else ""
    text = ", trained without its text" if clip.without_text else ""
    name = _drawable(clip.name)
    name = name if len(name) <= MAX_NAME else f"...{name[-MAX_NAME:]}"
    return f"step {clip.step}: {name}: {count} x {height} x {width}, {clip.fps:.5g} fps{tokens}{dropped}{text}"


def _caption_lines(clip: ShownClip) -> list[list[tuple[str, str]]]:
    """Lines of (word, color) that fit the width."""
    color = DROPPED if clip.without_text else INK
    words = [(word, color) for word in _drawable(clip.caption.kept).split()]
    words += [(word, DROPPED) for word in _drawable(clip.caption.dropped).split()]
    lines: list[list[tuple[str, str]]] = [[]]
    left = 0.0
    for word, shade in words or [("(no caption)", DROPPED)]:
        length = _font().getlength(f"{word[:MAX_NAME]} ")
        if left + length > WIDTH - 2 * GAP and lines[-1]:
            lines.append([])
            left = 0.0
        lines[-1].append((word[:MAX_NAME], shade))
        left += length
    if len(lines) > MAX_LINES:
        half = MAX_LINES // 2
        lines = [*lines[:half], [("...", INK)], *lines[-half:]]
    return lines


def _drawable(text: str) -> str:
    """What the font has: other characters are escaped or become question marks."""
    return printable(text).replace("\n", " ").encode("latin-1", "replace").decode("latin-1")


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(13)
