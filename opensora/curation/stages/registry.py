"""Stages by name, their settings and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from opensora.config.schema import check
from opensora.curation.clip import Clip
from opensora.curation.stages.camera import Camera
from opensora.curation.stages.captions import Captions
from opensora.curation.stages.duplicates import Duplicates
from opensora.curation.stages.health import Health
from opensora.curation.stages.motion import Motion
from opensora.curation.stages.probe import Probe
from opensora.curation.stages.quality import Quality
from opensora.curation.stages.scenes import Scenes
from opensora.curation.stages.scores import Scores
from opensora.curation.stages.stage import Stage
from opensora.curation.stages.text import Text
from opensora.datasets.video import Span
from opensora.errors import ConfigError, did_you_mean

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        Probe,
        Scenes,
        Health,
        Motion,
        Camera,
        Quality,
        Text,
        Scores,
        Duplicates,
        Captions,
    )
}


def make(name: str, options: Mapping[str, Any]) -> Stage:
    """The stage called `name` with these settings. Raises ConfigError for unknown names and settings."""
    if name not in STAGES:
        raise ConfigError(f"stage '{name}' is not known; choose from {', '.join(STAGES)}{did_you_mean(name, STAGES)}")
    known = [field.name for field in fields(STAGES[name])]  # type: ignore[arg-type]  # stages are dataclasses
    for option in options:
        if option not in known:
            remedy = f"it has {', '.join(known) or 'none'}"
            raise ConfigError(f"stage {name} has no setting '{option}'{did_you_mean(option, known)}; {remedy}")
    hints = get_type_hints(STAGES[name])
    checked = {option: check(hints[option], value, f"{name}.{option}") for option, value in options.items()}
    return STAGES[name](**checked)


def check_order(stages: Sequence[Stage]) -> None:
    """Raises ConfigError if a stage is named twice."""
    names = [stage.name for stage in stages]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise ConfigError(f"stage '{doubled}' is named twice; name each once")


def groups(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages in groups that a worker runs on a clip one after another.

    A splitting stage ends its group. A stage that has a model, asks a server or reads columns has one of its own.
    """
    found: list[list[Stage]] = [[]]
    for stage in stages:
        alone = stage.place != "processor" or bool(stage.inputs)
        if alone:
            found.append([])
        found[-1].append(stage)
        if alone or stage.splits:
            found.append([])
    return [group for group in found if group]


def part(clip: Clip, row: dict[str, Any]) -> Clip:
    """The clip of a row that a splitting stage made."""
    span = None if row["start_pts"] is None else Span(row["start_pts"], row["end_pts"])
    return Clip(clip.path, span, clip.crop, clip.row)
