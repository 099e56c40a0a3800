"""Fades and dissolves, by the loss of detail that mixing two pictures brings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from opensora.curation.stages.thumbnails import luminance, thumbnail

ROWS, COLUMNS = 72, 128  # of the picture that detail is measured on
COARSE = (6, 12)  # of the picture that is compared
SHORTEST, LONGEST = 4, 60  # frames of a transition; LONGEST of a fade counts out and in together
DEPTH = 0.5  # of the loss of detail, as a share of that of two unrelated pictures
MISFIT = 0.25  # of the loss of detail against a parabola
FADE_DEPTH = 1.5  # from which a picture between the two must be blank
SAME_PICTURE = 0.7  # correlation of the pictures at the ends, from which they show one scene
NONLINEAR = 0.6  # share of the change between the ends that a picture may lie off their mixture
STEP = 0.5  # share of the change that one frame makes, from which it is a hard cut
BLANK = 4.0  # levels of standard deviation, below which a picture is blank
DIM = 0.2  # share of the deviation that the middle of a fade has at most; a dissolve keeps 0.5 or more


class Transition(NamedTuple):
    """Frames [start, end) that belong to neither scene; kind is dissolve or fade."""

    kind: str
    start: int
    end: int


class Look(NamedTuple):
    """What is kept of a frame: the mean square of its gradient, its standard deviation, and a coarse picture."""

    detail: float
    deviation: float
    coarse: np.ndarray


def look(frame: np.ndarray) -> Look:
    """The look of a frame [H, W, 3]."""
    small = thumbnail(luminance(frame), ROWS, COLUMNS)
    down, right = small[1:, :-1] - small[:-1, :-1], small[:-1, 1:] - small[:-1, :-1]
    detail = float((down**2 + right**2).mean()) if down.size and right.size else 0.0
    return Look(detail, float(small.std()), thumbnail(small, *COARSE))


def find_transitions(looks: Sequence[Look]) -> list[Transition]:
    """The fades and dissolves of a video, in order.

    The mixture (1 - a) A + a B of unrelated pictures has the detail (1 - a)^2 E(A) + a^2 E(B) (Alattar 1993, "Detecting
    and compressing dissolve regions in video sequences"): the loss against the line between E(A) and E(B) is the
    parabola a (1 - a) (E(A) + E(B)). A fade out and in again loses about twice of that. It holds for moving pictures.
    """
    detail = np.array([one.detail for one in looks])
    deviation = np.array([one.deviation for one in looks])
    coarse = np.stack([one.coarse.ravel() for one in looks]) if looks else np.zeros((0, 1))
    free = np.ones(len(looks), bool)
    found = []
    for depth, start, end in sorted(_candidates(detail), key=lambda one: (-one[0], one[1], one[2])):
        if free[start - 1 : end + 1].all() and (kind := _kind(depth, start, end, deviation, coarse)):
            free[start - 1 : end + 1] = False
            found.append(Transition(kind, start, end))
    return _joined(sorted(found, key=lambda one: one.start), detail, deviation)


def _candidates(detail: np.ndarray) -> Iterator[tuple[float, int, int]]:
    """(depth, start, end) of the runs of frames whose loss of detail is such a parabola."""
    for length in _lengths(min(LONGEST, len(detail) - 2)):
        share = np.arange(1, length + 1) / (length + 1)
        inside = np.lib.stride_tricks.sliding_window_view(detail[1:-1], length)  # [N, length]
        before, after = detail[: -length - 1, None], detail[length + 1 :, None]  # [N, 1]
        parabola = share * (1 - share) * (before + after)
        loss = before * (1 - share) + after * share - inside
        energy = (parabola**2).sum(1)
        depth = np.divide((loss * parabola).sum(1), energy, out=np.zeros(len(energy)), where=energy > 0)
        off = ((loss - depth[:, None] * parabola) ** 2).sum(1)
        for start in np.flatnonzero((depth > DEPTH) & (off < MISFIT**2 * depth**2 * energy)):
            yield float(depth[start]), int(start) + 1, int(start) + 1 + length


def _lengths(longest: int) -> list[int]:
    """Lengths to try: all of them up to 24 frames, then steps of about 8 %."""
    lengths, length = [], SHORTEST
    while length <= longest:
        lengths.append(length)
        length += max(1, length // 12)
    return lengths


def _kind(depth: float, start: int, end: int, deviation: np.ndarray, coarse: np.ndarray) -> str | None:
    """What kind of transition the frames [start, end) are; None if the pictures at their ends do not mix there."""
    window = coarse[start - 1 : end + 1]
    steps, distances = np.diff(window, axis=0), window - window[0]
    if (steps**2).sum(1).max() > STEP**2 * (distances**2).sum(1).max():
        return None  # a hard cut
    fullest, dimmest = max(deviation[start - 1], deviation[end]), deviation[start - 1 : end + 1].min()
    if dimmest < max(BLANK, DIM * fullest):
        return "fade"
    if depth > FADE_DEPTH:
        return None
    before, after = coarse[start - 1], coarse[end]
    if np.corrcoef(before, after)[0, 1] > SAME_PICTURE:
        return None
    share = (np.arange(end - start) + 1)[:, None] / (end - start + 1)
    off = coarse[start:end] - (before * (1 - share) + after * share)
    return "dissolve" if (off**2).mean() < NONLINEAR**2 * ((after - before) ** 2).mean() else None


def _joined(found: Sequence[Transition], detail: np.ndarray, deviation: np.ndarray) -> list[Transition]:
    """The transitions, fades grown to their full length and joined where they meet."""
    joined: list[Transition] = []
    for one in found:
        kind, start, end = _grown(one, detail, deviation) if one.kind == "fade" else one
        if joined and start <= joined[-1].end:
            joined[-1] = Transition("fade", joined[-1].start, max(end, joined[-1].end))
        else:
            joined.append(Transition(kind, start, end))
    return joined


def _grown(fade: Transition, detail: np.ndarray, deviation: np.ndarray) -> Transition:
    """A fade with the blank frames beside it, and its ramps up to where the picture is full.

    On a ramp the root of the detail changes by equal steps, so a part of a ramp fits as well as all of it.
    """
    root, blank = np.sqrt(detail), deviation < BLANK
    middle = fade.start - 1 + int(np.argmin(deviation[fade.start - 1 : fade.end + 1]))
    ends = []
    for direction, edge in ((-1, fade.start), (1, fade.end - 1)):
        at, dark = edge, middle
        while 0 <= dark + direction < len(blank) and blank[dark + direction]:
            dark += direction  # the last blank frame in this direction
        if (at - dark) * direction <= 0:
            at = dark
        step = abs(root[at] - root[dark]) / max(abs(at - dark), 1)
        while 0 <= at + direction < len(root) and at != dark and root[at + direction] - root[at] > step / 2:
            at += direction
        ends.append(at)
    return Transition(fade.kind, ends[0], ends[1] + 1)
