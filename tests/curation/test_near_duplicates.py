"""Near duplicates: hashes that copies keep, and rows that are grouped the same way in any order."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensora.curation.clip import Clip
from opensora.curation.stages.bars import find_picture
from opensora.curation.stages.duplicates import Duplicates, perceptual_hash
from opensora.curation.tables.apply import edited
from opensora.curation.tables.near_duplicates import distance, parts, read_hashes
from opensora.curation.tables.stream import Row, TableStream
from opensora.datasets.video import write_image, write_video
from opensora.errors import ConfigError
from tests.curation.test_stages import detailed

COLUMNS = ("path", "height", "width", "num_frames", "phash")


def hashed(path: Path, frames: np.ndarray, crf: int = 10) -> str:
    return str(Duplicates().process(Clip(str(write_video(frames, path, 24, crf=crf))))["phash"])


def scaled(frames: np.ndarray) -> np.ndarray:
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize((112, 64), Image.Resampling.BICUBIC)) for frame in frames]
    )


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "resized": scaled,
    "letterboxed": lambda frames: np.pad(frames, ((0, 0), (24, 24), (0, 0), (0, 0))),
    "later by half a step": lambda frames: frames[9:],
    "darker": lambda frames: (frames * 0.7).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_keep_their_hashes(change: str, tmp_path: Path) -> None:
    one, other = detailed(1, 48), detailed(2, 48)
    original = read_hashes(hashed(tmp_path / "one.mp4", one))
    copy = read_hashes(hashed(tmp_path / "copy.mp4", CHANGES[change](one), crf=30))
    assert distance(original, copy) < 6 and set(parts(original)) & set(parts(copy))
    assert distance(copy, read_hashes(hashed(tmp_path / "other.mp4", other))) > 20


def test_flat_pictures_have_no_hash(tmp_path: Path) -> None:
    assert perceptual_hash(np.full((8, 8), 7.0)) == "-"
    black = read_hashes(hashed(tmp_path / "b.mp4", np.zeros((48, 32, 32, 3), np.uint8)))
    assert not black.known.any() and distance(black, black) == 64
    assert len(Duplicates().process(Clip(str(write_image(detailed(1, 1)[0], tmp_path / "i.png"))))["phash"]) == 16


def table(rows: list[Row]) -> TableStream:
    return TableStream("t.csv", COLUMNS, rows)


def row(name: str, hashes: list[int], height: int = 10, num_frames: int = 5) -> Row:
    return [f"{name}.mp4", height, 10, num_frames, " ".join(f"{one:016x}" for one in hashes)]


def groups(rows: list[Row], *operations: str) -> list[Row]:
    with edited(table(rows), [(name, None) for name in operations or ("near-duplication",)]) as (result, _):
        return [list(row) for row in result.rows]


def random_rows(seed: int, count: int = 40) -> list[Row]:
    """Groups of clips whose hashes differ in a few bits."""
    rng, rows = random.Random(seed), []
    for number in range(count // 4):
        hashes = [rng.getrandbits(64) for _ in range(6)]
        for copy in range(4):
            noisy = [one ^ (1 << rng.randrange(64)) ^ (1 << rng.randrange(64)) for one in hashes]
            rows.append(row(f"{number}_{copy}", noisy, height=10 + copy))
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    rows = random_rows(seed)
    expected = {str(row[0]): row[-1] for row in groups(rows)}
    assert all(
        of == (None if name.endswith("_3.mp4") else f"{name.split('_')[0]}_3.mp4") for name, of in expected.items()
    )
    random.Random(seed).shuffle(rows)
    marked = groups(rows)
    assert [row[0] for row in marked] == [row[0] for row in rows]  # the order given is kept
    assert {str(row[0]): row[-1] for row in marked} == expected


def test_only_kept_rows_are_left() -> None:
    kept = groups(random_rows(1), "remove-near-duplication")
    assert [row[0] for row in kept] == [f"{number}_3.mp4" for number in range(10)] and len(kept[0]) == len(COLUMNS)


def test_spans_are_named() -> None:
    columns, hashes = ("path", "start_pts", "end_pts", "phash"), "0123456789abcdef"
    rows: list[Row] = [["a.mp4", "5", "9", hashes], ["a.mp4", "20", "", hashes], ["\udcff.mp4", None, None, hashes]]
    with edited(TableStream("t", columns, rows), [("near-duplication", None)]) as (result, _):
        assert [row[-1] for row in result.rows] == ["a.mp4[20, end)", None, "a.mp4[20, end)"]


@pytest.mark.parametrize("cell", ["", None, 5, "- -", "zz" * 8, "0123456789ABCDE", "é" * 16, "0" * 10**6, "1 " * 10**5])
def test_cells_that_are_no_hashes_are_no_duplicates(cell: str | int | None) -> None:
    rows: list[Row] = [["a", 1, 1, 1, cell], ["b", 1, 1, 1, cell]]
    assert [row[-1] for row in groups(rows)] == [None, None]


def test_a_table_without_hashes_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="has no column 'phash'"),
        edited(TableStream("t", ("path",), [["a"]]), [("near-duplication", None)]),
    ):
        pass


def test_bars_end_at_straight_edges(tmp_path: Path) -> None:
    picture = detailed(1, 1)[0]
    boxed = np.zeros((136, 200, 3), np.uint8)
    boxed[20:116, 20:180] = picture
    rows, columns = np.mgrid[:96, :160]
    light = np.zeros((96, 160, 3), np.uint8)
    light[np.hypot(rows - 48, columns - 80) < 20] = 255
    corner = np.where(columns[..., None] < 9, np.uint8(0), picture)
    corner[:15] = picture[:15]  # the dark columns are part of the picture
    frames = (boxed, light, corner, light * 0)
    found = [find_picture(Clip(str(write_image(one, tmp_path / "f.png")))) for one in frames]
    assert found == [(20, 20, 96, 160), (0, 0, 96, 160), (0, 0, 96, 160), None]


def test_an_animated_webp_has_hashes(tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in detailed(1, 6)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=100)
    assert len(Duplicates().process(Clip(str(tmp_path / "a.webp")))["phash"].split()) == 3
