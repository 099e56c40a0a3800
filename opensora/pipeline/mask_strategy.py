"""Which frames of a clip are given: the `mask_strategy` tuples, and placing references on the noise.

Axes: latents [C, T, H, W]; `edit` [T] says per latent frame: 0 keep, 1 generate, between: repaint from that time on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from opensora.config.schema import shown
from opensora.errors import ConfigError

MAX_PLACEMENTS = 1_000  # tuples of one mask strategy
MAX_NUMBER = 10**6  # in a tuple, either sign: more than any clip has frames

logger = logging.getLogger("opensora")


@dataclass(frozen=True)
class Placement:
    """One tuple of a mask strategy; frames are latent frames, negative starts count from the end."""

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit: float = 0.0

    def __str__(self) -> str:
        return ",".join(map(str, astuple(self)))


class Clip(NamedTuple):
    """What one clip is given, frame by frame of its latents."""

    placements: tuple[Placement, ...]  # of this clip, as `resolve` gives them, references counted from 0
    edit: tuple[float, ...]  # 0 keep, below 1 repaint, from 1 on generate
    sources: tuple[tuple[int, int] | None, ...]  # (reference, its latent frame), None for noise alone


def parse_mask_strategy(text: str | None) -> list[Placement]:
    """The placements of "loop,reference,reference start,target start,length,edit;...", right ends left out.

    None and "" place nothing. Raises ConfigError naming the tuple that cannot be read, and for more than a thousand.
    """
    if not text:
        return []
    if (count := text.count(";") + 1) > MAX_PLACEMENTS:
        raise ConfigError(f"mask_strategy {shown(text)} has {count:,} groups; give at most {MAX_PLACEMENTS:,}")
    return [_placement(group, text) for group in text.split(";")]


def _placement(group: str, text: str) -> Placement:
    values = group.split(",")
    try:
        if len(values) > 6 or "_" in group:  # which Python reads as part of a number
            raise ValueError
        placement = Placement(*map(int, values[:5]), **({"edit": float(values[5])} if len(values) == 6 else {}))
        if not 0 <= placement.edit <= 1 or placement.length < 0:
            raise ValueError
        if any(abs(number) > MAX_NUMBER for number in astuple(placement)):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"mask_strategy {shown(text)}: {shown(group)} is not loop,reference,reference start,target start,length,"
            f"edit rate (five whole numbers up to {MAX_NUMBER:,} and a rate from 0 to 1, groups separated by ';')"
        ) from None
    return placement


def resolve(placement: Placement, reference_frames: int, frames: int, align: int | None = None) -> Placement:
    """`placement` with starts counted from 0, rounded to multiples of `align`, and the length that fits.

    Raises ConfigError when a start lies outside the reference or the clip.
    """
    starts = {}
    for name, count in (("reference_start", reference_frames), ("target_start", frames)):
        start = getattr(placement, name)
        if not -count <= start < count:
            what = name.replace("_", " ")
            raise ConfigError(f"mask_strategy '{placement}': {what} {start} lies outside its {count} latent frames")
        start %= count
        starts[name] = nearest_multiple(start, align, count) if align else start
    room = min(reference_frames - starts["reference_start"], frames - starts["target_start"])
    length = min(placement.length, room)
    return Placement(placement.loop, placement.reference, *starts.values(), length, placement.edit)


def timeline(
    placements: Sequence[Placement], reference_frames: Sequence[int], frames: int, loops: int = 1,
    align: int | None = None, carried: tuple[int, float] = (0, 0.0),
) -> list[Clip]:  # fmt: skip
    """What each of `loops` clips of `frames` latent frames is given; the one statement of where references land.

    `reference_frames` are the latent frames of each reference. Every clip made becomes one more reference after these,
    of which the next clip takes over the last `carried` (latent frames, edit). Raises ConfigError for a placement that
    has no loop, reference or place.
    """
    for placement in placements:
        if not 0 <= placement.loop < loops:
            raise ConfigError(f"mask_strategy '{placement}' is for loop {placement.loop} of {loops}, counted from 0")
    clips = []
    for loop in range(loops):
        counts = [*reference_frames, *[frames] * loop]
        wanted = [placement for placement in placements if placement.loop == loop]
        if loop:
            wanted.append(carry(loop, len(counts) - 1, *carried))
        clips.append(_clip([_at(placement, counts, frames, align) for placement in wanted], frames))
    return clips


def _at(placement: Placement, counts: Sequence[int], frames: int, align: int | None) -> Placement:
    """`placement` resolved, its reference counted from 0; warns where it is cut short."""
    index = _index(placement, len(counts)) % len(counts)
    found = resolve(placement, counts[index], frames, align)
    if found.length < placement.length:
        logger.warning(
            "mask_strategy '%s' asks for %d latent frames; %d fit", placement, placement.length, found.length
        )
    return replace(found, reference=index)


def _clip(placements: Sequence[Placement], frames: int) -> Clip:
    """The clip that resolved placements make; later ones overwrite earlier ones."""
    edit, sources = [1.0] * frames, [None] * frames
    for one in placements:
        for step in range(one.length):
            edit[one.target_start + step] = one.edit
            sources[one.target_start + step] = (one.reference, one.reference_start + step)
    return Clip(tuple(placements), tuple(edit), tuple(sources))


def place(
    noise: Tensor,
    references: Sequence[Tensor],
    placements: Sequence[Placement],
    loop: int = 0,
    align: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The latents [C, T, H, W] of one clip with the references of this `loop` in their places, and `edit` [T] float32.

    `references` [C, T', H, W] each; later placements overwrite earlier ones. Raises ConfigError for a reference that
    is not there.
    """
    latents, edit = noise.clone(), torch.ones(noise.shape[1])
    for placement in placements:
        if placement.loop != loop:
            continue
        reference = references[_index(placement, len(references))]
        at = resolve(placement, reference.shape[1], noise.shape[1], align)
        target = slice(at.target_start, at.target_start + at.length)
        latents[:, target] = reference[:, at.reference_start : at.reference_start + at.length].to(latents)
        edit[target] = at.edit
    return latents, edit


def _index(placement: Placement, count: int) -> int:
    """Which of `count` references a placement names."""
    index = placement.reference
    if not -count <= index < count:
        raise ConfigError(f"mask_strategy '{placement}' names reference {index}, but there are {count}")
    return index


def carry(loop: int, reference: int, length: int, edit: float = 0.0) -> Placement:
    """Clip number `loop` starts with the last `length` latent frames of its `reference`, the clip before."""
    return Placement(loop, reference, -length, 0, length, edit)


def nearest_multiple(value: int, multiple: int, count: int) -> int:
    """The multiple nearest to `value`, the lower one at half way or where a group at the upper exceeds `count`."""
    below = value // multiple * multiple
    return below + multiple if value - below > multiple / 2 and below + 2 * multiple <= count else below
