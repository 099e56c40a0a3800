"""Training of a diffusion model: its parts put together, and the loss of a step."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora import registry
from opensora.acceleration.device import DTYPES, keep_allocations_in_heap, pick_device, place
from opensora.checkpoints import builder
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.save import save_pretrained
from opensora.config.settings import TrainSettings, check_trainable
from opensora.datasets.datasets import VideoTextDataset
from opensora.datasets.quarantine import Broken, Quarantine
from opensora.datasets.synthetic.dataset import shape_clips
from opensora.distributed import peers
from opensora.distributed.fsdp import Layout, barrier, gather, of_main, one_voice, start
from opensora.distributed.full_state_dict import whole
from opensora.distributed.parallelize import parallelize
from opensora.errors import ConfigError
from opensora.models.layers.transformer import FixedPositions
from opensora.training.callbacks import held_out, watches
from opensora.training.checkpoint.fingerprint import fingerprint
from opensora.training.data import encoded
from opensora.training.data.batch import Encoders, Examples
from opensora.training.data.clip_features import ClipSource, encode_clips, held_clips
from opensora.training.data.data_record import DataRecord, cells_of, read_record, record_of_features, record_of_table
from opensora.training.data.loader import Feed, Source
from opensora.training.data.sources import table_source
from opensora.training.data.table_checks import check_texts, missing_files, same_on_all_ranks
from opensora.training.data.turns import Turns
from opensora.training.masks import MaskRatios
from opensora.training.run_folder import publish, refuse_a_second
from opensora.training.throughput import StepCost
from opensora.training.trainer import Trainer

logger = logging.getLogger("opensora")
Size = tuple[int, int, int]
Prepare = Callable[[Any, torch.Generator], Examples]

FIRST_HALF = MaskRatios({"half_head": 1.0})


class Data(NamedTuple):
    """What a run learns from.

    prepare: makes examples on the device of what the source reads
    sizes: (T, H, W) of the clips in frames and pixels, where they are known in advance
    keywords: of a model that fits the encoders
    contents: what identifies the data and the encoders
    held: clips that are never trained on, and the bucket of each batch of them
    broken: rows that are known to give no sample
    record: of what it learns from, item by item, on the main rank
    """

    source: Source
    prepare: Prepare
    sizes: list[Size]
    keywords: dict[str, Any]
    contents: dict[str, str]
    encoders: Encoders | None = None
    held: Sequence[tuple[str, Examples]] = ()
    broken: Sequence[Broken] = ()
    record: DataRecord | None = None
    reads_files: bool = False


@one_voice()
def train(settings: TrainSettings) -> Path:
    """Trains as the settings say; returns the last checkpoint, or the averaged model's folder once all is done."""
    check_trainable(settings)
    scheduler, ratios = check_training(settings)
    keep_allocations_in_heap()
    device = pick_device(settings.device)
    layout = start(device, settings.sp_size, peers.timeout())
    of_main(lambda: refuse_a_second(settings), layout)
    data = make_data(settings, device, layout)
    model = build_model(settings, data, device)
    parallelize(model, layout, DTYPES[settings.dtype], settings.grad_checkpoint, settings.compile)
    feed = Feed(data.source, layout.data_rank, layout.data_size, settings.num_workers if data.reads_files else 0)
    loss, cost = DiffusionLoss(model, scheduler, ratios, data.prepare), StepCost(model, settings.model["type"])

    def work() -> tuple[float, ...]:
        latents, cond = loss.examples.latents, loss.examples.cond
        return len(loss.examples.names), *cost(latents, {**cond, "y": _rounded(cond["y"])})

    prints = fingerprint(settings, **data.contents)
    trainer = Trainer(settings, model, loss, device, feed, layout, prints, work, partial(changed_items, data.record))
    if data.record is not None:
        data.record.save(trainer.folder)
    if data.reads_files:
        trainer.turns = Turns(layout, quarantine_of(trainer, data, layout))
    if data.encoders is not None:
        size = data.sizes[0] if data.sizes else data.source.batches(0)[0][1]  # of the samples
        trainer.watches += watches(settings, model, scheduler, data.held, data.encoders, size, layout)
    folder = trainer.run()
    return finish(settings, model, trainer, layout) if trainer.finished else folder


def quarantine_of(trainer: Trainer, data: Data, layout: Layout) -> Quarantine:
    """The broken files of the run as far as they are known. MediaError if they are more than may be."""
    table, former = data.source.dataset.table, [] if trainer.origin is None else [trainer.origin]
    path = trainer.folder / "quarantine.jsonl"
    quarantine = Quarantine(path, len(table), table=table, former=former, writes=layout.is_main)
    quarantine.add(one for part in gather(data.broken, layout) for one in part)
    return quarantine


