"""Reports how a bucket configuration divides a table: rows and batches per bucket, rows without one, steps per epoch.

Counts are those of one epoch; with keep probabilities below 1 they vary between epochs.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from opensora.config.settings import TrainSettings
from opensora.datasets.bucket import REASONS, Buckets, RowOutcome
from opensora.datasets.samplers import BucketBatchSampler, Epoch
from opensora.datasets.table import read_table
from opensora.errors import ConfigError
from opensora.files import atomic_write

MOST_EXAMPLES = 3
ROW_FIELDS = ("row", "path", "resolution", "num_frames", "aspect_ratio", "height", "width", "reason")
HEADS = ("bucket", "frames x height x width", "rows", "batch", "batches", "a rank", "dropped", "repeated")
BAR, LINE, LABEL, NUMBER = 420, 20, 330, 170  # pixels of the picture: widest bar, height of a line, texts beside it


def load(
    table: str | Path, settings: TrainSettings, *, world_size: int = 1, epoch: int = 0, pad: bool = False
) -> tuple[Sequence[str], BucketBatchSampler]:
    """The paths of a table, and the bucket sampler of an epoch under the training settings.

    `pad` completes batches and steps by repeating rows instead of dropping the rest. Raises ConfigError for an invalid
    table or configuration.
    """
    if not settings.bucket_config:
        raise ConfigError("the configuration has no bucket_config; name one for training with buckets")
    interval = (settings.dataset or {}).get("frame_interval", 1)
    for name, number, least in (("frame_interval", interval, 1), ("world size", world_size, 1), ("epoch", epoch, 0)):
        if type(number) is not int or number < least:
            raise ConfigError(f"the {name} must be an integer of at least {least}; it is {number!r}")
    rows = read_table(table)
    sampler = BucketBatchSampler(
        Buckets(settings.bucket_config),
        *rows.sizes(),
        seed=settings.seed,
        frame_interval=interval,
        drop_last=not pad,
        world_size=world_size,
    )
    sampler.set_epoch(epoch)
    return rows.path, sampler


def describe(sampler: BucketBatchSampler) -> str:
    """The report as text: table of buckets, reasons of rows without one, steps of the epoch."""
    plan, world_size = sampler.plan, sampler.world_size
    lines = [f"epoch {sampler.epoch}, seed {sampler.seed}, {world_size} rank(s)", "", *_bucket_lines(sampler)]
    num_placed, num_rows = int(plan.num_rows.sum()), len(plan.placement.outcome)
    lines += ["", f"{num_placed} of {num_rows} rows have a bucket, {num_rows - num_placed} have none", *_reasons(plan)]
    used = np.concatenate([sampler.rank_batches(rank) for rank in range(world_size)])
    served = np.unique(np.concatenate([plan[index][1] for index in used])).size if used.size else 0
    over = len(plan) - len(np.unique(used))
    starved = plan.num_rows[plan.num_batches == 0]
    if starved.size:
        lines.append(f"{starved.size} bucket(s) with {starved.sum()} rows have no batch; use smaller batches there")
    lines += ["", f"{len(plan)} batches, {len(sampler)} steps an epoch, {served} different rows served"]
    if over:
        lines.append(
            f"{over} batches at the end do not suffice for all ranks; training takes them first in the next epoch"
        )
    if used.size > len(plan):
        lines.append(f"{used.size - len(plan)} batches are repeated at the end, so that all ranks have one")
    return "\n".join(lines)


def write(sampler: BucketBatchSampler, paths: Sequence[str], folder: str | Path, table: str | Path) -> list[Path]:
    """Writes the rows (CSV) and the histogram (SVG), named after the table; returns the paths. Raises MediaError."""
    targets = [Path(folder) / f"{Path(table).absolute().stem}.buckets.{suffix}" for suffix in ("csv", "svg")]
    with atomic_write(*targets, make_folders=True) as [rows, picture]:
        write_rows(sampler, paths, rows)
        picture.write_text(picture_of(sampler), encoding="utf-8")
    return targets


def write_rows(sampler: BucketBatchSampler, paths: Sequence[str], target: Path) -> None:
    """Writes a CSV with one line per row: its bucket and size, or the reason for having none."""
    placement = sampler.plan.placement
    buckets, _, rows, group = placement.groups()
    cells = [(*bucket, *bucket.size[1:], "") for bucket in buckets] + [("",) * 5 + (text,) for text in REASONS.values()]
    kind = len(buckets) + placement.outcome.astype(int)  # REASONS has the order of RowOutcome
    kind[rows] = group
    with open(target, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(ROW_FIELDS)
        writer.writerows((row, path, *cells[which]) for row, (path, which) in enumerate(zip(paths, kind, strict=True)))


def picture_of(sampler: BucketBatchSampler) -> str:
    """A histogram as SVG: rows per bucket, and per reason for having none."""
    plan = sampler.plan
    bars = []
    for group in _order(plan):
        used = min(plan.num_batches[group] * plan.batch_sizes[group], plan.num_rows[group])
        bars.append((str(plan.buckets[group]), int(used), int(plan.num_rows[group] - used)))
    return _svg(bars + [(REASONS[outcome], 0, len(rows)) for outcome, rows in _without(plan)])


def _svg(bars: Sequence[tuple[str, int, int]]) -> str:
    """Horizontal bars of (label, rows used, rows not used)."""
    most = max((used + rest for _, used, rest in bars), default=1)
    width, height = LABEL + BAR + NUMBER, LINE * (len(bars) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="{LINE - 6}">rows of each bucket (grey: not served)</text>',
    ]
    for number, (label, used, rest) in enumerate(bars, 1):
        y, dark, light = number * LINE, BAR * used / most, BAR * rest / most
        text = f"{used + rest}" + (f", {rest} not served" if rest and used else "")
        parts += [
            f'<text x="{LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(_shortened(label))}</text>',
            f'<rect x="{LABEL}" y="{y + 3}" width="{dark:.1f}" height="{LINE - 6}" fill="#2b6cb0"/>',
            f'<rect x="{LABEL + dark:.1f}" y="{y + 3}" width="{light:.1f}" height="{LINE - 6}" fill="#bbb"/>',
            f'<text x="{LABEL + dark + light + 6:.1f}" y="{y + 14}">{text}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _shortened(label: str) -> str:
    return label if len(label) <= 52 else f"{label[:50]}..."


def _bucket_lines(sampler: BucketBatchSampler) -> list[str]:
    plan = sampler.plan
    ranks = [
        np.bincount(plan.group[sampler.rank_batches(rank)], minlength=len(plan.buckets))
        for rank in range(sampler.world_size)
    ]
    least, most = np.min(ranks, 0), np.max(ranks, 0)
    rows: list[tuple[str, ...]] = [HEADS]
    for group in _order(plan):
        bucket, num_rows, size = plan.buckets[group], plan.num_rows[group], plan.batch_sizes[group]
        used = plan.num_batches[group] * size
        share = f"{least[group]}" if least[group] == most[group] else f"{least[group]}-{most[group]}"
        counts = (num_rows, size, plan.num_batches[group], share, max(num_rows - used, 0), max(used - num_rows, 0))
        rows.append((str(bucket), "x".join(map(str, bucket.size)), *map(str, counts)))
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in zip(*rows, strict=True)]
    columns[0] = [cell.strip().ljust(len(cell)) for cell in columns[0]]
    return ["  ".join(cells) for cells in zip(*columns, strict=True)]


def _order(plan: Epoch) -> list[int]:
    """Bucket indices in the order of the configuration, then by ratio."""
    order = {(entry.resolution, entry.num_frames): index for index, entry in enumerate(plan.placement.entries)}
    return sorted(range(len(plan.buckets)), key=lambda g: (order[plan.buckets[g][:2]], float(plan.buckets[g].ratio)))


def _without(plan: Epoch) -> list[tuple[RowOutcome, np.ndarray]]:
    """(outcome, rows) of the rows without a bucket."""
    found = [(outcome, np.flatnonzero(plan.placement.outcome == outcome)) for outcome in REASONS]
    return [(outcome, rows) for outcome, rows in found if len(rows)]


def _reasons(plan: Epoch) -> list[str]:
    lines = []
    for outcome, rows in _without(plan):
        examples = ", ".join(map(str, rows[:MOST_EXAMPLES])) + (", ..." if len(rows) > MOST_EXAMPLES else "")
        lines.append(f"  {len(rows)}: {REASONS[outcome]} (rows {examples})")
    return lines
