"""Cleaned texts equal the recorded ones, letter for letter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from opensora.models.text_encoder.cleaning import clean, normalize, preprocess
from tests.parity.cases import discover

FUNCTIONS = {"clean_once": clean, "preprocessed": preprocess, "no_cleaning": normalize}
ROWS = [row for case in discover("data") for row in case.facts.get("cases", []) if "preprocessed" in row]


def test_found() -> None:
    assert ROWS


def test_kinds_are_known() -> None:
    assert {field for row in ROWS for field in row} <= {"in", *FUNCTIONS}


@pytest.mark.parametrize(("field", "function"), FUNCTIONS.items(), ids=[*FUNCTIONS])
def test_cleaning(field: str, function: Callable[[str], str]) -> None:
    different = [(row["in"], function(row["in"]), row[field]) for row in ROWS if function(row["in"]) != row[field]]
    assert not different
