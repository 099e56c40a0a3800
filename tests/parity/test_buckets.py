"""Rows are placed as recorded, but for a clip of exactly the frames of an entry, and draws fall as often."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from typing import Any

import pytest

from opensora.datasets.bucket import Bucket, Buckets
from opensora.errors import ConfigError
from tests.full import count
from tests.parity.cases import ROOT

FACTS = json.loads((ROOT / "data" / "buckets.json").read_text())
TABLES = FACTS["deterministic"] | FACTS["statistics"]["configs"]
DRAWS = count(8_000, 20_000)
SIGMAS = 4.5  # several hundred shares are compared


def bucket_config(recorded: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a recorded one stands for: whole numbers for keys, tuples for lists."""
    return {
        resolution: {
            int(frames): (tuple(keep) if isinstance(keep, list) else keep, batch_size)
            for frames, (keep, batch_size) in entries.items()
        }
        for resolution, entries in recorded.items()
    }


def as_recorded(sample: list[int]) -> list[int]:
    """The sample for which we do what is recorded for `sample`: a video has to be one frame longer there."""
    frames, *others = sample
    return [frames if frames == 1 else frames - 1, *others] if frames != 2 else [0, *others]


def is_exact(config: dict[str, Any], case: list) -> bool:
    """Whether the clip has just the frames of an entry (B2): not enough for v1.2.0, enough for us."""
    return any(case[0] == frames * case[3] > 1 for entries in config.values() for frames in entries)


def placed(config: dict[str, Any], samples: list[list[int]], seed: int = 0) -> list[list | None]:
    """The bucket of each [T, H, W, frame interval]."""
    found: list[list | None] = [None] * len(samples)
    by_interval = defaultdict(list)
    for index, sample in enumerate(samples):
        by_interval[sample[3]].append(index)
    for interval, indices in by_interval.items():
        columns = zip(*(samples[index][:3] for index in indices), strict=True)
        placement = Buckets(config).assign(*columns, seed=seed, frame_interval=interval)
        for row, index in enumerate(indices):
            bucket = placement[row]
            found[index] = bucket and list(bucket)
    return found


def test_kinds_are_known():
    assert set(FACTS) == {"version", "deterministic", "statistics", "seeded_exact", "errors", "v1.1.0"}


@pytest.mark.parametrize("name", TABLES)
def test_entries(name: str):
    recorded = TABLES[name]
    buckets = Buckets(bucket_config(recorded["config"]))
    assert buckets.num_buckets == recorded["num_buckets"]
    order = [[entry.resolution, entry.num_frames] for entry in buckets.entries]
    assert order == recorded["order"]
    assert recorded["index_of"] == [[*pair, index] for index, pair in enumerate(order)]
    for lookup in [*recorded["lookups"], *recorded["lookups_two_element_id"]]:
        resolution, frames, *ratio = lookup["bucket_id"]
        entry = buckets.entries[order.index([resolution, frames])]
        keep = [entry.keep, entry.keep_frames] if isinstance(lookup["prob"], list) else entry.keep
        assert [keep, entry.batch_size] == [lookup["prob"], lookup["batch_size"]]
        if ratio:
            assert list(Bucket(resolution, frames, *ratio).size) == lookup["thw"]


@pytest.mark.parametrize("name", FACTS["deterministic"])
def test_cases(name: str):
    recorded = FACTS["deterministic"][name]
    config, cases = bucket_config(recorded["config"]), recorded["cases"]
    assert placed(config, [as_recorded(case[:4]) for case in cases]) == [case[5] for case in cases]
    others = [case for case in cases if not is_exact(config, case)]
    assert placed(config, [case[:4] for case in others]) == [case[5] for case in others]


@pytest.mark.parametrize("name", FACTS["statistics"]["configs"])
def test_shares(name: str):
    recorded = FACTS["statistics"]["configs"][name]
    buckets = Buckets(bucket_config(recorded["config"]))
    for number, case in enumerate(recorded["classes"]):
        frames, height, width, interval = as_recorded(case["sample"])
        placement = buckets.assign(
            *([value] * DRAWS for value in (frames, height, width)), seed=number, frame_interval=interval
        )
        found = Counter(placement[row] for row in range(DRAWS))
        shares = {bucket and Bucket(*bucket): share for bucket, share in case["freq"]}
        for bucket in {*found, *shares}:
            ours, theirs = found[bucket] / DRAWS, shares.get(bucket, 0.0)
            total = DRAWS + FACTS["statistics"]["n_draws"]
            pooled = (found[bucket] + theirs * FACTS["statistics"]["n_draws"]) / total
            sigma = math.sqrt(pooled * (1 - pooled) * (1 / DRAWS + 1 / FACTS["statistics"]["n_draws"]))
            assert abs(ours - theirs) <= SIGMAS * sigma, f"{case['sample']} in {bucket}: {ours}, recorded {theirs}"


@pytest.mark.parametrize("name", FACTS["seeded_exact"])
def test_seeded_cases_are_possible(name: str):
    """The draws themselves are others (B4), but every recorded bucket is one that some seed of ours leads to."""
    recorded = FACTS["seeded_exact"][name]
    buckets = Buckets(bucket_config(recorded["config"]))
    for case in recorded["cases"]:
        frames, height, width, interval = as_recorded(case[:4])
        tries = ([value] * 4000 for value in (frames, height, width))
        placement = buckets.assign(*tries, seed=0, frame_interval=interval)
        assert (case[5] and Bucket(*case[5])) in {placement[row] for row in range(4000)}, case


@pytest.mark.parametrize("case", FACTS["errors"], ids=lambda case: case["what"])
def test_errors(case: dict[str, Any]):
    config = bucket_config(case["config"])
    if "list instead of tuple" in case["what"]:
        config = {name: {int(n): tuple(pair) for n, pair in t.items()} for name, t in case["config"].items()}
    if "4K" in config:
        assert Buckets(config).entries[0].resolution == "4k"  # the documents write it so
    elif "error" not in case:
        assert placed(config, [case["sample"]]) == [case["out"]]
    elif case["seed"] is None:
        with pytest.raises(TypeError):
            placed(config, [case["sample"]], seed=case["seed"])
    else:
        with pytest.raises(ConfigError, match="keep probability"):
            Buckets(config)
