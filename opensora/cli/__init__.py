"""The command `opensora`: one thin verb per job."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from opensora.checkpoints.hub import locate
from opensora.cli import preflight
from opensora.cli.flags import prefer_flags_of_size, unquoted
from opensora.cli.merge import merge, settings_of
from opensora.cli.parser import Parser
from opensora.cli.program import one_line, run_program
from opensora.cli.verbs import make_parser
from opensora.config.settings import ExtractSettings, InferenceSettings, SearchSettings, TrainSettings
from opensora.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; 0 when it did its job, 1 on an error that the user can mend, 128 + n on stop signal n."""

    def program() -> int:
        args = _parser().parse_args(argv)
        return args.run(args)

    return run_program(program)


def _parser() -> Parser:
    return make_parser(_RUNS)


def _request(args: argparse.Namespace) -> InferenceSettings:
    words = args.prompts if unquoted(args.prompts) else getattr(args, "unquoted", None)
    if words:
        one = " ".join(words)
        several = "each after a --prompt of its own"
        raise ConfigError(f'{len(words)} prompts of one word each; for one prompt type "{one}", for several {several}')
    args.prompt = [*args.prompts, *(args.prompt or [])] or None
    prefer_flags_of_size(args)
    settings = settings_of(InferenceSettings, args)
    if not settings.prompt and not settings.prompt_path:
        remedy = f"give one, or --prompt-path with a file of prompts; type: {args.example}"
        raise ConfigError(f"there is no prompt: {remedy}")
    return settings


def _generate(args: argparse.Namespace) -> int:
    return generate(_request(args))


def keeping_names(settings: InferenceSettings) -> InferenceSettings:
    """The settings as the documents' script takes them: results keep their names, and replace what lies there."""
    return dataclasses.replace(settings, overwrite=settings.overwrite or not settings.prompt_as_path)


def generate(settings: InferenceSettings) -> int:
    """Makes what the settings ask for and prints the path of each result."""
    preflight.check_request(settings)
    from opensora.pipeline.pipeline import VideoPipeline

    return _tell(VideoPipeline(settings).generate())


def _tell(outputs: Iterator[Any]) -> int:
    """Prints the path of each file when it is there."""
    with closing(outputs):  # what it holds is put in order before a stop signal ends the program
        for output in outputs:
            for path in filter(None, (output.path, output.preview, output.state)):
                print(one_line(path), flush=True)
    return 0


def _plan(args: argparse.Namespace) -> int:
    settings = _request(args)
    preflight.check_request(settings)
    from opensora.pipeline.plan import make_plan

    print(make_plan(settings))
    return 0


def _continue(args: argparse.Namespace) -> int:
    preflight.check_drafts(args.states)
    from opensora.pipeline.replay import finish

    return _tell(finish(args.states, lambda settings: merge(settings, args)))


def _replay(args: argparse.Namespace) -> int:
    preflight.check_exists(args.file)
    from opensora.pipeline.replay import replay

    weights = {"model": args.model, "vae": args.vae, "text_encoder": args.text_encoder}
    result = replay(args.file, args.save_dir, args.device, weights, args.allow_downloads)
    print(one_line(result.output.path))
    if result.identical:
        print("identical: every decoded frame has the same bytes")
        return 0
    print(f"different: {', '.join(result.differences) or 'same weights and versions, other frames'}")
    return 1


def _inspect(args: argparse.Namespace) -> int:
    locate(args.path, offline=args.offline)  # before the libraries are loaded
    from opensora.pipeline.recipe_report import describe_output, is_output

    if is_output(args.path):
        print(describe_output(args.path))
        return 0
    from opensora.checkpoints import inspect

    print(inspect(args.path, args.offline))
    return 0


def _convert(args: argparse.Namespace) -> int:
    locate(args.source, offline=args.offline)
    from opensora.checkpoints import convert

    print(convert(**{name: value for name, value in vars(args).items() if name not in ("run", "example")}))
    return 0


def export(args: argparse.Namespace) -> int:
    """Writes a model for inference and prints what was written."""
    preflight.check_exists(args.checkpoint)
    from opensora.acceleration.device import DTYPES
    from opensora.training.checkpoint.export import export as write

    print(write(Path(args.checkpoint), Path(args.destination), not args.no_ema, DTYPES.get(args.dtype)))
    return 0


def train(settings: TrainSettings) -> Path:
    """Trains a diffusion model; where the result lies."""
    preflight.check_training(settings)
    from opensora.training.diffusion import train

    return train(settings)


def _train(args: argparse.Namespace) -> int:
    print(one_line(train(settings_of(TrainSettings, args))))
    return 0


def train_vae(settings: TrainSettings) -> Path:
    """Trains an autoencoder; where the result lies."""
    preflight.check_training(settings)
    from opensora.training.autoencoder import train_vae

    return train_vae(settings)


def _train_vae(args: argparse.Namespace) -> int:
    print(one_line(train_vae(settings_of(TrainSettings, args))))
    return 0


def _table(args: argparse.Namespace) -> int:
    preflight.check_exists(args.folder)
    from opensora.datasets import make_table

    made = make_table(args.folder, args.table, args.force, args.captions)
    print(f"{one_line(args.table)}: {made.summary()}")
    return 0


def _buckets(args: argparse.Namespace) -> int:
    settings = settings_of(TrainSettings, args)
    preflight.check_exists(args.table)
    from opensora.datasets import bucket_report

    paths, sampler = bucket_report.load(
        args.table, settings, world_size=args.world_size, epoch=args.epoch, pad=args.pad
    )
    print(bucket_report.describe(sampler))
    for path in bucket_report.write(sampler, paths, args.save_dir, args.table):
        print(one_line(path))
    sampler.require_steps()
    return 0


def extract(args: argparse.Namespace) -> int:
    """Encodes a table of videos and prints the folder of the features."""
    settings = settings_of(ExtractSettings, args)
    preflight.check_training(settings, connecting=False)
    from opensora.training.feature_extraction.extract import extract as encode

    print(one_line(encode(settings)))
    return 0


def search(settings: SearchSettings) -> int:
    """Searches batch sizes, prints and writes them."""
    preflight.check_training(settings, connecting=False)
    from opensora.training.batch_size_search.search_report import search_batch_sizes

    search_batch_sizes(settings)
    return 0


def _search(args: argparse.Namespace) -> int:
    return search(settings_of(SearchSettings, args))


def _benchmark(args: argparse.Namespace) -> int:
    return benchmark(_request(args), args)


def benchmark(settings: InferenceSettings, args: argparse.Namespace) -> int:
    """Times a request, prints a table and the path of the report."""
    preflight.check_request(settings)
    from opensora.pipeline.benchmark import check_report_path, run_benchmark, table_of, write_report

    check_report_path(args.benchmark_save_path)
    report = run_benchmark(settings, args.warmup_count, args.eval_count)
    print(table_of(report))
    print(one_line(write_report(report, args.benchmark_save_path)))
    return 0


def _models(args: argparse.Namespace) -> int:
    from opensora.config.model_zoo import table

    print(table())
    return 0


_RUNS = {
    "generate": _generate, "plan": _plan, "continue": _continue, "replay": _replay, "inspect": _inspect,
    "convert": _convert, "export": export, "train": _train, "train-vae": _train_vae, "table": _table,
    "buckets": _buckets, "extract": extract, "search-bs": _search, "benchmark": _benchmark, "models": _models,
}  # fmt: skip
