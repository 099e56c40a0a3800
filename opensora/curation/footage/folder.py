"""A folder of footage, as it is found on a disk, and the truth about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora.curation.footage.faults import COPIES, FAULTS
from opensora.curation.footage.films import FPS, Film, render_film
from opensora.curation.footage.pictures import draw_subject
from opensora.curation.footage.shots import draw_shot, render_shot
from opensora.datasets.video import write_video
from opensora.errors import ConfigError
from opensora.files import atomic_write

SCENES_PER_FILM = 5
FAULT_FRAMES = 36  # of a file with a fault, before it
TRUTH = "truth.jsonl"
LIMITS = {"scenes": (1, 100_000), "height": (64, 2160), "width": (64, 3840)}


class FootageSettings(NamedTuple):
    """What to render: scenes of all films together, and the size of their frames."""

    scenes: int = 40
    seed: int = 0
    height: int = 144
    width: int = 256


def write_footage(folder: str | Path, settings: FootageSettings) -> list[dict[str, Any]]:
    """Renders footage into a new or empty folder. Returns the lines of its `truth.jsonl`, one for each file.

    `film_NNN.mp4`: five scenes each, with captions in `film_NNN.txt`; `copy_NNN.mp4`: every third film once more
    (re-encoded, resized, letterboxed, shifted in time, or all of these); `fault_KIND_N.mp4`: one shot with a fault
    (black, frozen, letterbox, pillarbox, fps, truncated), one of each kind for every 40 scenes.

    A line holds `path`, `caption`, `copy_of` (a path) and `fault`, both null if there is none, `scenes` (`start` and
    `end` frame, `cmotion`, `move`, kind of `text`, `text_area`) and `transitions` (`kind`, `start` and `end` frame).

    Equal settings give equal bytes. Raises ConfigError for a folder with files and for settings out of bounds.
    """
    folder = Path(folder)
    _check(folder, settings)
    lines = _films(folder, settings) + write_faults(folder, settings, -(-settings.scenes // 40))
    with atomic_write(folder / TRUTH, error=ConfigError) as [file]:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


def _check(folder: Path, settings: FootageSettings) -> None:
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ConfigError(f"{name} {value} of footage is out of bounds; choose {low} to {high:,}")
    if settings.height % 2 or settings.width % 2:
        raise ConfigError(f"footage of {settings.height}x{settings.width} is not possible; choose even sides")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder}: holds files already; name a new folder")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot hold footage ({error.strerror}); name another folder") from error


def _films(folder: Path, settings: FootageSettings) -> list[dict[str, Any]]:
    """Writes the films and their copies."""
    lines = []
    for index in range(-(-settings.scenes // SCENES_PER_FILM)):
        count = min(SCENES_PER_FILM, settings.scenes - index * SCENES_PER_FILM)
        film = render_film(settings.seed, index, count, settings.height, settings.width)
        name = f"film_{index:03d}.mp4"
        write_video(film.frames, folder / name, FPS)
        lines.append(_line(name, film))
        copies = [(name, film)]
        if index % 3 == 0:
            kind = list(COPIES)[index // 3 % len(COPIES)]
            copy = COPIES[kind]
            name = f"copy_{index:03d}.mp4"
            write_video(copy.change(film.frames), folder / name, FPS, crf=copy.crf)
            copies.append((name, film))
            lines.append(_line(name, film, copy.later) | {"copy_of": copies[0][0], "copy": kind})
        for name, _ in copies:
            (folder / name).with_suffix(".txt").write_text(film.caption + "\n", encoding="utf-8")
    return lines


def _line(name: str, film: Film, later: int = 0) -> dict[str, Any]:
    """The truth about a film that lacks its first frames."""
    scenes = [
        {
            "start": max(scene.start - later, 0), "end": scene.end - later, "cmotion": scene.shot.move.words,
            "move": scene.shot.move, "text": scene.shot.text, "text_area": round(scene.text_area, 4),
        }
        for scene in film.scenes
    ]  # fmt: skip
    transitions = [{"kind": one.kind, "start": one.start - later, "end": one.end - later} for one in film.transitions]
    return {
        "path": name, "caption": film.caption, "copy_of": None, "fault": None, "scenes": scenes,
        "transitions": transitions,
    }  # fmt: skip


def write_faults(folder: Path, settings: FootageSettings, count: int) -> list[dict[str, Any]]:
    """Writes `count` files with each fault. Returns their lines of truth."""
    lines: list[dict[str, Any]] = []
    for number in range(count):
        for place, (kind, fault) in enumerate(FAULTS.items()):
            rng = np.random.default_rng((settings.seed, number, place, 1))
            subject = draw_subject(rng)
            shot = draw_shot(rng, subject, FAULT_FRAMES)
            frames = fault.change(render_shot(shot, settings.height, settings.width, FPS).frames)
            path = write_video(frames, folder / f"fault_{kind}_{number}.mp4", FPS * fault.rate)
            if kind == "truncated":
                data = path.read_bytes()
                path.write_bytes(data[: len(data) * 6 // 10])
            lines.append({
                "path": path.name, "caption": subject.caption, "copy_of": None, "fault": kind, "scenes": [],
                "transitions": [],
            })  # fmt: skip
    return lines
