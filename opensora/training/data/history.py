"""What the folder of a run keeps of its data: the record of its items, and the list of unreadable files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from opensora.datasets.quarantine import Quarantine, UnreadableRow
from opensora.datasets.table import Table
from opensora.distributed.collectives import all_gather_objects
from opensora.distributed.process_group import RankLayout
from opensora.training.data.data_record import DataRecord, read_record


class DataHistory:
    """The data of a run, recorded in its folder.

    record: the items of the data, on the main rank
    table: whose files are read while training
    broken: rows of the table that this rank knows to be unreadable
    """

    def __init__(
        self, layout: RankLayout, record: DataRecord | None = None, table: Table | None = None,
        unreadable: Sequence[UnreadableRow] = (),
    ) -> None:  # fmt: skip
        self.layout, self.record, self.table, self.unreadable = layout, record, table, unreadable

    def explain_changes(self, folder: Path, fingerprint: Mapping[str, str]) -> dict[str, str]:
        """By fingerprint entry, what has changed since the run in `folder` saved its fingerprint, where known."""
        if self.record is None or (before := read_record(folder, self.record.kind)) is None:
            return {}
        name = {"row": "the table", "shard": "the features"}[self.record.kind]
        if before.digest != fingerprint.get(name) or not (changes := self.record.changes_since(before)):
            return {}
        return {name: f"{name} is another: {changes}"}

    def open(self, folder: Path, resumed_from: Path | None) -> Quarantine | None:
        """Records the data in the folder of a run; returns its quarantine, if files are read.

        All ranks call this together. Raises MediaError when too many files are known to be unreadable.
        """
        if self.record is not None:
            self.record.save(folder)
        if self.table is None:
            return None
        former = [] if resumed_from is None else [resumed_from]
        path = folder / "quarantine.jsonl"
        quarantine = Quarantine(path, len(self.table), table=self.table, former=former, writes=self.layout.is_main)
        quarantine.add(one for part in all_gather_objects(self.unreadable, self.layout) for one in part)
        return quarantine
