"""Rendered footage: what its truth says is in the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from opensora.curation.footage.films import BLANK, FPS, join, render_film
from opensora.curation.footage.folder import TRUTH, FootageSettings, write_footage
from opensora.curation.footage.shots import Move
from opensora.datasets.video import count_frames, read_video
from opensora.errors import ConfigError, MediaError

SMALL = FootageSettings(scenes=2, height=64, width=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered") / "new"
    write_footage(folder, SMALL)
    return folder


def test_a_folder_holds_what_its_truth_says(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / TRUTH).read_text().splitlines()]
    assert {line["path"] for line in lines} == {file.name for file in folder.glob("*.mp4")}
    for line in lines:
        if line["scenes"]:
            assert count_frames(folder / line["path"]) == line["scenes"][-1]["end"]
            assert (folder / line["path"]).with_suffix(".txt").read_text().strip() == line["caption"]
    assert [line["copy_of"] for line in lines if line["copy_of"]] == ["film_000.mp4"]


def test_faults_are_as_named(folder: Path) -> None:
    black, _ = read_video(folder / "fault_black_0.mp4")
    assert black[-20:].max() < 20 and black[:30].max() > 100
    frozen, _ = read_video(folder / "fault_frozen_0.mp4")
    changes = np.abs(np.diff(frozen.astype(int), axis=0)).mean((1, 2, 3))
    assert np.median(changes[20:38]) < 0.5 < np.median(changes[:15])
    assert read_video(folder / "fault_letterbox_0.mp4")[0].shape[1:3] == (80, 96)
    assert read_video(folder / "fault_fps_0.mp4")[1] == 2 * FPS
    with pytest.raises(MediaError):
        read_video(folder / "fault_truncated_0.mp4")


def test_equal_settings_give_equal_frames() -> None:
    one, again, other = (render_film(seed, 1, 2, 64, 96) for seed in (5, 5, 6))
    assert np.array_equal(one.frames, again.frames) and one.scenes == again.scenes
    assert one.scenes != other.scenes


@pytest.mark.parametrize("seed", range(3))
def test_scenes_and_transitions_fill_a_film(seed: int) -> None:
    film = render_film(seed, 0, 4, 64, 96)
    ends = [0, *(end for one in film.transitions for end in (one.start, one.end)), len(film.frames)]
    assert [edge for scene in film.scenes for edge in (scene.start, scene.end)] == ends


@pytest.mark.parametrize("kind", BLANK)
def test_fades_pass_through_a_blank_frame(kind: str) -> None:
    frames = join(kind, np.full((9, 1, 1, 3), 100, np.uint8), np.full((9, 1, 1, 3), 50, np.uint8))
    blank = np.abs(frames - BLANK[kind]).argmin()
    assert len(frames) == 18 and abs(frames.flat[blank] - BLANK[kind]) < 25 and blank // 3 in (8, 9)


def test_words_of_moves() -> None:
    assert Move().words == "static" and Move(growth=-1).words == "zoom out"
    assert Move(right=-0.1, roll=5).words == "pan left+roll right"


@pytest.mark.parametrize(
    ("change", "words"), [({"scenes": 0}, "choose 1 to"), ({"height": 63}, "choose"), ({"width": 99}, "even sides")]
)
def test_settings_are_bounded(change: dict[str, int], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        write_footage(tmp_path / "new", SMALL._replace(**change))


def test_a_folder_with_files_is_left_alone(folder: Path) -> None:
    with pytest.raises(ConfigError, match="holds files already"):
        write_footage(folder, SMALL)
