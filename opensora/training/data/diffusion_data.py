"""The data of a diffusion model and its frozen encoders: rendered clips, a table of videos, or encoded features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from opensora import registry
from opensora.config.settings import TrainSettings
from opensora.datasets.datasets import VideoTextDataset
from opensora.datasets.quarantine import UnreadableRow
from opensora.datasets.synthetic.dataset import rendered_clips
from opensora.distributed.collectives import all_gather_objects, barrier, run_on_main
from opensora.distributed.process_group import RankLayout
from opensora.errors import ConfigError
from opensora.training.data import encoded
from opensora.training.data.batch import Encoders, Size, TrainingBatch
from opensora.training.data.clip_features import ClipSource, encode_clips, held_out_clips
from opensora.training.data.data_record import DataRecord, cells_of, record_of_features, record_of_table
from opensora.training.data.held_out import encode_held_out
from opensora.training.data.history import DataHistory
from opensora.training.data.loader import BatchSource
from opensora.training.data.sources import TableDataset, table_source
from opensora.training.data.table_checks import check_texts, missing_files, same_on_all_ranks

logger = logging.getLogger("opensora")
T = TypeVar("T")


class DiffusionData(NamedTuple):
    """What a run trains on.

    encode: turns a batch of the source into a TrainingBatch on the device
    sizes: (T, H, W) of the clips in frames and pixels, where known in advance
    model_kwargs: of a model that fits the encoders
    contents: what identifies the data and the encoders, by name, for the fingerprint
    held_out: clips for validation, in batches, each with the name of its bucket
    """

    source: BatchSource
    encode: Callable[[Any], TrainingBatch]
    sizes: list[Size]
    model_kwargs: dict[str, Any]
    contents: dict[str, str]
    history: DataHistory
    encoders: Encoders | None = None
    held_out: Sequence[tuple[str, TrainingBatch]] = ()
    reads_files: bool = False


def make_data(settings: TrainSettings, device: torch.device, layout: RankLayout) -> DiffusionData:
    """The data that the settings name, with its frozen encoders. Raises ConfigError if there is none to train on.

    Encodes rendered clips here, unless their features exist.
    """
    section = settings.dataset or {}
    if section.get("type") in registry.DATASETS:
        if settings.load_text_features or settings.load_video_features or section.get("dummy_text_feature"):
            problem = "a table gives videos and captions, no encoded features"
            raise ConfigError(f"{problem}; train on those with dataset = dict(type='EncodedDataset', data_path=FOLDER)")
        return _table(settings, device, layout)
    if section.get("type") in encoded.TYPES:
        return _features(settings, device, layout)
    return _rendered_clips(settings, section, device, layout)


def _features(settings: TrainSettings, device: torch.device, layout: RankLayout) -> DiffusionData:
    source = encoded.EncodedSource(settings, layout.data_size)
    run_on_main(lambda: encoded.refuse_other_encoders(source.dataset, settings), layout)
    record, digest = _record(lambda: record_of_features(source.dataset), layout)
    contents = {"the features": digest, **source.contents()}
    if settings.validate_every or settings.sample_every:
        logger.warning("validate_every and sample_every have no effect with encoded features")
    history = DataHistory(layout, record)
    return DiffusionData(source, _to(device), [], source.model_kwargs(), contents, history)


def _rendered_clips(
    settings: TrainSettings, section: dict[str, Any], device: torch.device, layout: RankLayout
) -> DiffusionData:
    if settings.batch_size is None:
        raise ConfigError("training on rendered clips needs a batch_size")
    clips = rendered_clips(section, settings.batch_size, section.get("seed", 0), "features", "num_clips")
    encoders = Encoders(settings, device, RankLayout())  # one rank encodes while the others wait: nothing is sharded
    source = _main_first(layout, lambda: ClipSource(clips, encode_clips(clips, settings, encoders), settings))
    sizes = [(one.num_frames, *one.image_size) for one in clips.sets if not one.continued]
    held_out, model_kwargs = held_out_clips(clips, settings, encoders), encoders.model_kwargs(sizes)
    history = DataHistory(layout)
    return DiffusionData(source, _to(device), sizes, model_kwargs, encoders.contents, history, encoders, held_out)


def _table(settings: TrainSettings, device: torch.device, layout: RankLayout) -> DiffusionData:
    """A table is checked before the encoders are loaded."""
    gather_all = partial(all_gather_objects, layout=layout)

    def check(dataset: TableDataset) -> list[UnreadableRow]:
        check_texts(dataset.table, dataset.captions)
        return missing_files(dataset.table, gather_all)

    source = table_source(settings, layout.data_size, check)
    table, cells = source.dataset.table, cells_of(source.dataset.table)
    same_on_all_ranks(cells, table.source, gather_all)
    record, digest = _record(lambda: record_of_table(table, cells), layout)
    encoders = Encoders(settings, device, layout)
    contents = {"the table": digest, **encoders.contents}
    sizes = [source.batches(0)[0][1]] if isinstance(source.dataset, VideoTextDataset) else []
    held_out, unreadable = encode_held_out(source, encoders.encode, gather_all)
    history = DataHistory(layout, record, table, [*source.unreadable, *unreadable])
    return DiffusionData(
        source, encoders.encode, sizes, encoders.model_kwargs(sizes), contents, history, encoders, held_out,
        reads_files=True,
    )  # fmt: skip


def _record(make: Callable[[], DataRecord], layout: RankLayout) -> tuple[DataRecord | None, str]:
    """The record of the data, on the main rank, and its digest, on every rank."""
    made: list[DataRecord] = []

    def digest() -> str:
        made.append(make())
        return made[0].digest

    found = run_on_main(digest, layout)
    return (made[0] if made else None), found


def _to(device: torch.device) -> Callable[[TrainingBatch], TrainingBatch]:
    return lambda batch: batch.to(device)


def _main_first(layout: RankLayout, make: Callable[[], T]) -> T:
    """`make()` on every rank, first on the main rank, which writes the files that all read."""
    made = make() if layout.is_main else None
    barrier(layout)
    return make() if made is None else made
