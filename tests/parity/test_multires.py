"""The size conditioning equals the recorded values, in the data type that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opensora.errors import ConfigError
from opensora.models.sizes import size_conditioning
from tests.parity.cases import discover

FIELDS = {"type", "batch_size", "image_size_h_w", "num_frames", "fps", "dtype"}
ROWS = [row for case in discover("data") for row in case.facts.get("cases", []) if "image_size_h_w" in row]


def describe(row: dict[str, Any]) -> str:
    height, width = row["image_size_h_w"]
    return f"{row['type']}-{row['batch_size']}x{row['num_frames']}x{height}x{width}-{row['dtype']}"


def test_found() -> None:
    assert ROWS


@pytest.mark.parametrize("row", ROWS, ids=describe)
def test_size_conditioning(row: dict[str, Any]) -> None:
    assert set(row) in (FIELDS | {"out"}, FIELDS | {"error"})
    dtype = getattr(torch, row["dtype"])
    arguments = (row["type"], row["batch_size"], tuple(row["image_size_h_w"]), row["num_frames"], row["fps"])
    if "error" in row:
        with pytest.raises(ConfigError):
            size_conditioning(*arguments, dtype=dtype)
        return
    found = size_conditioning(*arguments, dtype=dtype)
    assert set(found) == set(row["out"])
    for name, wanted in row["out"].items():
        assert found[name].dtype == getattr(torch, wanted["dtype"])
        assert list(found[name].shape) == wanted["shape"]
        assert found[name].double().tolist() == wanted["values"]


def test_float32_unless_asked_otherwise() -> None:
    """R1: the conditioning of a bfloat16 model is not rounded."""
    assert size_conditioning("STDiT2", 1, (480, 854), 51, 24)["width"].tolist() == [854.0]
