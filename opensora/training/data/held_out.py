"""The clips of a table that are held out for validation, encoded once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from opensora.datasets.quarantine import UnreadableRow
from opensora.training.data.batch import TrainingBatch
from opensora.training.data.sources import TableSource, read_batch
from opensora.training.data.table_checks import Gather, single_rank

logger = logging.getLogger("opensora")


def encode_held_out(
    source: TableSource, encode: Callable[[dict[str, Any]], TrainingBatch], gather: Gather = single_rank
) -> tuple[list[tuple[str, TrainingBatch]], list[UnreadableRow]]:
    """The held-out batches of a source, encoded, in host memory, each with its bucket; and the unreadable files.

    No batches if no rank can read any of them. Warns of buckets without a readable clip.
    """
    host, dataset = torch.empty(0).device, source.dataset.at(0)
    batches, unreadable, own = [], [], set()
    for name, keys, size in source.held_out:
        batch = read_batch(dataset, keys, size)
        batches.append((name, encode(batch).to(host)))
        unreadable += batch["unreadable"]
        own |= {name} if batch["names"] else set()
    readable = set().union(*gather(own))
    if without := sorted({held.name for held in source.held_out} - readable):
        logger.warning("no validation of %s: none of the clips held out for it can be read", ", ".join(without))
    return batches if readable else [], unreadable
