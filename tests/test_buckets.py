"""Buckets and their batches: independent draws, one order for any number of ranks, and a report that tells why."""

from __future__ import annotations

import csv
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from opensora.cli import main
from opensora.datasets import bucket_report
from opensora.datasets.bucket import REASONS, Bucket, Buckets, RowOutcome, random_words
from opensora.datasets.samplers import BucketBatchSampler, FeatureBufferSampler, SampleSampler, rank_indices, shuffled
from opensora.errors import ConfigError

CONFIG: dict[str, Any] = {"144p": {1: (1.0, 4), 17: (0.5, 2)}, "480p": {17: (0.5, 3), 51: ((0.5, 0.5), 2)}}


def table(count: int = 400, seed: int = 0) -> np.ndarray:
    """num_frames, height, width [3, N]."""
    source = np.random.default_rng(seed)
    frames = source.choice([1, 10, 17, 60], count)
    sizes = np.array([(100, 100), (144, 256), (256, 144), (480, 854), (1080, 1920)])
    return np.stack([frames, *source.choice(sizes, count).T])


def sampler(columns: np.ndarray | None = None, config: dict[str, Any] = CONFIG, **settings: Any) -> BucketBatchSampler:
    return BucketBatchSampler(Buckets(config), *(table() if columns is None else columns), **settings)


def rows_of(batches: Any) -> list[int]:
    return [int(index.split("-")[0]) for batch in batches for index in batch]


def test_a_clip_of_exactly_the_frames_is_enough():
    assign = Buckets({"144p": {17: (1.0, 1)}}).assign
    assert assign([16, 17, 18], [144] * 3, [256] * 3, seed=0).entry.tolist() == [-1, 0, 0]
    assert assign([33, 34, 50], [144] * 3, [256] * 3, seed=0, frame_interval=2).entry.tolist() == [-1, 0, 0]


def test_exactly_four_fifths_of_the_pixels_are_enough():
    assign = Buckets({"240p": {1: (1.0, 1)}}).assign  # 102240 pixels, of which 81792 = 284 x 288
    assert assign([1, 1], [284, 284], [288, 287], seed=0).entry.tolist() == [0, -1]


