"""Conditions in words, `--image`, `--last-frame`, `--extend`, `--edit`, as references and a mask strategy.

The words become the very values that `--reference-path` and `--mask-strategy` take; only the starts of whole groups are
used, so nothing has to be rounded.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.pipeline.mask_strategy import ReferencePlacement

NAMES = ("image", "first_frame", "last_frame", "extend", "keep", "edit", "strength")


class Conditions(NamedTuple):
    """What `reference_path` and `mask_strategy` would say; `align` None leaves starts where they are."""

    reference_path: str
    mask_strategy: str
    align: int | None = None


def sources(settings: InferenceSettings) -> list[str]:
    """The images and videos that the words of a request name. Raises ConfigError where they contradict one another."""
    given = [name for name in NAMES if getattr(settings, name) is not None]
    if not given:
        return []
    if settings.reference_path or settings.mask_strategy:
        word = given[0].replace("_", "-")
        raise ConfigError(f"--{word} says the same as reference_path and mask_strategy; give one of the two forms")
    for word, partner in (("keep", "extend"), ("strength", "edit")):
        if word in given and partner not in given:
            raise ConfigError(f"--{word} belongs to --{partner}; give --{partner} with a video")
    if not 0 <= (settings.strength or 0) <= 1:
        raise ConfigError(f"--strength is {settings.strength}; 0 keeps the video as it is, 1 makes another")
    kinds = [kind for kind in ("edit", "extend", "image", "first_frame") if kind in given]
    if len(kinds) > 1 or ("edit" in given and "last_frame" in given):
        told = " and ".join(f"--{kind.replace('_', '-')}" for kind in (*kinds, "last_frame") if kind in given)
        raise ConfigError(f"{told} cannot be combined; they would give the same frames")
    named = [name for name in (*kinds, "last_frame") if name in given]
    for name in named:
        if ";" in getattr(settings, name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is one file, and ';' separates several; give a path without it")
    return [getattr(settings, name) for name in named]


def conditions(settings: InferenceSettings, num_frames: int, latent_frames: int, group: tuple[int, int]) -> Conditions:
    """The words of a request for clips of `num_frames`, `latent_frames` in latents; `sources` has checked them.

    `group` is how many frames the autoencoder takes together, and how many latent frames they become.
    """
    frames, latents = group
    references: list[str] = []
    placements: list[ReferencePlacement] = []

    def give(reference: str, **at: Any) -> None:
        placements.append(ReferencePlacement(reference=len(references), **at))
        references.append(reference)

    if first := settings.image or settings.first_frame:  # as a clip begins, where there is one: a still of one group
        give(first if num_frames == 1 else f"{first}#hold={frames}")
    if settings.edit is not None:
        strength = 0.5 if settings.strength is None else settings.strength
        give(f"{settings.edit}#first={num_frames}", length=latent_frames, edit=strength)
    if settings.extend is not None:
        groups = -(-_kept_frames(settings, frames) // frames)
        if groups * latents >= latent_frames:
            kept = f"--keep {settings.keep or frames} takes {groups * frames} frames, in whole groups of {frames}"
            raise ConfigError(f"{kept}; of {num_frames} nothing is left to make: keep fewer, or make more")
        give(f"{settings.extend}#last={groups * frames}", length=groups * latents)
    if settings.last_frame is not None:  # a still of one group, whose last latent frame the clip ends with
        give(f"{settings.last_frame}#hold={frames}", reference_start=-1, target_start=-1)
    return Conditions(";".join(references), ";".join(map(str, placements)))


def _kept_frames(settings: InferenceSettings, default: int) -> int:
    """Frames that `keep` asks for: a number, or a duration such as 1s at the rate that the model is told."""
    text = str(default if settings.keep is None else settings.keep)
    match = re.fullmatch(r"([0-9]{1,6})|([0-9]{1,6}(?:\.[0-9]{1,6})?)s", text)
    frames = 0 if match is None else int(match[1]) if match[1] else round(float(match[2]) * settings.fps)
    if frames < 1:
        raise ConfigError(f"--keep {text!r} is no number of frames; give one such as {default}, or seconds such as 1s")
    return frames
