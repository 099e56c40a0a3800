"""Clips as files of their own."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora.cli import main
from opensora.curation.cutting.cut import CutReport, CutSettings, cut_clips
from opensora.curation.cutting.stage import Cut
from opensora.curation.execution.settings import ExecutorSettings
from opensora.datasets.datasets import VideoTextDataset
from opensora.datasets.video import read_video, shown_times, write_image, write_video
from opensora.errors import ConfigError, MediaError
from tests.curation.footage import scene

COLUMNS = ("path", "text", "scene", "start_pts", "end_pts", "crop", "source_hash", "num_frames")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(scene(3, 60), tmp_path_factory.mktemp("film") / "a film.mp4", 24)


@pytest.fixture
def clips(film: Path, tmp_path: Path) -> Path:
    times = shown_times(film)
    other = tmp_path / "other"
    other.mkdir()
    (other / film.name).write_bytes(film.read_bytes())
    return table(
        tmp_path,
        (film, "one", 0, times[0], times[30]), (film, "two", 1, times[30], "", "8 20 64 101"),
        (other / film.name, "of another folder", 0, times[0], times[30]), (film, "a part", 0, times[4], times[7]),
    )  # fmt: skip


def table(folder: Path, *rows: tuple[Any, ...]) -> Path:
    path = folder / "clips.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([*row, *("",) * (len(COLUMNS) - len(row))] for row in rows)
    return path


def cut(source: Path, folder: Path, force: bool = False, **settings: Any) -> CutReport:
    return cut_clips(CutSettings(str(source), Cut(str(folder), **settings), None, ExecutorSettings(workers=0), force))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "clips.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def quarantined(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "clips.csv.quarantine.jsonl").read_text().splitlines()]


def test_files_have_the_frames_that_training_reads(clips: Path, film: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    assert cut(clips, folder, lossless=True) == CutReport(4, 0, 0)
    whole, _ = read_video(film)
    expected = (whole[:30], whole[30:, 8:72, 20:121], whole[:30], whole[4:7])
    found = rows(folder)
    assert list(found[0])[:4] == ["path", "text", "scene", "source_hash"] and "start_pts" not in found[0]
    for row, frames in zip(found, expected, strict=True):
        assert np.array_equal(read_video(row["path"])[0], frames)
        assert [int(row[name]) for name in ("num_frames", "height", "width")] == list(frames.shape[:3])
    assert len({row["path"] for row in found}) == 4 and [row["text"] for row in found][:2] == ["one", "two"]
    assert Path(found[1]["path"]).name.startswith("a_film_scene-0001_")
    kinds = (clips, folder / "clips.csv")
    virtual, cut_out = (VideoTextDataset(kind, 3, 1, (32, 32), "resize_crop", seed=7) for kind in kinds)
    assert all(torch.equal(virtual[row]["video"], cut_out[row]["video"]) for row in range(4))
    assert [virtual[row]["fps"] for row in range(4)] == [cut_out[row]["fps"] for row in range(4)]


def test_default_quality_has_the_same_frames_almost(clips: Path, film: Path, tmp_path: Path) -> None:
    cut(clips, tmp_path / "files")
    frames, fps = read_video(rows(tmp_path / "files")[0]["path"])
    assert fps == 24 and np.abs(frames.astype(int) - read_video(film)[0][:30]).mean() < 2


def test_lengths_rates_and_sizes(clips: Path, film: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    report = cut(clips, folder, min_seconds=0.5, max_seconds=1, target_fps=12, shorter_size=48)
    assert report == CutReport(3, 1, 0)
    shapes = [[int(row[name]) for name in ("num_frames", "height", "width")] for row in rows(folder)]
    assert shapes == [[12, 48, 80], [12, 48, 76], [12, 48, 80]] and rows(folder)[0]["fps"] == "12"
    frames, _ = read_video(rows(folder)[0]["path"])
    expected = read_video(film)[0][0:24:2, ::2, ::2].astype(int)
    assert np.abs(frames - expected).mean() < 8
    larger = tmp_path / "larger"
    cut(clips, larger, target_fps=60, shorter_size=480)
    assert [rows(larger)[0][name] for name in ("num_frames", "height", "fps")] == ["30", "96", "24"]


def test_files_are_kept_and_never_replaced(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    cut(clips, folder)
    first = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.mp4")}
    lost, foreign, *_ = sorted(first)
    lost.unlink()
    (tmp_path / "mine.mp4").write_bytes(foreign.read_bytes())
    write_video(scene(9, 3), foreign, 24)
    theirs = foreign.read_bytes()
    with pytest.raises(ConfigError, match=r"exists; name another file"):
        cut(clips, folder)
    assert cut(clips, folder, force=True) == CutReport(3, 0, 1)
    assert foreign.read_bytes() == theirs and lost.read_bytes() == first[lost][1]
    assert all(path.stat().st_mtime_ns == first[path][0] for path in first if path not in (lost, foreign))
    [bad] = quarantined(folder)
    assert "was not cut from this clip" in bad["error"] and bad["stage"] == "cut" and "\n" not in bad["error"]
    with pytest.raises(MediaError, match=r"none of 4 clips can be cut; the first: .* with these settings"):
        cut(clips, folder, force=True, target_fps=10)


def test_what_cannot_be_cut_is_listed(film: Path, tmp_path: Path) -> None:
    image = write_image(scene(1, 1)[0], tmp_path / "a.png")
    (tmp_path / "broken.mp4").write_bytes(film.read_bytes()[:2000])
    source = table(
        tmp_path, (film, "", 0, 10**9, ""), (image,), (tmp_path / "broken.mp4",), (tmp_path / "gone.mp4",), (film,),
        (film, "", 0, "", "", "0 0 500 10"),
    )  # fmt: skip
    assert cut(source, tmp_path / "files") == CutReport(1, 0, 5)
    errors = [bad["error"] for bad in quarantined(tmp_path / "files")]
    for error, words in zip(
        errors, ("shows no frame", "is an image", "broken.mp4", "gone", "reaches beyond"), strict=True
    ):
        assert words in error and "\n" not in error
    assert len(list((tmp_path / "files").iterdir())) == 3  # a clip, its table, and the quarantine


@pytest.mark.parametrize("name", ["../../evil", "a/b", "..", "con:aux*?", "x" * 300, "\u202eevil", "   ", ".hidden"])
def test_names_stay_in_the_folder(name: str, film: Path, tmp_path: Path) -> None:
    (tmp_path / "deep/er/in").mkdir(parents=True)
    source = Path(os.path.normpath(tmp_path / "deep/er/in" / f"{name[:200]}.mp4"))
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(film.read_bytes())
    folder = tmp_path / "files"
    cut(table(tmp_path, (source, "", 0, 0, 2000)), folder)
    [row] = rows(folder)
    assert Path(row["path"]).parent == folder and Path(row["path"]).is_file()


def film_with_keys(path: Path, every: int = 10, frames: int = 60) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24, options={"g": str(every), "keyint_min": str(every)})
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        for frame in scene(4, frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_copies_begin_at_key_frames(suffix: str, tmp_path: Path) -> None:
    film = film_with_keys(tmp_path / f"keys{suffix}")
    times, (whole, _) = shown_times(film), read_video(film)
    source = table(
        tmp_path, (film, "", 0, times[0], times[30]), (film, "", 1, times[15], times[40]), (film, "", 2, times[31], ""),
        (film, "", 3, times[31], times[38]), (film, "", 4, "", "", "0 0 10 10"), (film, "", 5),
    )  # fmt: skip
    assert cut(source, tmp_path / "files", copy=True) == CutReport(4, 0, 2)
    for row, (first, last) in zip(rows(tmp_path / "files"), ((0, 30), (20, 40), (40, 60), (0, 60)), strict=True):
        frames, fps = read_video(row["path"])
        assert fps == pytest.approx(24) and len(frames) <= last - first and len(frames) >= last - first - 4
        assert np.array_equal(frames, whole[first : first + len(frames)]) and row["num_frames"] == str(len(frames))
        assert Path(row["path"]).suffix == suffix
    errors = [bad["error"] for bad in quarantined(tmp_path / "files")]
    assert "has no key frame in" in errors[0] and "has a crop" in errors[1]
    assert cut(source, tmp_path / "files", copy=True, force=True) == CutReport(4, 0, 2)


def test_short_copies(tmp_path: Path) -> None:
    film = film_with_keys(tmp_path / "keys.mp4")
    cut(table(tmp_path, (film,)), tmp_path / "files", copy=True, max_seconds=0.5)
    [row] = rows(tmp_path / "files")
    assert 8 <= int(row["num_frames"]) <= 12


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"copy": True, "lossless": True}, "--lossless needs"), ({"copy": True, "target_fps": 5}, "--target-fps needs"),
        ({"copy": True, "shorter_size": 5}, "--shorter-size needs"), ({"target_fps": 0}, "--target-fps 0 is out of"),
        ({"min_seconds": -1}, "out of bounds"), ({"max_seconds": float("nan")}, "out of bounds"),
        ({"min_seconds": 5, "max_seconds": 2}, "is below --min-seconds"), ({"min_seconds": 50}, "the first: too short"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(settings: dict[str, Any], words: str, clips: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, MediaError), match=words):
        cut(clips, tmp_path / "files", **settings)
    assert not (tmp_path / "files/clips.csv").exists()


def test_command(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "cut.jsonl"
    arguments = ["--output", str(tmp_path / "files"), "--table", str(target), "--workers", "2", "--max-seconds", "0.2"]
    assert main(["data", "cut", str(clips), *arguments]) == 0
    assert "4 rows" in capsys.readouterr().out and len(target.read_text().splitlines()) == 4
