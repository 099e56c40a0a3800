"""Batches are dealt as recorded where nothing is drawn; what is shuffled or drawn has the recorded counts.

Where v1.2.0 loses samples or serves empty batches (S1, S2) there are more batches here, so its order is compared with
ours less the batches of the buckets that it loses. Its own draws (`fractional`) cannot be had: see test_buckets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from opensora.datasets.bucket import Bucket, Buckets
from opensora.datasets.samplers import BucketBatchSampler, FeatureBufferSampler, SampleSampler
from opensora.errors import ConfigError
from tests.parity.cases import ROOT, needed
from tests.parity.test_buckets import bucket_config

FACTS = json.loads((ROOT / "data" / "sampler.json").read_text())
TABLES = FACTS["datasets_num_frames_height_width"]
CASES = FACTS["cases"]
RESUMED = [(case, then) for case in FACTS["resume"] for then in case["resume"]]
DRAWN = "fractional"
SETTINGS = ("world_size", "drop_last", "shuffle", "seed", "frame_interval")


def name(case: dict[str, Any]) -> str:
    ends, order = "drop" if case["drop_last"] else "pad", "shuffled" if case["shuffle"] else "as is"
    return f"{case['dataset_ref']}-{case['config']}-{case['world_size']}-{ends}-{order}-{case['epoch']}"


def split(case: dict[str, Any]) -> dict[str, Any]:
    """A resumed case in the words of the others."""
    table, config = case["name"].split("/")
    return case | {"dataset_ref": table, "config": config}


def sampler(case: dict[str, Any], **settings: Any) -> BucketBatchSampler:
    buckets = Buckets(bucket_config(FACTS["configs"][case["config"]]))
    given = {key: case[key] for key in SETTINGS if key in case} | settings
    made = BucketBatchSampler(buckets, *zip(*TABLES[case["dataset_ref"]], strict=True), **given)
    made.set_epoch(case.get("epoch", 0))
    return made


def order(made: BucketBatchSampler) -> list[list[str]]:
    """All batches in their common order: what one rank would get."""
    alone = BucketBatchSampler(
        made.buckets, *made.columns, seed=made.seed, frame_interval=made.frame_interval, shuffle=made.shuffle,
        drop_last=made.drop_last,
    )  # fmt: skip
    alone.set_epoch(made.epoch)
    return list(alone)


def on_all_ranks(case: dict[str, Any], state: dict[str, int] | None = None, **settings: Any) -> list[list[list[str]]]:
    """The batches of each rank."""
    ranks = []
    for rank in range(settings.get("world_size", case["world_size"])):
        made = sampler(case, rank=rank, **settings)
        if state:
            made.load_state_dict(state)
        ranks.append(list(made))
        assert len(ranks[-1]) == len(made)
    return ranks


def lost_there(made: BucketBatchSampler) -> set[str]:
    """`-T-H-W` of buckets that v1.2.0 loses although they should be completed: those of less than half a batch (S2)."""
    if made.drop_last:
        return set()
    plan = made.plan
    few = [2 * rows < size for rows, size in zip(plan.num_rows, plan.batch_sizes, strict=True)]
    return {shape(bucket) for bucket, lost in zip(plan.buckets, few, strict=True) if lost}


def shape(bucket: Bucket) -> str:
    return "".join(f"-{part}" for part in bucket.size)


def without(batches: list[list[str]], lost: set[str]) -> list[list[str]]:
    return [batch for batch in batches if not any(batch[0].endswith(end) for end in lost)]


def steps(batches: int, case: dict[str, Any], world_size: int) -> int:
    return batches // world_size if case["drop_last"] else -(-batches // world_size)


def deal_again(batches: Sequence, world_size: int) -> list:
    """Each rank's share of an order that is dropped at its end."""
    return [list(batches[rank : len(batches) // world_size * world_size : world_size]) for rank in range(world_size)]


def test_kinds_are_known():
    listed = {"version", "configs", "datasets_num_frames_height_width", "cases", "resume", "epochs", "quirks"}
    listed |= {"state_dict_example", "index_encoding", "stateful_sample_sampler", "feature_buffer_sampler"}
    assert set(FACTS) == listed | {"state_dict_of_stateful_at_step_5", "v1.1.0"}


@pytest.mark.parametrize("case", [case for case in CASES if case["config"] != DRAWN], ids=name)
def test_groups(case: dict[str, Any]):
    plan = sampler(case).plan
    ours = dict(zip(plan.buckets, plan.num_rows.tolist(), strict=True))
    assert ours == {Bucket(*bucket): rows for bucket, rows in case["groups"]}
    if not case["shuffle"]:
        assert [list(bucket) for bucket in plan.buckets] == [bucket for bucket, _ in case["groups"]]
    assert sum(ours.values()) == case["samples_assigned"]


@pytest.mark.parametrize("case", [case for case in CASES if case["config"] != DRAWN], ids=name)
def test_batches(case: dict[str, Any]):
    made, world_size = sampler(case), case["world_size"]
    ranks, whole = on_all_ranks(case), order(made)
    there = without(whole, lost_there(made))
    if case["drop_last"]:
        dealt = deal_again(there, world_size)
        served = [batch for batches in ranks for batch in batches]
        assert [len(batches) for batches in ranks] == case["batches_per_rank"]
        assert len(made) == case["len"]  # S3, S4: right there only where remainders are dropped
    else:
        served = there if sum(case["batches_per_rank"]) else []
        dealt = [there[rank::world_size] if served else [] for rank in range(world_size)]  # S1 pads with empty ones
        assert [len(batches) for batches in ranks] == [steps(len(whole), case, world_size)] * world_size
        if there and 2 * len(there) >= world_size:
            assert steps(len(there), case, world_size) == case["batches_per_rank"][0]
        else:
            assert not any(case["batches_per_rank"])  # S2
    if "batches" in case:
        assert dealt == [[batch for batch in batches if batch] for batches in case["batches"]]
    check_counts(case, served)
    if "samples_per_rank" in case:
        assert [sum(map(len, batches)) for batches in dealt] == case["samples_per_rank"]


def check_counts(case: dict[str, Any], served: list[list[str]]) -> None:
    times = Counter(index.split("-")[0] for batch in served for index in batch)
    shapes = Counter((batch[0].partition("-")[2], len(batch)) for batch in served)
    if "batch_shape_counts" in case:
        assert sorted([*key, count] for key, count in shapes.items()) == sorted(case["batch_shape_counts"])
    if "distinct_samples_served" in case:
        assert len(times) == case["distinct_samples_served"]
    if "total_samples_served" in case:
        assert sum(times.values()) == case["total_samples_served"]
    assert sum(count > 1 for count in times.values()) == case["samples_served_more_than_once"]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_batch_has_one_bucket_and_is_full(case: dict[str, Any]):
    made = sampler(case)
    plan, sizes = made.plan, {}
    for bucket, size in zip(plan.buckets, plan.batch_sizes, strict=True):
        sizes[shape(bucket)] = size
    for batches in on_all_ranks(case):
        for batch in batches:
            rows, ends = zip(*((int(i.split("-")[0]), i[i.index("-") :]) for i in batch), strict=True)
            assert len(set(ends)) == 1 and len(batch) == sizes[ends[0]]
            assert {shape(plan.placement[row]) for row in rows} == set(ends)


@pytest.mark.parametrize("case", [c for c in CASES if not c["drop_last"] and c["config"] != DRAWN], ids=name)
def test_padding_serves_every_placed_row(case: dict[str, Any]):
    served = {index.split("-")[0] for batches in on_all_ranks(case) for batch in batches for index in batch}
    assert len(served) == sum(rows for _, rows in case["groups"])


@pytest.mark.parametrize(("case", "then"), RESUMED, ids=lambda value: value.get("name", value.get("k")))
def test_resume(case: dict[str, Any], then: dict[str, Any]):
    case = split(case)
    before, after, k = case["world_size"], then["resume_world_size"], then["k"]
    made = sampler(case)
    assert made.state_dict(k) == then["state_dict"]
    whole, full = order(made), on_all_ranks(case)
    rest = on_all_ranks(case, then["state_dict"], world_size=after)
    position = then["state_dict"]["last_micro_batch_access_index"]
    assert [len(batches) for batches in rest] == [steps(len(whole) - position, case, after)] * after
    if before == after:
        assert rest == [batches[k:] for batches in full] and then["remaining_identical_to_uninterrupted_run"]
        if case["config"] != DRAWN and not lost_there(made):
            assert [len(batches) for batches in full] == case["full_batches_per_rank"]
            assert [len(batches) for batches in rest] == then["batches_per_rank_after_resume"]
    if rest[0]:  # no rounding down to the number of ranks, nothing repeated
        assert rest[0][0] == whole[position]
    assert then["first_micro_batch_served"] == position // after * after
    assert then["micro_batches_repeated"] == position % after


def test_epochs_differ():
    firsts = [next(iter(sampler(case))) for case in FACTS["epochs"]]
    whole = [list(sampler(case, world_size=1)) for case in FACTS["epochs"]]
    assert all(first == batches[0] for first, batches in zip(firsts, whole, strict=True))
    assert len({json.dumps(batches) for batches in whole}) > 1


def test_state():
    example = FACTS["state_dict_example"]
    any_rows = {"config": next(one for one in FACTS["configs"] if one != DRAWN), "dataset_ref": next(iter(TABLES))}
    made = sampler(any_rows, seed=example["seed"])
    made.world_size = example["world_size"]
    made.set_epoch(example["epoch"])
    assert made.state_dict(example["steps"]) == example["state"]
    again = sampler(any_rows)
    again.load_state_dict(example["state"])
    assert again.state_dict() == example["attributes_after_load"]


def test_index_encoding():
    for row in FACTS["index_encoding"]:
        assert row["string"] == f"{row['sample']}{shape(Bucket(*row['bucket']))}"


def test_position_beyond_the_end():
    case = FACTS["quirks"]["position_beyond_end_of_epoch"]
    made = sampler(case)
    made.load_state_dict(made.state_dict(case["steps_in_state"]))
    position = case["steps_in_state"] * case["world_size"]
    with pytest.raises(ConfigError, match=f"position {position} is past the {len(order(sampler(case)))} items"):
        list(made)


def test_length_counts_data_parallel_ranks():
    """S3: the ranks given are those that share the data, so the length is what is served."""
    case = FACTS["quirks"]["len_uses_global_world_size_not_data_parallel_size"]
    rows = {"config": case.get("config", "mixed"), "dataset_ref": case.get("dataset_ref", "mixed_200")}
    needed([True] * (rows["config"] in FACTS["configs"] and rows["dataset_ref"] in TABLES), "rows of that quirk")
    made = sampler(rows, world_size=case["data_parallel_size"])
    assert len(made) == case["batches_actually_served_per_rank"] > case["len"]


def stateful_id(case: dict[str, Any]) -> str:
    return f"{case['n']}-{case['world_size']}-{case['drop_last']}-{case['loaded_state']}"


@pytest.mark.parametrize("case", FACTS["stateful_sample_sampler"], ids=stateful_id)
def test_sample_sampler(case: dict[str, Any]):
    for rank, (length, indices) in enumerate(case["len_and_indices_per_rank"]):
        settings = {key: case[key] for key in ("world_size", "drop_last", "shuffle")}
        made = SampleSampler(case["n"], rank=rank, **settings)
        made.load_state_dict(case["loaded_state"])
        if "error" in length:
            with pytest.raises(ConfigError, match="is past"):
                len(made)
        else:
            assert len(made) == length["out"]
            assert list(made) == indices


def test_sample_sampler_state():
    """S7: the state counts samples; one at step 5 with batches of 1 is what is recorded."""
    assert SampleSampler(9).state_dict(5)["start_index"] == FACTS["state_dict_of_stateful_at_step_5"]["start_index"]


def buffers_id(case: dict[str, Any]) -> str:
    return f"{case['buffers']}-{case['loaded_state']}"


@pytest.mark.parametrize("case", FACTS["feature_buffer_sampler"], ids=buffers_id)
def test_feature_buffer_sampler(case: dict[str, Any]):
    for rank, recorded in enumerate(case["indices_per_rank"]):
        made = FeatureBufferSampler(case["buffer_length"], case["buffers"], rank=rank, world_size=case["world_size"])
        if case["loaded_state"]:
            made.load_state_dict(case["loaded_state"])
            recorded = [recorded[0] - 1, *recorded]  # S8: the first sample that was not served is left out there
        assert list(made) == recorded and len(made) == len(recorded)
