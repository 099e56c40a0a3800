"""Training of a diffusion model."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch

from opensora import registry
from opensora.acceleration.device import pick_device
from opensora.acceleration.placement import to_device
from opensora.acceleration.precision import DTYPES
from opensora.acceleration.streams import pin_memory_for
from opensora.checkpoints import builder
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.lora import FILE as ADAPTER
from opensora.checkpoints.lora import write_lora
from opensora.checkpoints.save import save_pretrained
from opensora.checkpoints.summary import Summary
from opensora.config.sections import check_type
from opensora.config.settings import TrainSettings, check_trainable
from opensora.datasets.synthetic.dataset import TYPES
from opensora.distributed import ranks
from opensora.distributed.collectives import run_on_main
from opensora.distributed.failures import report_first_failure
from opensora.distributed.full_state_dict import full_state_dict
from opensora.distributed.parallelize import parallelize
from opensora.distributed.process_group import RankLayout, start
from opensora.errors import ConfigError
from opensora.models.layers.fixed_positions import FixedPositions
from opensora.models.layers.transformer import PatchTransformer
from opensora.schedulers.rf import RFLOW
from opensora.training import adapter
from opensora.training.callbacks import make_callbacks
from opensora.training.checkpoint.fingerprint import fingerprint
from opensora.training.data.diffusion_data import DiffusionData, make_data
from opensora.training.data.loader import PrefetchLoader
from opensora.training.losses.diffusion import DiffusionLoss
from opensora.training.masks import MaskRatios
from opensora.training.result import TrainResult
from opensora.training.run_folder import publish, refuse_running
from opensora.training.throughput import BatchCost
from opensora.training.trainer import Trainer

logger = logging.getLogger("opensora")


@report_first_failure()
def train(settings: TrainSettings) -> TrainResult:
    """Trains a diffusion model; exports the averaged weights once the last step is done.

    Raises ConfigError, WeightsError, MediaError and OpenSoraError.
    """
    check_trainable(settings)
    scheduler, ratios = check_training(settings)
    device = pick_device(settings.device)
    layout = start(device, settings.sp_size, ranks.rank_timeout())
    run_on_main(lambda: refuse_running(settings), layout)
    data = make_data(settings, device, layout)
    model, base = build_model(settings, data, device)
    adapts = {} if settings.lora is None or base is None else {"base": base.sha256}
    parallelize(model, layout, DTYPES[settings.dtype], settings.grad_checkpoint, settings.compile)
    sizes = {"trained_sizes": [list(size) for size in data.sizes]} if data.sizes else {}
    workers = settings.num_workers if data.reads_files else 0
    loader = PrefetchLoader(data.source, layout.data_rank, layout.data_size, workers, pin_memory_for(device))
    trainer = Trainer(
        settings, model, DiffusionLoss(model, scheduler, ratios, settings.input_perturbation), device, loader, layout,
        config={**model.config, **sizes},
        fingerprint=fingerprint(settings, **data.contents, **adapts),
        encode=data.encode,
        cost=BatchCost(model, settings.model["type"]),
        history=data.history,
        callbacks=make_callbacks(settings, model, scheduler, data, layout),
        base=adapts.get("base"),
    )  # fmt: skip
    checkpoint = trainer.run()
    exported = export_average(trainer, layout) if trainer.finished else None
    return TrainResult(trainer.folder, trainer.step, checkpoint, exported)


def check_training(settings: TrainSettings) -> tuple[Any, MaskRatios | None]:
    """The scheduler and the mask ratios of the settings. Raises ConfigError for what cannot be trained."""
    if settings.scheduler is None:
        raise ConfigError("training a diffusion model needs a scheduler")
    scheduler = registry.build(settings.scheduler)
    if not hasattr(scheduler, "training_loss"):
        name = settings.scheduler["type"]
        raise ConfigError(f"scheduler '{name}' only samples; train with rflow, iddpm or iddpm-speed")
    if settings.input_perturbation:
        _check_perturbed(settings, scheduler)
    check_type("model", settings.model["type"], registry.MODELS)
    adapter.check(settings)
    ratios = None if settings.mask_ratios is None else MaskRatios(settings.mask_ratios)
    if ratios and "x_mask" not in inspect.signature(registry.builder(settings.model["type"]).forward).parameters:
        name = settings.model["type"]
        raise ConfigError(f"model '{name}' cannot be given frames; remove mask_ratios, or train an STDiT")
    return scheduler, ratios


def _check_perturbed(settings: TrainSettings, scheduler: Any) -> None:
    """Raises ConfigError if nothing can be perturbed."""
    if not isinstance(scheduler, RFLOW):
        raise ConfigError("input_perturbation is for rectified flow; set scheduler type 'rflow', or remove it")
    kind = str((settings.dataset or {}).get("type"))
    if kind not in TYPES or TYPES[kind].make_altered is None:
        known = " or ".join(f"'{name}'" for name, clips in TYPES.items() if clips.make_altered)
        raise ConfigError(f"input_perturbation alters clips of dataset type {known}, not of '{kind[:80]}'")


def build_model(
    settings: TrainSettings, data: DiffusionData, device: torch.device
) -> tuple[PatchTransformer, Summary | None]:
    """The model to train: with the same initial weights on all ranks, or those of the checkpoint it starts from.

    Also returns the summary of that checkpoint. With `lora` the model is frozen and has an adapter to train.
    Raises ConfigError when a model of a fixed size is to be trained on several.
    """
    section, keywords = settings.model, dict(data.model_kwargs)
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
    summary = None
    if path:
        summary = load_weights(model, path, strict=section.get("strict", False))
        logger.info("%s", summary)
        if settings.lora is not None:
            adapter.add_trained_adapter(model, settings, summary)
    return to_device(model, device).train(), summary


def export_average(trainer: Trainer, layout: RankLayout) -> Path:
    """Writes the averaged model or adapter as inference reads it into `ema` of the run folder; returns its path."""
    averaged = full_state_dict(trainer.ema.state_dict(), layout)

    def write() -> Path:
        own = adapter.adapter_of(trainer.model, averaged, trainer.checkpoints.base)
        if own is None:
            save_pretrained(averaged, trainer.folder / "ema", trainer.config)
        else:
            write_lora(trainer.folder / "ema" / ADAPTER, own)
        return publish(trainer.folder)

    return run_on_main(write, layout)
