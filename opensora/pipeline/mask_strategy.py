"""Mask strategies: which latent frames of a clip are taken from references, and how strongly those are edited.

`parse_mask_strategy` parses the text, `timeline` assigns a source to every latent frame. `edit` [T] is the strength of
image-to-image editing: 0 keeps a latent frame, 1 generates it, and a value between noises it to that time and denoises
it again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

from opensora.config.schema import shown
from opensora.errors import ConfigError

MAX_PLACEMENTS = 1_000  # tuples of one mask strategy
MAX_NUMBER = 10**6  # absolute value in a tuple; more frames than any clip has

logger = logging.getLogger("opensora")


@dataclass(frozen=True)
class ReferencePlacement:
    """One group of a mask strategy, in latent frames; negative starts count from the end."""

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit: float = 0.0

    def __str__(self) -> str:
        return ",".join(map(str, astuple(self)))


class ClipConditioning(NamedTuple):
    """The reference frame and edit strength of each latent frame of a clip."""

    placements: tuple[ReferencePlacement, ...]  # with starts and references >= 0
    edit: tuple[float, ...]  # 0 keep, below 1 edit, 1 generate
    sources: tuple[tuple[int, int] | None, ...]  # (reference, its latent frame), None for pure noise


def parse_mask_strategy(text: str | None) -> list[ReferencePlacement]:
    """The placements of "loop,reference,reference start,target start,length,edit;..."; last fields may be left out.

    None and "" have none. Raises ConfigError for a group that cannot be read, and for more than a thousand.
    """
    if not text:
        return []
    if (count := text.count(";") + 1) > MAX_PLACEMENTS:
        raise ConfigError(f"mask_strategy {shown(text)} has {count:,} groups; give at most {MAX_PLACEMENTS:,}")
    return [_placement(group, text) for group in text.split(";")]


def _placement(group: str, text: str) -> ReferencePlacement:
    values = group.split(",")
    try:
        if len(values) > 6 or "_" in group:  # which Python reads as part of a number
            raise ValueError
        edit = float(values[5]) if len(values) == 6 else 0.0
        placement = replace(ReferencePlacement(*map(int, values[:5])), edit=edit)
        if not 0 <= placement.edit <= 1 or placement.length < 0:
            raise ValueError
        if any(abs(number) > MAX_NUMBER for number in astuple(placement)):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"mask_strategy {shown(text)}: {shown(group)} is not loop,reference,reference start,target start,length,"
            f"edit rate (five integers up to {MAX_NUMBER:,} and a rate from 0 to 1, groups separated by ';')"
        ) from None
    return placement


def timeline(
    placements: Sequence[ReferencePlacement], reference_frames: Sequence[int], frames: int, loops: int = 1,
    align: int | None = None, carried: tuple[int, float] = (0, 0.0),
) -> list[ClipConditioning]:  # fmt: skip
    """The conditioning of each of `loops` clips of `frames` latent frames.

    `reference_frames` are the latent frames of each reference; starts are rounded to multiples of `align`. Every
    finished clip is appended to the references; its last `carried[0]` latent frames begin the next
    clip, with the edit value `carried[1]`.
    Raises ConfigError for a placement whose loop, reference or start does not exist.
    """
    for placement in placements:
        if not 0 <= placement.loop < loops:
            raise ConfigError(f"mask_strategy '{placement}' is for loop {placement.loop} of {loops}, counted from 0")
    clips = []
    for loop in range(loops):
        counts = [*reference_frames, *[frames] * loop]
        clip_placements = [placement for placement in placements if placement.loop == loop]
        if loop:
            clip_placements.append(carry(loop, len(counts) - 1, *carried))
        clips.append(clip_conditioning(clip_placements, counts, frames, align))
    return clips


def clip_conditioning(
    placements: Sequence[ReferencePlacement], reference_frames: Sequence[int], frames: int, align: int | None = None
) -> ClipConditioning:
    """The conditioning of one clip; later placements overwrite earlier ones. Raises ConfigError as `timeline` does."""
    resolved = [_resolve(placement, reference_frames, frames, align) for placement in placements]
    edit: list[float] = [1.0] * frames
    sources: list[tuple[int, int] | None] = [None] * frames
    for one in resolved:
        for offset in range(one.length):
            edit[one.target_start + offset] = one.edit
            sources[one.target_start + offset] = (one.reference, one.reference_start + offset)
    return ClipConditioning(tuple(resolved), tuple(edit), tuple(sources))


def _resolve(
    placement: ReferencePlacement, reference_frames: Sequence[int], frames: int, align: int | None
) -> ReferencePlacement:
    """`placement` without negative numbers, with starts rounded to `align` and the length cut to fit."""
    count, index = len(reference_frames), placement.reference
    if not -count <= index < count:
        raise ConfigError(f"mask_strategy '{placement}' names reference {index}, but there are {count}")
    available = reference_frames[index]
    reference_start = _resolve_start(placement, "reference start", placement.reference_start, available, align)
    target_start = _resolve_start(placement, "target start", placement.target_start, frames, align)
    length = min(placement.length, available - reference_start, frames - target_start)
    if length < placement.length:
        logger.warning("mask_strategy '%s' requests %d latent frames; %d fit", placement, placement.length, length)
    return ReferencePlacement(placement.loop, index % count, reference_start, target_start, length, placement.edit)


def _resolve_start(placement: ReferencePlacement, what: str, start: int, count: int, align: int | None) -> int:
    if not -count <= start < count:
        raise ConfigError(f"mask_strategy '{placement}': {what} {start} is outside its {count} latent frames")
    return nearest_multiple(start % count, align, count) if align else start % count


def carry(loop: int, reference: int, length: int, edit: float = 0.0) -> ReferencePlacement:
    """The placement that starts clip `loop` with the last `length` latent frames of `reference`, the previous clip."""
    return ReferencePlacement(loop, reference, -length, 0, length, edit)


def nearest_multiple(value: int, multiple: int, count: int) -> int:
    """The nearest multiple of `multiple`: the lower one for ties, and if the upper group would exceed `count`."""
    below = value // multiple * multiple
    return below + multiple if value - below > multiple / 2 and below + 2 * multiple <= count else below
