"""The distribution of the values of a column, collected from a stream in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SAMPLE = 2**16  # values kept; quantiles and histograms of more values are estimates
BINS = 20
MAX_VALUES = 10_000  # different texts that are counted
MAX_KEY = 60  # characters of a text that is counted


class Bar(NamedTuple):
    """A bar of a histogram: a range or a value, and its share of the values."""

    label: str
    share: float


class NumberSeries:
    """Numbers: exact count, sum and range, and an evenly spaced sample of at least half of SAMPLE values."""

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0
        self.least, self.most = math.inf, -math.inf
        self._sample: list[float] = []
        self._stride = 1

    def add(self, value: float) -> None:
        if self.count % self._stride == 0:
            self._sample.append(value)
            if len(self._sample) > SAMPLE:
                self._sample, self._stride = self._sample[::2], 2 * self._stride
        self.count += 1
        self.total += value
        self.least, self.most = min(self.least, value), max(self.most, value)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def quantiles(self, *shares: float) -> list[float]:
        """The values below which these shares of the numbers lie."""
        return np.quantile(self._sample, shares).tolist() if self._sample else [math.nan] * len(shares)

    def bars(self) -> list[Bar]:
        """A bar per value if there are at most BINS of them, otherwise per range.

        BINS equal ranges reach from the 1 % to the 99 % quantile; numbers beyond are in the first and the last one.
        """
        values, counts = np.unique(np.array(self._sample), return_counts=True)
        if not len(values):
            return []
        if len(values) <= BINS:
            return _bars([f"{value:.6g}" for value in values], counts)
        low, high = self.quantiles(0.01, 0.99)
        if low == high:
            low, high = self.least, self.most
        edges = np.linspace(low, high, BINS + 1)
        counts = np.histogram(np.clip(self._sample, low, high), edges)[0]
        return _bars([f"{one:.4g} to {other:.4g}" for one, other in zip(edges, edges[1:], strict=False)], counts)


class TextSeries:
    """Texts by their number, as long as there are at most MAX_VALUES different ones."""

    def __init__(self) -> None:
        self.count = 0
        self.found: Counter[str] = Counter()
        self.many = False

    def add(self, text: str) -> None:
        self.count += 1
        if not self.many:
            self.found[text[:MAX_KEY]] += 1
            self.many = len(self.found) > MAX_VALUES

    def bars(self) -> list[Bar]:
        """The most frequent texts; none if most texts are different."""
        if self.many or not self.count or len(self.found) > max(1, self.count // 2):
            return []
        ordered = sorted(self.found.items(), key=lambda item: (-item[1], item[0]))[:BINS]
        return [Bar(text, number / self.count) for text, number in ordered]


def _bars(labels: Sequence[str], counts: np.ndarray) -> list[Bar]:
    return [Bar(label, share) for label, share in zip(labels, (counts / counts.sum()).tolist(), strict=True)]
