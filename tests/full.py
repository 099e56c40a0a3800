"""How many cases the large tests try: a few by default, all of them with OPENSORA_FULL=1, as the nightly run does."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable

import pytest

FULL = os.environ.get("OPENSORA_FULL") == "1"


def count(few: int, many: int) -> int:
    return many if FULL else few


def some(number: int) -> pytest.MarkDecorator:
    """Of a parametrized test whose cases take the same path, `number` run by default: the first, the last, and some
    evenly between them."""
    return pytest.mark.some(number)


def left_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The cases that do not run because of `some`."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not FULL and item.get_closest_marker("some"):
            cases[item.nodeid.partition("[")[0]].append(item)
    found = []
    for own in cases.values():
        (number,) = own[0].get_closest_marker("some").args
        kept = {round(n * (len(own) - 1) / max(number - 1, 1)) for n in range(number)}
        found += [item for n, item in enumerate(own) if n not in kept]
    return found
