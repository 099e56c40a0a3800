"""The search with few trials: models time and memory of a step as linear in the batch size, over all buckets at once.

seconds = a + s n and memory = m + u n for n samples, where a and m are common to all buckets, and s and u are roughly
proportional to the size of a sample. Each trial is at the predicted limit and refines the fit. A bucket is done when a
size is good and the next one is not, by a trial or by a prediction with enough confidence.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import numpy as np

from opensora.training.batch_size_search.search import (
    BucketResult,
    NoData,
    Outcome,
    OutOfMemory,
    Probe,
    Span,
    Step,
    limit_of,
    meets_target,
)

SIZE_SPREAD = 0.2  # relative standard deviation of slope / tokens among buckets
KIND_SPREAD = 0.7  # the same between images and videos, where the token estimate fits less well
BASE_SHARE = 0.3  # prior standard deviation of the common base, relative to the smallest value
TIME_NOISE, MEMORY_NOISE = 0.03, 0.003  # relative standard deviation of one trial
CLOSE = 0.98  # of the target time is close enough after a first trial in the bucket
SURE = 3.0  # standard deviations above the memory limit that make a trial unnecessary
SURE_OF_OTHERS = 1.25  # the same where memory is unknown: times the tokens that failed in another bucket
GUESSES = 5  # trials in a bucket before bisection
STRIDE = 0.03  # of the batch size: least step after two trials with one outcome; doubles every time

Points = dict[Span, dict[int, float]]
Row = Mapping[Hashable, float]


class LinearFit:
    """Fits value = base + slope n, for n samples of a span, to `points` with relative errors `noise`.

    The base is shared by all spans; slope / tokens is similar. Bayesian linear regression with normal priors (Bishop
    2006, Pattern Recognition and Machine Learning, section 3.3).
    """

    def __init__(self, points: Points, noise: float) -> None:
        flat = [(span, n, value) for span, sizes in points.items() for n, value in sizes.items()]
        self.columns = {key: number for number, key in enumerate(["base", "all", "images", *points])}
        per_token = float(np.median([value / (n * span.tokens) for span, n, value in flat]))
        least = min(value for *_, value in flat)
        priors: dict[Hashable, float] = {"base": BASE_SHARE * least, "images": KIND_SPREAD * per_token}
        priors |= dict.fromkeys(points, SIZE_SPREAD * per_token)
        self.spread_of_new = SIZE_SPREAD * per_token
        rows = [self._row(_parts(span, n)) / (noise * value) for span, n, value in flat]
        rows += [self._row({key: 1.0}) / spread for key, spread in priors.items()]
        wanted = np.array([1 / noise] * len(flat) + [1.0] + [0.0] * (len(priors) - 1))
        self.solution, self.covariance = _solve(np.array(rows), wanted)

    def _row(self, parts: Row) -> np.ndarray:
        row = np.zeros(len(self.columns))
        for key, value in parts.items():
            if key in self.columns:
                row[self.columns[key]] = value
        return row

    def at(self, span: Span, n: int) -> float:
        return float(self._row(_parts(span, n)) @ self.solution)

    def deviation(self, span: Span, n: int) -> float:
        """The standard deviation of `at`."""
        row = self._row(_parts(span, n))
        unknown = 0.0 if span in self.columns else n * span.tokens * self.spread_of_new
        return math.sqrt(max(float(row @ self.covariance @ row), 0.0) + unknown**2)

    def reach(self, span: Span, limit: float) -> float:
        """The number of samples at which the value is `limit`."""
        base = self.at(span, 0)
        slope = self.at(span, 1) - base
        return (limit - base) / slope if slope > 0 else math.inf


def _parts(span: Span, n: int) -> Row:
    """The coefficients of the unknowns in the value of n samples."""
    size = n * span.tokens
    row: dict[Hashable, float] = {"base": 1.0, "all": size, span: size}
    return row | {"images": size} if span.num_frames == 1 else row


def _solve(matrix: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least-squares solution and its covariance; columns are normalized first."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    inverse = np.linalg.pinv(matrix / scale)
    return inverse @ wanted / scale, (inverse @ inverse.T) / np.outer(scale, scale)


class ModelSearch:
    """A method for `search.search` that learns from each bucket for the next ones."""

    def __init__(self) -> None:
        self.seconds: Points = {}
        self.memory: Points = {}
        self.failed: dict[Span, int] = {}  # the smallest size that was out of memory

    def __call__(self, probe: Probe, span: Span, target: float) -> BucketResult:
        ok, bad, limit = span.lower - 1, span.upper + 1, "range"
        outcomes: list[bool] = []
        while bad - ok > 1:
            if ok >= span.lower and (ahead := self.blocked(span, ok + 1, target, len(outcomes))):
                limit = ahead
                break
            if bad <= span.upper and ok >= span.lower and bad - 1 <= ok / CLOSE:
                break
            size = self.choose(span, ok, bad, target, outcomes)
            outcome = probe(span, size)
            self.learn(span, size, outcome)
            outcomes.append(meets_target(outcome, target))
            if outcomes[-1]:
                ok = size
            else:
                bad, limit = size, limit_of(outcome)
            if isinstance(outcome, NoData):
                bad = max(min(bad, outcome.most + 1), ok + 1)
                outcomes.pop()
        if ok < span.lower:
            return BucketResult(span, None, 0.0, limit)
        return BucketResult(span, ok, self.seconds[span][ok], limit)

    def learn(self, span: Span, size: int, outcome: Outcome) -> None:
        if isinstance(outcome, Step):
            self.seconds.setdefault(span, {})[size] = outcome.seconds
            if outcome.memory is not None:
                self.memory.setdefault(span, {})[size] = outcome.memory
        if isinstance(outcome, OutOfMemory):
            self.failed[span] = min(size, self.failed.get(span, size))

    def choose(self, span: Span, ok: int, bad: int, target: float, outcomes: list[bool]) -> int:
        """The next size to try, between `ok` and `bad`: where the limit is expected, with growing strides."""
        if len(outcomes) >= GUESSES and len(outcomes) % 2 and outcomes.count(True) not in (0, len(outcomes)):
            return (ok + bad) // 2
        size = self.expected(span, ok, bad, target)
        same = 0
        while same < len(outcomes) and outcomes[-1 - same] == outcomes[-1]:
            same += 1
        if same > 1 and not outcomes[-1]:
            size = min(size, int(bad * (1 - STRIDE * 2 ** (same - 2))))
        elif same > 1 and (size > ok or not self.memory):
            size = max(size, math.ceil(ok * (1 + STRIDE * 2 ** (same - 2))))
        return min(max(size, ok + 1), bad - 1)

    def expected(self, span: Span, ok: int, bad: int, target: float) -> int:
        """The size most likely to be the largest good one."""
        edge = self.memory_reach(span)
        if target < math.inf and self.seconds:
            edge = min(edge, LinearFit(self.seconds, TIME_NOISE).reach(span, target))
        elif edge == math.inf:  # nothing is known: the middle, then the end
            return bad - 1 if self.seconds else (ok + bad) // 2
        return bad - 1 if edge >= bad else math.ceil(edge) - 1

    def memory_reach(self, span: Span) -> float:
        """The predicted number of samples at which memory is full; infinity if unknown."""
        if self.memory:
            lines, wall = self.memory_fit()
            return lines.reach(span, wall)
        fits, fails = self.bounds(span)
        return (fits + fails) / 2 / span.tokens if fits < fails else math.sqrt(fits * fails) / span.tokens

    def memory_fit(self) -> tuple[LinearFit, float]:
        """The fitted memory, and the share at which steps fail: 1, or the lowest at which one failed."""
        lines = LinearFit(self.memory, MEMORY_NOISE)
        known = [(span, n) for span, n in self.failed.items() if len(self.memory.get(span, ())) > 1]
        return lines, min([1.0, *(lines.at(span, n) for span, n in known)])

    def bounds(self, span: Span) -> tuple[float, float]:
        """The most tokens that fitted and the fewest that failed, in buckets of its kind (or, if none, the other)."""
        fits = {other: max(sizes) for other, sizes in self.seconds.items()}
        for image in (span.num_frames == 1, span.num_frames != 1):
            fitted, failed = (
                [n * other.tokens for other, n in sizes.items() if (other.num_frames == 1) == image]
                for sizes in (fits, self.failed)
            )
            if failed:
                return max(fitted, default=0.0), min(failed)
        return 0.0, math.inf

    def blocked(self, span: Span, size: int, target: float, trials: int) -> str | None:
        """What a size will fail at, if that is certain enough without a trial: "memory", "time" or None."""
        if target < math.inf:
            lines = LinearFit(self.seconds, TIME_NOISE)
            near = trials > 1 and lines.at(span, size - 1) >= CLOSE * target
            if near or lines.at(span, size) >= target:
                return "time"
        if self.memory:
            lines, wall = self.memory_fit()
            return "memory" if lines.at(span, size) - SURE * lines.deviation(span, size) > wall else None
        failed = [n * o.tokens for o, n in self.failed.items() if (o.num_frames == 1) == (span.num_frames == 1)]
        return "memory" if failed and size * span.tokens >= SURE_OF_OTHERS * min(failed) else None
