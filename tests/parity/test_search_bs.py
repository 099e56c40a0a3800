"""The searches of versions 1.2 and 1.1, trial by trial, and ours on the same devices."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from opensora.errors import ConfigError
from opensora.training.batch_size_search.search import (
    BucketResult,
    SearchPlan,
    Span,
    bisect,
    grid_search,
    make_plan,
    search,
)
from opensora.training.batch_size_search.search_model import ModelSearch
from opensora.training.batch_size_search.search_report import result_text
from tests.devices import Recorded
from tests.parity.cases import ROOT, needed

FACTS = json.loads((ROOT / "data" / "search_bs.json").read_text())
CASES = [pytest.param(case, id=case["name"]) for case in FACTS["cases"]]
FOUND = [param for param in CASES if "error" not in param.values[0]]
GRIDS = [pytest.param(case, id=case["name"]) for case in FACTS["v1.1.0"]["cases"]]


def plan_of(case: dict[str, Any]) -> SearchPlan:
    config = {
        resolution: {int(frames): tuple(pair) for frames, pair in table.items()}
        for resolution, table in case["bucket_config"].items()
    }
    return make_plan(config, case["base"], case["base_step_time"], case["resolution"])


def base_fails(case: dict[str, Any]) -> bool:
    """Z1: a base with batch size 0, after which the record has 0 everywhere."""
    return case["base_step_time"] is None and "error" not in case and case["result_lines"][0].split(", ")[2] == "0"


def recorded_line(one: BucketResult) -> str:
    return f"{one.span.resolution}, {one.span.num_frames}, {one.batch_size or 0}, {one.seconds:.2f}"


def test_kinds_are_known():
    assert set(FACTS) == {"version", "facts", "cases", "v1.1.0"}
    assert set(FACTS["v1.1.0"]) == {"facts", "bucket", "cases"}


@pytest.mark.parametrize("case", CASES)
def test_bisection(case: dict[str, Any]):
    device = Recorded(case)
    if "error" in case:
        with pytest.raises(ConfigError, match="base"):
            search(plan_of(case), device, bisect)
        assert device.probes == case["probes"] == []
    elif base_fails(case):
        with pytest.raises(ConfigError, match="has no batch size: "):
            search(plan_of(case), device, bisect)
        assert device.probes and device.probes == case["probes"][: len(device.probes)]
    else:
        found = search(plan_of(case), device, bisect)
        assert device.probes == case["probes"]
        assert [recorded_line(one) for one in found] == case["result_lines"]
        sizes = copy.deepcopy(case["bucket_config"])  # where nothing was searched the record has the pair itself
        for one in found:
            sizes[one.span.resolution][str(one.span.num_frames)] = one.batch_size or 0
        assert sizes == case["result_bucket_config"]


@pytest.mark.parametrize("case", FOUND)
def test_ours_finds_the_same(case: dict[str, Any]):
    if base_fails(case):
        with pytest.raises(ConfigError, match="has no batch size: "):
            search(plan_of(case), Recorded(case), ModelSearch())
        return
    found = search(plan_of(case), Recorded(case), ModelSearch())
    assert [recorded_line(one) for one in found] == case["result_lines"]


def test_ours_needs_half_of_the_trials():
    counts = []
    for case in (param.values[0] for param in FOUND):
        device = Recorded(case)
        if not base_fails(case):
            search(plan_of(case), device, ModelSearch())
            counts.append((case["number_of_probes"], len(device.probes)))
    theirs, ours = map(sum, zip(*counts, strict=True))
    assert ours <= (0.4 if theirs > 300 else 0.5) * theirs  # where there is little to search, little can be left out
    assert all(ours <= theirs / 2 for theirs, ours in counts if theirs > 5)


def told_case() -> dict[str, Any]:
    """The case whose log is recorded: the one with these result lines."""
    told = FACTS["facts"]["log_line_examples"][-2].splitlines()[2:]
    return needed([case for case in FACTS["cases"] if case.get("result_lines") == told], "case of its log lines")


def test_result_is_told_as_recorded():
    case, (*_, told, searched) = told_case(), FACTS["facts"]["log_line_examples"]
    text = result_text(plan_of(case), search(plan_of(case), Recorded(case), bisect))
    assert text == f"{told}\n{searched}"


def test_bounds_are_told_as_recorded(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "opensora")
    search(plan_of(told_case()), Recorded(told_case()), bisect)
    assert FACTS["facts"]["log_line_examples"][0] in caplog.messages


def test_a_small_table_is_told():
    """Z2: it counted as out of memory."""
    small = [case for case in FACTS["cases"] if case["dataset_samples_per_bucket"]]
    case = needed(small, "search in a small table")
    lines = result_text(plan_of(case), search(plan_of(case), Recorded(case), bisect)).splitlines()[2:-1]
    for recorded, line in zip(case["result_lines"], lines, strict=True):
        limited = any(probe[-1] == "too few batches" and recorded.startswith(f"{probe[0]}, {probe[1]},")
                      for probe in case["probes"])  # fmt: skip
        assert line.startswith(recorded) and ("limited by the rows of the table" in line) == limited


@pytest.mark.parametrize("case", GRIDS)
def test_grid(case: dict[str, Any]):
    device = Recorded(case)
    sizes = case["batch_size_in_config"]
    start, end, step = case["start"], case["end"], case["step"]
    if isinstance(sizes, list):  # [end], [start, end] or [start, end, step]
        start, end, step = {1: [start, *sizes, step], 2: [*sizes, step], 3: sizes}[len(sizes)]
    target = case["target_step_time"]
    found = grid_search(device, Span(*FACTS["v1.1.0"]["bucket"], start, end), target or math.inf, step)
    assert [probe[2:] for probe in device.probes] == case["probes"]
    if "error" in case:
        assert found.batch_size is None and found.limit == "memory"
    else:
        assert (found.batch_size, round(found.seconds, 6)) == (case["batch_size"], case["step_time"])