def test_every_row_has_its_fate():
    config = {"144p": {1: (1.0, 4), 17: (1.0, 2), 51: (0.0, None)}, "480p": {17: (0.0001, 2)}}
    rows = [
        (1, 144, 256), (0, 144, 256), (float("nan"), 144, 256), (17, 90, 160), (5, 144, 256), (60, 144, 256),
        (1, 480, 854),
    ]  # fmt: skip
    placement = Buckets(config).assign(*zip(*rows, strict=True), seed=3)
    expected = [
        RowOutcome.PLACED,
        RowOutcome.UNKNOWN_SIZE,
        RowOutcome.UNKNOWN_SIZE,
        RowOutcome.TOO_SMALL,
        RowOutcome.TOO_SHORT,
        RowOutcome.KEEP_IS_ZERO,
    ]
    assert placement.outcome.tolist() == [*expected, RowOutcome.PLACED]
    assert placement[0] == placement[6] == Bucket("144p", 1, "0.56") and placement[1] is None
    videos_only = Buckets({"480p": {17: (0.0001, 2)}}).assign([1, 17], [480] * 2, [854] * 2, seed=3)
    assert videos_only.outcome.tolist() == [RowOutcome.NO_IMAGES, RowOutcome.NOT_DRAWN]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"145p": {1: (1.0, 1)}}, "did you mean '144p'"),
        ({"4K": {1: (1.0, 1)}, "4k": {1: (1.0, 1)}}, "4k twice"),
        ({"144p": (1.0, 1)}, "144p must be"),
        ({"144p": {"51": (1.0, 1)}}, "'51' frames: the number of frames"),
        ({"144p": {51: 12}}, r"write \(keep probability, batch size\)"),
        ({"144p": {51: (1.0, None)}}, "batch size must be an integer"),
        ({"144p": {51: (1.0, 0)}}, "batch size must be an integer"),
        ({"144p": {51: (4, 0.5)}}, "batch size must be an integer"),
        ({"144p": {51: (-0.5, 4)}}, "keep probability must be"),
        ({"144p": {51: (float("nan"), 4)}}, "keep probability must be"),
        ({"144p": {51: ((0.5, 0.5, 0.5), 4)}}, "keep probability must be"),
    ],
)  # fmt: skip
def test_mistakes_in_the_configuration(config: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        Buckets(config)


def test_draws_of_epochs_and_entries_are_independent():
    """B4: no draw of one (epoch, entry) tells anything about that of another."""
    count = 20_000
    draws = {
        (epoch, entry, which): random_words(count, 1024, epoch, 0, entry, which) / 2.0**64
        for epoch in range(3) for entry in range(3) for which in range(2)
    }  # fmt: skip
    correlations = np.corrcoef(list(draws.values())) - np.eye(len(draws))
    assert np.abs(correlations).max() < 5 / np.sqrt(count)
    buckets = Buckets({"480p": {17: (0.5, 1)}, "360p": {17: (0.5, 1)}, "144p": {17: (1.0, 1)}})
    columns = np.tile([[20], [480], [854]], count)
    first, second = (buckets.assign(*columns, seed=1, epoch=epoch).entry for epoch in (0, 1))
    together = np.histogram2d(first, second, bins=3)[0] / count
    assert np.abs(together - np.outer([0.5, 0.25, 0.25], [0.5, 0.25, 0.25])).max() < 5 * 0.5 / np.sqrt(count)


def test_draws_belong_to_rows():
    """More rows at the end of a table, or another number of them, change nothing for the others."""
    buckets, columns = Buckets(CONFIG), table()
    whole, part = buckets.assign(*columns, seed=7), buckets.assign(*columns[:, :100], seed=7)
    assert np.array_equal(whole.entry[:100], part.entry)
    assert not np.array_equal(whole.entry, buckets.assign(*columns, seed=8).entry)
    assert not np.array_equal(whole.entry, buckets.assign(*columns, seed=7 + 2**32).entry)
    assert not np.array_equal(whole.entry, buckets.assign(*columns, seed=6, epoch=1).entry)


def test_order_is_a_function_of_seed_and_epoch():
    first, again, later = sampler(), sampler(), sampler()
    later.set_epoch(1)
    assert list(first) == list(again) != list(later)
    first.set_epoch(1)
    assert list(first) == list(later)
    assert list(sampler(seed=1)) != list(again)
    assert sorted(shuffled(1000, 0, 0, 1)) == list(range(1000)) != shuffled(1000, 0, 0, 1).tolist()


def test_rows_and_batches_are_both_shuffled():
    columns = np.tile([[17], [144], [256]], 100)
    columns[1:, 50:] = [[480], [854]]
    config = {"144p": {17: (1.0, 2)}, "480p": {17: (1.0, 2)}}
    plain, mixed = (sampler(columns, config, shuffle=shuffle).plan for shuffle in (False, True))
    assert plain.rows.tolist() == list(range(100)) == sorted(mixed.rows) != mixed.rows.tolist()
    assert plain.group.tolist() == [0] * 25 + [1] * 25 == sorted(mixed.group) != mixed.group.tolist()


def test_known_order():
    """Orders are saved in checkpoints by their seeds, so no version of NumPy may change them."""
    assert random_words(2, 1024, 3, 1).tolist() == [15342869056959798429, 11307356147165839767]
    assert shuffled(8, 42, 0, 2).tolist() == [0, 3, 6, 5, 4, 2, 7, 1]


@pytest.mark.parametrize("drop_last", [True, False])
def test_changing_the_number_of_ranks_serves_everything_once(drop_last: bool):
    whole = list(sampler(drop_last=drop_last))
    served, state = [], sampler().state_dict()
    for world_size, steps in ((3, 4), (8, 2), (1, 5), (2, None)):
        ranks = [sampler(drop_last=drop_last, rank=rank, world_size=world_size) for rank in range(world_size)]
        for made in ranks:
            made.load_state_dict(state)
        batches = [list(made)[:steps] for made in ranks]
        served += [batch for step in zip(*batches, strict=True) for batch in step]
        state = ranks[0].state_dict(len(batches[0]))
    if drop_last:
        assert served == whole[: len(served)] and 0 <= len(whole) - len(served) < 2
    else:
        assert served[: len(whole)] == whole and served[len(whole) :] == whole[: len(served) - len(whole)]
    kept = rows_of(whole)
    assert len(set(kept)) == len(kept) if drop_last else len(set(kept)) == sum(sampler().plan.num_rows)


@pytest.mark.parametrize(("total", "world_size"), [(0, 3), (1, 8), (7, 2), (8, 2)])
def test_deal(total: int, world_size: int):
    for drop_last in (True, False):
        dealt = np.array([rank_indices(total, 0, rank, world_size, drop_last) for rank in range(world_size)])
        common = dealt.T.ravel().tolist()
        assert common[:total] == list(range(total))[: len(common)]
        assert len(common) % world_size == 0 and abs(len(common) - total) < world_size
        assert not common or set(common[total:]) <= set(range(total))


def test_small_buckets_are_completed():
    """S2: a bucket of less than half a batch starts over until the batch is full."""
    made = sampler(np.tile([[17], [144], [256]], 3), {"144p": {17: (1.0, 8)}}, drop_last=False, world_size=4)
    (batch,) = made
    assert Counter(rows_of([batch])) in ({0: 3, 1: 3, 2: 2}, {0: 3, 1: 2, 2: 3}, {0: 2, 1: 3, 2: 3})


def test_a_padded_epoch_that_ended_is_over_on_any_number_of_ranks():
    made = sampler(drop_last=False, world_size=7)
    assert len(made.plan) % 7
    again = sampler(drop_last=False)
    again.load_state_dict(made.state_dict(len(made)))
    assert not list(again)
    samples = SampleSampler(10, world_size=8)
    assert samples.state_dict(len(samples))["position"] == 10


def test_resuming_an_epoch_is_not_starting_it_again():
    made = sampler()
    made.set_epoch(2)
    whole = list(made)
    again = sampler()
    assert len(again) and again.plan  # S5: asking first must not keep the plan of epoch 0
    again.load_state_dict(made.state_dict(3))
    again.set_epoch(2)
    assert list(again) == whole[3:] and len(again) == len(whole) - 3
    again.set_epoch(3)
    assert again.position == 0


@pytest.mark.parametrize(
    ("frames", "batch_size", "world_size", "reason"),
    [
        (5, 2, 1, "none of the 9 rows has a bucket"),
        (17, 10, 1, "no bucket has the rows of one batch; the fullest, 144p 17f 0.56, has 9 of 10"),
        (17, 4, 3, "2 batches are fewer than 3 ranks"),
    ],
)
def test_a_run_without_steps_is_refused(frames: int, batch_size: int, world_size: int, reason: str):
    columns = np.tile([[frames], [144], [256]], 9)
    made = sampler(columns, {"144p": {17: (1.0, batch_size)}}, world_size=world_size)
    assert not list(made)
    with pytest.raises(ConfigError, match=f"no steps: {reason}"):
        made.require_steps()
    sampler().require_steps()


def test_sample_sampler_resumes_on_other_ranks():
    whole = list(SampleSampler(40, seed=3))
    first = SampleSampler(40, seed=3, world_size=4)
    state = first.state_dict(samples=2 * 3)
    rest = []
    for rank in range(2):
        made = SampleSampler(40, seed=3, rank=rank, world_size=2)
        made.load_state_dict(state)
        rest.append(list(made))
    assert [index for step in zip(*rest, strict=True) for index in step] == whole[24:]
    made.set_epoch(1)
    assert list(made) != whole[1::2] and len(made) == 20


def test_feature_buffers_are_resumed_where_they_stopped():
    made = FeatureBufferSampler(4, 4, rank=1, world_size=2)
    assert list(made) == list(range(8, 16))
    made.load_state_dict(made.state_dict(3))
    assert list(made) == list(range(11, 16))
    made.load_state_dict({"start_index": 8})
    with pytest.raises(ConfigError, match="is past"):
        made.load_state_dict({"start_index": 9})


def test_a_million_rows_in_seconds():
    columns, config = table(1_000_000), {name: dict(CONFIG["480p"]) for name in ("144p", "240p", "360p", "480p")}
    begin = time.process_time()
    made = sampler(columns, config, world_size=8)
    assert len(made) > 1000
    assert time.process_time() - begin < 10  # about one second where nothing else runs


def test_report(tmp_path):
    columns = np.concatenate([table(100), [[17], [10], [10]]], 1)
    made = sampler(columns, world_size=3)
    text = bucket_report.describe(made)
    plan = made.plan
    assert "epoch 0, seed 1024, 3 rank(s)" in text
    assert f"{sum(plan.num_rows)} of 101 rows have a bucket" in text
    assert f"{len(plan)} batches, {len(plan) // 3} steps an epoch, {len(set(rows_of(served(columns, 3))))} " in text
    assert f"{len(plan) % 3} batches at the end do not suffice" in text or len(plan) % 3 == 0
    for bucket, rows, size, batches in zip(
        plan.buckets, plan.num_rows, plan.batch_sizes, plan.num_batches, strict=True
    ):
        (line,) = (line.split() for line in text.splitlines() if line.startswith(f"{bucket} "))
        assert line[4:7] == [str(rows), str(size), str(batches)]
        assert line[8:] == [str(rows - size * batches), "0"]
    (reason,) = (line for line in text.splitlines() if "fewer pixels" in line)
    assert int(reason.split(":")[0]) == (plan.placement.outcome == RowOutcome.TOO_SMALL).sum()
    padded = bucket_report.describe(sampler(columns, world_size=50, drop_last=False))
    assert "batches are repeated at the end" in padded


def served(columns: np.ndarray, world_size: int) -> list[list[str]]:
    return [batch for rank in range(world_size) for batch in sampler(columns, rank=rank, world_size=world_size)]


def test_rows_and_picture(tmp_path):
    made = sampler()
    paths = [f"clips/{row}, <a>.mp4" for row in range(400)]
    written, picture = bucket_report.write(made, paths, tmp_path / "new", "a.csv")
    with open(written, newline="") as file:
        rows = list(csv.DictReader(file))
    placement = made.plan.placement
    assert [row["path"] for row in rows] == paths
    for number, row in enumerate(rows):
        bucket = placement[number]
        assert row["reason"] == ("" if bucket else REASONS[placement.outcome[number]])
        if bucket:
            assert (row["resolution"], int(row["num_frames"]), row["aspect_ratio"]) == bucket
            assert (int(row["height"]), int(row["width"])) == bucket.size[1:]
    picture = picture.read_text()
    assert all(f">{bucket}</text>" in picture for bucket in made.plan.buckets)
    ElementTree.fromstring(picture)
    assert picture.count("<rect") == 1 + 2 * (
        len(made.plan.buckets) + len(set(placement.outcome) - {RowOutcome.PLACED})
    )


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A table of 20 clips and a configuration for them."""
    lines = ["path,text,num_frames,width,height", *("a.mp4,words,20,256,144" for _ in range(19)), "b.mp4,words,,,"]
    clips, config = tmp_path / "clips.csv", tmp_path / "train.py"
    clips.write_text("\n".join(lines))
    config.write_text("model = dict(type='STDiT3-XL/2')\nbucket_config = {'144p': {17: (1.0, 4)}}\n")
    return clips, config


def run(files: tuple[Path, Path], tmp_path: Path, *flags: str) -> int:
    return main(["buckets", *map(str, files), "--save-dir", str(tmp_path / "out"), *flags])


def test_command(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(files, tmp_path, "--world-size", "2", "--epoch", "1") == 0
    text = capsys.readouterr().out
    assert "epoch 1, seed 1024, 2 rank(s)" in text
    assert "19 of 20 rows have a bucket, 1 have none" in text
    assert "1: num_frames, height or width is not known (rows 19)" in text
    assert "4 batches, 2 steps an epoch, 16 different rows served" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clips.buckets.csv", "clips.buckets.svg"]
    assert run(files, tmp_path, "--pad") == 0
    assert "5 batches, 5 steps an epoch, 19 different rows served" in capsys.readouterr().out


def test_command_refuses_a_run_without_steps(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(files, tmp_path, "--world-size", "8") == 1
    captured = capsys.readouterr()
    assert "0 steps an epoch" in captured.out
    assert "no steps: 4 batches are fewer than 8 ranks; use fewer ranks" in captured.err
    assert run(files, tmp_path, "--cfg-options", "bucket_config.144p={17: (1.0, 20)}") == 1
    captured = capsys.readouterr()
    assert "1 bucket(s) with 19 rows have no batch" in captured.out
    assert "the fullest, 144p 17f 0.56, has 19 of 20" in captured.err


@pytest.mark.parametrize(
    ("content", "flags", "problem"),
    [
        ("path,text\na.mp4,x\n", (), "has no column num_frames"),
        (None, (), "no such file or folder"),
        ("path,num_frames,height,width\n", (), "has no rows"),
        ("path,num_frames,height,width\na.mp4,20,144,256\n", ("--save-dir", "train.py/x"), "train.py"),
        ("path,num_frames,height,width\n", ("--world-size", "0"), "the world size must be an integer of at least 1"),
        ("path,num_frames,height,width\n", ("--cfg-options", "bucket_config=None"), "no bucket_config"),
        (
            "path,num_frames,height,width\n",
            ("--cfg-options", "dataset.frame_interval=0", "dataset.type=VideoTextDataset"),
            "interval",
        ),
    ],
)
def test_command_refuses_what_it_cannot_use(
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
    flags: Any,
    problem: str,
):
    monkeypatch.chdir(tmp_path)
    files[0].unlink()
    if content is not None:
        files[0].write_text(content)
    assert run(files, tmp_path, *flags) == 1
    assert problem in capsys.readouterr().err


def test_rows_are_placed_together_as_they_are_one_by_one(monkeypatch: pytest.MonkeyPatch):
    columns = table(1000)
    whole = Buckets(CONFIG).assign(*columns, seed=5, epoch=2)
    monkeypatch.setattr("opensora.datasets.bucket.CHUNK", 7)
    parts = Buckets(CONFIG).assign(*columns, seed=5, epoch=2)
    for name in ("entry", "ratio", "outcome"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert len(np.unique(whole.entry)) > 3
    np.testing.assert_array_equal(random_words(20, 5, 2, 0)[13:], random_words(7, 5, 2, 0, start=13))