def changed_items(record: DataRecord | None, folder: Path, saved: Mapping[str, str]) -> dict[str, str]:
    """What has changed in the data since a run in `folder` saved its fingerprint, in words where that is known."""
    told = {}
    if record is not None and (before := read_record(folder, record.kind)) is not None:
        name = {"row": "the table", "shard": "the features"}[record.kind]
        if before.digest == saved.get(name) and (changes := record.changes_since(before)):
            told = {name: f"{name} is another: {changes}"}
    return told


def check_training(settings: TrainSettings) -> tuple[Any, MaskRatios | None]:
    """The scheduler and the frame masks of the settings. Raises ConfigError for what cannot be trained."""
    if settings.scheduler is None:
        raise ConfigError("training a diffusion model needs a scheduler")
    scheduler = registry.build(settings.scheduler)
    if not hasattr(scheduler, "training_loss"):
        name = settings.scheduler["type"]
        raise ConfigError(f"scheduler '{name}' only samples; train with rflow, iddpm or iddpm-speed")
    registry.check_type("model", settings.model["type"], registry.MODELS)
    ratios = None if settings.mask_ratios is None else MaskRatios(settings.mask_ratios)
    if ratios and "x_mask" not in inspect.signature(registry.builder(settings.model["type"]).forward).parameters:
        name = settings.model["type"]
        raise ConfigError(f"model '{name}' cannot be given frames; leave mask_ratios out, or train an STDiT")
    return scheduler, ratios


def make_data(settings: TrainSettings, device: torch.device, layout: Layout) -> Data:
    """The data that the settings name, and the frozen encoders for it. Raises ConfigError if there is none to train on.

    Latents of rendered clips are made here, if they are not there yet.
    """
    section = settings.dataset or {}
    if section.get("type") in registry.DATASETS:
        if settings.load_text_features or settings.load_video_features or section.get("dummy_text_feature"):
            problem = "a table gives videos and captions, no encoded features"
            raise ConfigError(f"{problem}; train on those with dataset = dict(type='EncodedDataset', data_path=FOLDER)")
        return _of_table(settings, device, layout)
    if section.get("type") in encoded.TYPES:
        source = encoded.EncodedSource(settings, layout.data_size)
        of_main(lambda: encoded.refuse_other_encoders(source.dataset, settings), layout)
        record, digest = _record(lambda: record_of_features(source.dataset), layout)
        contents = {"the features": digest, **source.contents()}
        if settings.validate_every or settings.sample_every:
            logger.warning("validate_every and sample_every have no effect with encoded features")
        return Data(source, _placed_on(device), [], source.keywords(), contents, record=record)
    if settings.batch_size is None:
        raise ConfigError("training on rendered clips needs a batch_size")
    clips = shape_clips(section, settings.batch_size, section.get("seed", 0), "features", "num_clips")
    encoders = Encoders(settings, device, Layout())  # one rank encodes while the others wait: nothing is sharded
    source = _first_on_main(layout, lambda: ClipSource(clips, encode_clips(clips, settings, encoders), settings))
    sizes = [(one.num_frames, *one.image_size) for one in clips.sets if not one.continued]
    held, keywords = held_clips(clips, settings, encoders), encoders.keywords(sizes)
    return Data(source, _placed_on(device), sizes, keywords, encoders.contents, encoders, held)


def _of_table(settings: TrainSettings, device: torch.device, layout: Layout) -> Data:
    """The data of a table, which is checked before the encoders are loaded."""

    gathered = partial(gather, layout=layout)

    def look(dataset: VideoTextDataset) -> list[Broken]:
        check_texts(dataset.table, dataset.captions)
        return missing_files(dataset.table, gathered)

    source = table_source(settings, layout.data_size, look)
    cells = cells_of(source.dataset.table)
    same_on_all_ranks(cells, source.dataset.table.source, gathered)
    record, digest = _record(lambda: record_of_table(source.dataset.table, cells), layout)
    encoders = Encoders(settings, device, layout)
    contents = {"the table": digest, **encoders.contents}
    sizes = [source.batches(0).size] if isinstance(source.dataset, VideoTextDataset) else []
    held, broken = held_out(source, encoders, settings.seed, gathered)
    keywords, broken = encoders.keywords(sizes), [*source.broken, *broken]
    return Data(source, encoders, sizes, keywords, contents, encoders, held, broken, record, reads_files=True)


def _record(make: Callable[[], DataRecord], layout: Layout) -> tuple[DataRecord | None, str]:
    """The record of what is trained on, on the main rank, and its digest on every one."""
    made: list[DataRecord] = []

    def digest() -> str:
        made.append(make())
        return made[0].digest

    found = of_main(digest, layout)
    return (made[0] if made else None), found


