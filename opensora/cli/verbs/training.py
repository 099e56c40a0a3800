"""train, train-vae, extract, search-bs: programs that read a training configuration, on one rank or under torchrun."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from opensora.cli import preflight
from opensora.cli.flags import add_flags
from opensora.cli.merge import settings_of
from opensora.cli.parser import Parser
from opensora.cli.program import one_line
from opensora.cli.verbs.verb import Verb
from opensora.config.settings import ExtractSettings, SearchSettings, TrainSettings
from opensora.distributed.ranks import rank


def train(settings: TrainSettings) -> Path:
    """Trains a diffusion model. Returns the last checkpoint, or the folder of the EMA weights of a finished run."""
    preflight.check_training(settings)
    from opensora.training.diffusion import train

    return train(settings).path


def train_vae(settings: TrainSettings) -> Path:
    """Trains an autoencoder. Returns the last checkpoint, or the folder of the EMA weights of a finished run."""
    preflight.check_training(settings)
    from opensora.training.autoencoder import train_vae

    return train_vae(settings).path


def extract(settings: ExtractSettings) -> Path:
    """Encodes a table of videos and their texts once. Returns the folder of the features."""
    preflight.check_training(settings, connecting=False)
    from opensora.training.feature_extraction.extract import extract

    return extract(settings)


def search_batch_sizes(settings: SearchSettings) -> None:
    """Searches the batch size of each bucket; prints a table and writes the configuration and report."""
    preflight.check_training(settings, connecting=False)
    from opensora.training.batch_size_search.search_report import search_batch_sizes

    search_batch_sizes(settings)


def _train(args: argparse.Namespace) -> int:
    return _print_path(train(settings_of(TrainSettings, args)))


def _train_vae(args: argparse.Namespace) -> int:
    return _print_path(train_vae(settings_of(TrainSettings, args)))


def _extract(args: argparse.Namespace) -> int:
    return _print_path(extract(settings_of(ExtractSettings, args)))


def _search(args: argparse.Namespace) -> int:
    search_batch_sizes(settings_of(SearchSettings, args))
    return 0


def _print_path(path: Path) -> int:
    """Prints the path of the result once, whatever the number of ranks."""
    if rank() == 0:
        print(one_line(path))
    return 0


def _configured(kind: type[TrainSettings]) -> Callable[[Parser], None]:
    """Returns a function that adds CONFIG and the flags of these settings."""

    def add(parser: Parser) -> None:
        parser.usage = "%(prog)s CONFIG [flags]"
        parser.add_argument("config", metavar="CONFIG", help="configuration file, or its name below configs/")
        add_flags(parser, kind)

    return add


VERBS = {
    "train": Verb(
        "train a diffusion model", "opensora train embedded/train/stdit3", _configured(TrainSettings), _train,
    ),
    "train-vae": Verb(
        "train an autoencoder", "opensora train-vae embedded/train/vae_2d", _configured(TrainSettings), _train_vae,
    ),
    "extract": Verb(
        "encode a table of videos once, to train from the features",
        "opensora extract opensora-v1-2/misc/extract --data-path my-videos.csv", _configured(ExtractSettings), _extract,
    ),
    "search-bs": Verb(
        "search the batch size of each bucket by timing training steps",
        "opensora search-bs opensora-v1-2/misc/bs --base-step-time 12", _configured(SearchSettings), _search,
    ),
}  # fmt: skip
