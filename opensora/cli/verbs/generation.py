"""generate, plan, continue, replay, benchmark: videos and images from prompts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from opensora.cli import preflight
from opensora.cli.flags import Flag, add_flags, looks_unquoted, prefer_size_flags
from opensora.cli.merge import merge, settings_of
from opensora.cli.parser import Parser
from opensora.cli.program import one_line
from opensora.cli.verbs.verb import Verb
from opensora.config.settings import InferenceSettings
from opensora.distributed.ranks import ranks
from opensora.errors import ConfigError
from opensora.pipeline.job_spec import JobSpec

if TYPE_CHECKING:
    from opensora.pipeline.outputs import Output

PROMPT = '"a red circle moving right"'
DEFAULT_MODEL = "embedded"
MODEL = Flag(
    "model", {"type": str, "metavar": "MODEL", "dest": "config", "default": DEFAULT_MODEL},
    "a name that `opensora models` prints, or a configuration", DEFAULT_MODEL,
)  # fmt: skip
WEIGHT_FLAGS = {"--ckpt-path": "model", "--vae-path": "vae", "--text-encoder-path": "text_encoder"}


def request_settings(argv: Sequence[str]) -> InferenceSettings:
    """The settings of the arguments of `opensora generate`. Raises ConfigError; exits with 2 on a wrong flag."""
    parser = Parser(prog="opensora generate")
    _add_request(parser)
    parser.set_defaults(example=_EXAMPLE)
    return _settings(parser.parse_args(argv))


def _settings(args: argparse.Namespace) -> InferenceSettings:
    words = args.prompts if looks_unquoted(args.prompts) else getattr(args, "unquoted", None)
    if words:
        one = " ".join(words)
        several = "each after a --prompt of its own"
        raise ConfigError(f'{len(words)} prompts of one word each; for one prompt type "{one}", for several {several}')
    args.prompt = [*args.prompts, *(args.prompt or [])] or None
    prefer_size_flags(args)
    settings = settings_of(InferenceSettings, args)
    if not settings.prompt and not settings.prompt_path:
        remedy = f"give one, or --prompt-path with a file of prompts; type: {args.example}"
        raise ConfigError(f"no prompt given: {remedy}")
    return settings


def generate(settings: InferenceSettings) -> int:
    """Generates the requested samples and prints the path of each."""
    spec = _checked_spec(settings)
    from opensora.pipeline.pipeline import VideoPipeline

    return _print_paths(VideoPipeline(settings).generate(spec))


def _checked_spec(settings: InferenceSettings) -> JobSpec:
    """What the settings ask for; refuses whatever needs no torch, whose import takes seconds."""
    own = ranks(connecting=True)
    spec = JobSpec(settings)
    if own.rank == 0:
        spec.check_outputs()
    return spec


def _print_paths(outputs: Iterator[Output]) -> int:
    """Prints the paths of each output as soon as it is written."""
    with closing(outputs):  # type: ignore[type-var]  # a generator, which a stop signal ends before the program
        for output in outputs:
            for path in filter(None, (output.path, output.preview, output.state)):
                print(one_line(path), flush=True)
    return 0


def _generate(args: argparse.Namespace) -> int:
    return generate(_settings(args))


def _plan(args: argparse.Namespace) -> int:
    settings = _settings(args)
    spec = _checked_spec(settings)
    from opensora.pipeline.plan import make_plan

    print(make_plan(settings, spec))
    return 0


def _continue(args: argparse.Namespace) -> int:
    preflight.check_drafts(args.drafts)
    from opensora.pipeline.replay import finish

    return _print_paths(finish(args.drafts, lambda settings: merge(settings, args)))


def _replay(args: argparse.Namespace) -> int:
    preflight.check_exists(args.file)
    from opensora.pipeline.replay import replay

    weights = {part: getattr(args, part) for part in WEIGHT_FLAGS.values()}
    result = replay(args.file, args.save_dir, args.device, weights, args.allow_downloads, args.lora)
    print(one_line(result.output.path))
    if result.identical:
        print("identical: every decoded frame has the same bytes")
        return 0
    print(f"different: {', '.join(result.differences) or 'same weights and versions, other frames'}")
    distance = result.frames or "unknown, because the original cannot be read"
    print(f"made by opensora {result.made_by}; difference of the frames: {distance}")
    return 1


def _benchmark(args: argparse.Namespace) -> int:
    return benchmark(_settings(args), args)


def benchmark(settings: InferenceSettings, args: argparse.Namespace) -> int:
    """Times a request, prints a table and the path of the report. `args` are those of `add_benchmark_flags`."""
    spec = _checked_spec(settings)
    from opensora.pipeline.benchmark import check_report_path, run_benchmark, table_of, write_report

    check_report_path(args.benchmark_save_path)
    report = run_benchmark(settings, args.warmup_count, args.eval_count, spec)
    print(table_of(report))
    print(one_line(write_report(report, args.benchmark_save_path)))
    return 0


def _add_request(parser: Parser) -> None:
    parser.usage = "%(prog)s PROMPT ... [flags]"
    prompts = parser.group("prompts and model")
    prompts.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompt, in quotes; several are allowed")
    add_flags(parser, InferenceSettings, scripts=False, extra=[MODEL], defaults_of=DEFAULT_MODEL)


def _add_benchmark(parser: Parser) -> None:
    _add_request(parser)
    add_benchmark_flags(parser)


def add_benchmark_flags(parser: Parser) -> None:
    """Adds the number of runs and the path of the report."""
    group = parser.group("benchmark")
    group.add_argument("--warmup-count", type=int, default=3, metavar="N", help="untimed runs at the start [3]")
    group.add_argument("--eval-count", type=int, default=5, metavar="N", help="timed runs [5]")
    report = "./benchmark/report.json"
    group.add_argument("--benchmark-save-path", default=report, metavar="FILE", help=f"JSON report to write [{report}]")


def _add_continue(parser: Parser) -> None:
    parser.usage = "%(prog)s DRAFT ... [flags]"
    parser.add_argument("drafts", nargs="+", metavar="DRAFT", help="a .draft.safetensors file that generate wrote")
    add_flags(parser, InferenceSettings, scripts=False, default_text="as in the draft")


def _add_replay(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="an mp4, png or recipe .json that opensora wrote")
    folder = "./samples/replay"
    parser.add_argument("--save-dir", default=folder, metavar="FOLDER", help=f"output folder [{folder}]")
    parser.add_argument("--device", metavar="TEXT", help="device to run on [that of the recipe]")
    text = "download the weights and references that the recipe names [no]"
    parser.add_argument("--allow-downloads", action="store_true", help=text)
    for flag, part in WEIGHT_FLAGS.items():
        text = f"weights of the {part.replace('_', ' ')} [those of the recipe]"
        parser.add_argument(flag, dest=part, metavar="PATH", help=text)
    text = "where the adapters of the recipe lie now, in their order [as in the recipe]"
    parser.add_argument("--lora", nargs="+", metavar="FILE", help=text)


_EXAMPLE = f"opensora generate {PROMPT}"
VERBS = {
    "generate": Verb("generate videos or images from prompts", _EXAMPLE, _add_request, _generate),
    "plan": Verb(
        "show what generate would do with the same arguments: sizes, memory, time",
        f"opensora plan {PROMPT}", _add_request, _plan,
    ),
    "continue": Verb(
        "finish a draft of generate --draft or --steps-until",
        "opensora continue samples/sample_0000.draft.safetensors", _add_continue, _continue,
    ),
    "replay": Verb(
        "regenerate an output from its recipe and compare the frames",
        "opensora replay samples/sample_0000.mp4", _add_replay, _replay,
    ),
    "benchmark": Verb(
        "time the stages of a request and write a report", f"opensora benchmark {PROMPT}", _add_benchmark, _benchmark,
    ),
}  # fmt: skip