def _placed_on(device: torch.device) -> Prepare:
    return lambda batch, _: batch.to(device)


def _first_on_main(layout: Layout, make: Callable[[], Any]) -> Any:
    """What `make` gives: on the main rank first, which writes the files that all read."""
    made = make() if layout.is_main else None
    barrier(layout)
    return made if layout.is_main else make()


def build_model(settings: TrainSettings, data: Data, device: torch.device) -> nn.Module:
    """The model to train, with the same initial values on all ranks, or the weights that it starts from.

    Raises ConfigError when a model of one size is to be trained on several.
    """
    section, keywords = settings.model, dict(data.keywords)
    fixed = issubclass(registry.builder(section["type"]), FixedPositions)
    forced = {name: keywords.pop(name) for name in ("input_size",) if name in keywords and fixed}
    if fixed and not forced:
        raise ConfigError(f"model '{section['type']}' is built for one size; train STDiT2 or STDiT3 on several")
    keywords.pop("input_size", None)
    if data.encoders is None:
        forced["skip_y_embedder"] = False  # features are those of the text encoder
    path = builder.locate_weights(section, "model", settings.offline) if section.get("from_pretrained") else None
    torch.manual_seed(settings.seed)
    model = builder.build_model({**section, "strict": False}, path, keywords, forced)
    if path:
        logger.info("%s", load_weights(model, path, strict=section.get("strict", False)))
    if data.sizes:
        model.config = {**model.config, "trained_sizes": [list(size) for size in data.sizes]}
    return place(model, device).train()


def _rounded(y: Tensor) -> Tensor:
    """The shape of `y` for counting, with its text a multiple of 64 tokens: few different ones are to be counted."""
    shape = list(y.shape)
    if len(shape) == 4 and shape[2] > 1:
        shape[2] = -(-shape[2] // 64) * 64
    return torch.empty(shape, device="meta")


class DiffusionLoss:
    """The scheduler's loss of each sample of a batch, [B].

    Text is dropped with the model's class_dropout_prob; frames are given as often as `ratios` say, and the first half
    of clips that go on from there. `examples` are those of the last batch.
    """

    def __init__(self, model: nn.Module, scheduler: Any, ratios: MaskRatios | None, prepare: Prepare) -> None:
        self.model, self.scheduler, self.ratios, self.prepare = model, scheduler, ratios, prepare
        self.examples: Examples | None = None

    def __call__(self, batch: Any, generator: torch.Generator) -> Tensor:
        examples = self.examples = self.prepare(batch, generator)
        latents, y = examples.latents, drop_text(self.model, examples.cond["y"], generator)
        given, ratios = None, FIRST_HALF if examples.continued else self.ratios
        if ratios is not None:
            given = ratios.draw(len(latents), latents.shape[2], generator).to(latents.device)
            latents = latents if examples.last is None else end_in_image(latents, examples.last, given)
        frames, height, width = examples.size
        size = {"height": height, "width": width, "num_frames": frames}
        cond = {**examples.cond, "y": y}
        losses = self.scheduler.training_loss(self.model, latents, cond, **size, mask=given, generator=generator)
        return losses * examples.weight


def drop_text(model: nn.Module, y: Tensor, generator: torch.Generator) -> Tensor:
    """`y` [B, ...], some of it replaced by the unconditional text, for classifier-free guidance."""
    drop = torch.rand(len(y), generator=generator) < model.class_dropout_prob
    if not drop.any():
        return y
    return torch.where(drop.to(y.device).view(-1, *(1,) * (y.ndim - 1)), model.null_caption(y), y)


def end_in_image(latents: Tensor, last: Tensor, mask: Tensor) -> Tensor:
    """`latents` [B, C, T, H, W] with `last` [B, C, H, W] at their end where `mask` [B, T] gives that frame alone.

    Whoever asks for a clip that ends in a picture gives a picture: its latents are not those of the end of a video.
    """
    if mask.shape[1] == 1:
        return latents
    alone = ~mask[:, -1] & mask[:, -2]
    end = torch.where(alone[:, None, None, None], last, latents[:, :, -1])
    return torch.cat((latents[:, :, :-1], end[:, :, None]), dim=2)


def finish(settings: TrainSettings, model: nn.Module, trainer: Trainer, layout: Layout) -> Path:
    """Writes the averaged model into the folder of the run, as it is used for inference, and returns where it is."""
    averaged = whole(trainer.ema.state_dict(), layout)

    def write() -> Path:
        config = {"model_type": settings.model["type"], **model.config}
        save_pretrained(averaged, trainer.folder / "ema", config)
        return publish(trainer.folder)

    return of_main(write, layout)
