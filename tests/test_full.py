"""Which cases of a test run by default."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests import full


def cases(name: str, number: int, marked: int | None) -> list[SimpleNamespace]:
    mark = None if marked is None else full.some(marked).mark
    return [SimpleNamespace(nodeid=f"{name}[{n}]", get_closest_marker=lambda _: mark) for n in range(number)]


@pytest.mark.parametrize(
    ("number", "marked", "kept"),
    [(9, 3, {0, 4, 8}), (2, 1, {0}), (2, 5, {0, 1}), (1, 1, {0}), (7, 2, {0, 6}), (3, None, {0, 1, 2})],
)
def test_some_cases_run_and_the_extremes_are_among_them(
    monkeypatch: pytest.MonkeyPatch, number: int, marked: int | None, kept: set[int]
) -> None:
    own, other = cases("a", number, marked), cases("b", 4, None)
    monkeypatch.setattr(full, "FULL", False)
    assert full.left_out([*own, *other]) == [one for n, one in enumerate(own) if n not in kept]
    monkeypatch.setattr(full, "FULL", True)
    assert full.left_out([*own, *other]) == []
