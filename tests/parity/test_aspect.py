"""Sizes, ratios and durations equal the recorded tables; names that were refused may be understood, never misread."""

from __future__ import annotations

from typing import Any

import pytest

from opensora.datasets import aspect
from opensora.errors import ConfigError
from tests.parity.cases import discover

CASES = [case for case in discover("data") if "closest_ratio" in case.facts or "get_image_size" in case.facts]


@pytest.fixture(params=CASES, ids=str)
def facts(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param.facts


def test_found() -> None:
    assert CASES


def test_kinds_are_known(facts: dict[str, Any]) -> None:
    tables = {"version", "v1.1.0", "resolutions", "aspect_ratio_names", "num_frames_names", "get_num_frames"}
    tables |= {"get_num_pixels", "get_image_size", "get_image_size_odd", "closest_ratio", "formula_h_w"}
    assert set(facts) <= tables | {"table_vs_formula_differences"}


def test_resolution_tables(facts: dict[str, Any]) -> None:
    for name, table in facts.get("resolutions", {}).items():
        assert aspect.get_num_pixels(name) == table["num_pixels"]
        assert [[key, *size] for key, size in aspect.SIZES[name].items()] == table["ratios"]


def test_names(facts: dict[str, Any]) -> None:
    for name, key, ratio in facts.get("aspect_ratio_names", []):
        assert aspect.ASPECT_RATIOS[name] == key
        assert float(aspect.parse_ratio(name)) == ratio
    for name, frames in facts.get("num_frames_names", {}).items():
        assert aspect.get_num_frames(name) == frames


def test_num_frames(facts: dict[str, Any]) -> None:
    for row in facts.get("get_num_frames", []):
        if "out" in row:
            assert aspect.get_num_frames(row["in"]) == row["out"], row
        else:
            check_refused_or_normalised(aspect.get_num_frames, row["in"], aspect.NUM_FRAMES)


def test_num_pixels(facts: dict[str, Any]) -> None:
    for row in facts.get("get_num_pixels", []):
        if "out" in row:
            assert aspect.get_num_pixels(row["in"]) == row["out"], row
        else:
            check_refused_or_normalised(aspect.get_num_pixels, row["in"], aspect.NUM_PIXELS)


def check_refused_or_normalised(function: Any, value: Any, table: dict[str, int]) -> None:
    """A2: case and spaces no longer matter; everything else that was refused still is."""
    name = "".join(str(value).lower().split())
    if name in table:
        assert function(value) == table[name]
    else:
        with pytest.raises(ConfigError):
            function(value)


@pytest.mark.parametrize("table", ["get_image_size", "get_image_size_odd"])
def test_image_size(facts: dict[str, Any], table: str) -> None:
    for row in facts.get(table, []):
        resolution, ratio = row["resolution"], row["aspect_ratio"]
        if "out" in row:
            assert list(aspect.get_image_size(resolution, ratio)) == row["out"], row
            continue
        name = str(resolution).lower()
        if name not in aspect.SIZES or ratio is None:
            with pytest.raises(ConfigError):
                aspect.get_image_size(resolution, ratio)
            continue
        # A1, A2: the nearest entry of the table
        height, width = aspect.get_image_size(resolution, ratio)
        wanted = float(aspect.parse_ratio(ratio))
        distances = {size: abs(float(key) - wanted) for key, size in aspect.SIZES[name].items()}
        assert distances[height, width] == min(distances.values()), row


def test_closest_ratio(facts: dict[str, Any]) -> None:
    for row in facts.get("closest_ratio", []):
        found = {name: aspect.closest_ratio(row["h"], row["w"], name) for name in row["closest"]}
        assert found == row["closest"], row


def test_formula(facts: dict[str, Any]) -> None:
    for row in facts.get("formula_h_w", []):
        assert list(aspect.formula_size(row["ratio"], row["pixels"])) == row["out"], row
    for name, rows in facts.get("table_vs_formula_differences", {}).items():
        ratios = {key: float(aspect.parse_ratio(ratio)) for ratio, key in aspect.ASPECT_RATIOS.items()}
        for row in rows:
            assert list(aspect.SIZES[name][row["key"]]) == row["table"]
            assert list(aspect.formula_size(ratios[row["key"]], aspect.NUM_PIXELS[name])) == row["formula"]


def test_older_versions_agree(facts: dict[str, Any]) -> None:
    older = facts.get("v1.1.0", {})
    assert set(older.get("identical_to_v1.2.0", [])) <= set(aspect.SIZES)
    assert not older.get("differing")
