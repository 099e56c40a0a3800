"""Translates `--image`, `--last-frame`, `--extend` and `--edit` to a reference path and a mask strategy.

Placements start and end at whole groups of frames of the autoencoder, so that no start has to be rounded.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.pipeline.mask_strategy import ReferencePlacement

NAMES = ("image", "first_frame", "last_frame", "extend", "keep", "edit", "strength")


class ReferenceSettings(NamedTuple):
    """Values for the settings of these names; with `align` None, starts are not rounded."""

    reference_path: str
    mask_strategy: str
    align: int | None = None


def media_paths(settings: InferenceSettings) -> list[str]:
    """The images and videos that the settings name. Raises ConfigError for settings that exclude each other."""
    given = [name for name in NAMES if getattr(settings, name) is not None]
    if not given:
        return []
    if settings.reference_path or settings.mask_strategy:
        word = given[0].replace("_", "-")
        raise ConfigError(f"--{word} excludes reference_path and mask_strategy; use one of the two forms")
    for word, partner in (("keep", "extend"), ("strength", "edit")):
        if word in given and partner not in given:
            raise ConfigError(f"--{word} belongs to --{partner}; give --{partner} with a video")
    if not 0 <= (settings.strength or 0) <= 1:
        raise ConfigError(f"--strength is {settings.strength}; 0 keeps the video as it is, 1 makes another")
    kinds = [kind for kind in ("edit", "extend", "image", "first_frame") if kind in given]
    if len(kinds) > 1 or ("edit" in given and "last_frame" in given):
        flags = " and ".join(f"--{kind.replace('_', '-')}" for kind in (*kinds, "last_frame") if kind in given)
        raise ConfigError(f"{flags} cannot be combined; they would give the same frames")
    named = [name for name in (*kinds, "last_frame") if name in given]
    for name in named:
        if ";" in getattr(settings, name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is one file, and ';' separates several; give a path without it")
    return [getattr(settings, name) for name in named]


def reference_settings(
    settings: InferenceSettings, num_frames: int, latent_frames: int, group: tuple[int, int]
) -> ReferenceSettings:
    """Translates settings checked by `media_paths`, for clips of `num_frames` frames and `latent_frames` latent frames.

    `group`: the frames that the autoencoder encodes together, and the latent frames that they become.
    """
    frames, latents = group
    references: list[str] = []
    placements: list[ReferencePlacement] = []

    def add(reference: str, **at: Any) -> None:
        placements.append(ReferencePlacement(reference=len(references), **at))
        references.append(reference)

    if first := settings.image or settings.first_frame:  # the image, repeated for one group of frames
        add(first if num_frames == 1 else f"{first}#hold={frames}")
    if settings.edit is not None:
        strength = 0.5 if settings.strength is None else settings.strength
        add(f"{settings.edit}#first={num_frames}", length=latent_frames, edit=strength)
    if settings.extend is not None:
        groups = -(-_kept_frames(settings, frames) // frames)
        if groups * latents >= latent_frames:
            kept = f"--keep {settings.keep or frames} takes {groups * frames} frames, in whole groups of {frames}"
            raise ConfigError(f"{kept}; of {num_frames} nothing is left to generate: keep fewer, or generate more")
        add(f"{settings.extend}#last={groups * frames}", length=groups * latents)
    if settings.last_frame is not None:  # the last latent frame of an image repeated for one group
        add(f"{settings.last_frame}#hold={frames}", reference_start=-1, target_start=-1)
    return ReferenceSettings(";".join(references), ";".join(map(str, placements)))


def _kept_frames(settings: InferenceSettings, default: int) -> int:
    """`keep` in frames: a number, or a duration such as 1s at the frame rate of the conditioning."""
    text = str(default if settings.keep is None else settings.keep)
    match = re.fullmatch(r"([0-9]{1,6})|([0-9]{1,6}(?:\.[0-9]{1,6})?)s", text)
    frames = 0 if match is None else int(match[1]) if match[1] else round(float(match[2]) * settings.fps)
    if frames < 1:
        raise ConfigError(f"--keep {text!r} is not a number of frames; give {default}, or a duration such as 1s")
    return frames
