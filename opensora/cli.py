"""The command `opensora`: one thin verb per job."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from opensora import __version__
from opensora.settings import InferenceSettings, SearchSettings, TrainSettings
from opensora.utils.config_utils import Parser, add_flags, add_search, merge, run_program, settings_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; 0 when it did its job, 1 on an error that the user can mend, 130 on Ctrl-C."""
    args = _parser().parse_args(argv)
    return run_program(lambda: args.run(args))


def _parser() -> Parser:
    parser = Parser(prog="opensora", description="Text in, video out.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    generate = verbs.add_parser("generate", help="make videos or images from prompts")
    _add_request(generate)
    generate.set_defaults(run=_generate)

    plan = verbs.add_parser("plan", help="say what generate would do with the same arguments, without doing it")
    _add_request(plan)
    plan.set_defaults(run=_plan)

    finish = verbs.add_parser("continue", help="finish what generate --draft or --steps-until began")
    finish.add_argument("states", nargs="+", metavar="STATE", help="a .draft.safetensors file that generate wrote")
    add_flags(finish, InferenceSettings)  # checked to be those of the draft
    finish.set_defaults(run=_continue)

    replay = verbs.add_parser("replay", help="make an output again from its own recipe and compare")
    replay.add_argument("file", help="an mp4, png or recipe .json that opensora wrote")
    replay.add_argument("--save-dir", default="./samples/replay", help="folder for the result")
    replay.add_argument("--device", help="device to run on")
    replay.add_argument("--allow-downloads", action="store_true", help="fetch weights and references that it names")
    for flag, part in (("--ckpt-path", "model"), ("--vae-path", "vae"), ("--text-encoder-path", "text_encoder")):
        replay.add_argument(flag, dest=part, help=f"where the weights of the {part.replace('_', ' ')} lie now")
    replay.set_defaults(run=_replay)

    inspect = verbs.add_parser("inspect", help="say what a checkpoint holds")
    inspect.add_argument("path", help="a file, a folder or a hub id")
    inspect.set_defaults(run=_inspect)

    convert = verbs.add_parser("convert", help="write a checkpoint in another format, or a published one in ours")
    convert.add_argument("source", metavar="SRC", help="a file, a folder or a hub id")
    convert.add_argument("destination", metavar="DST", help="what to write; it appears whole or not at all")
    convert.add_argument("--to", required=True, choices=("safetensors", "hf", "pt"), help="a file, a folder or a file")
    convert.add_argument("--config", help="configuration whose model the weights have to fit, and take the layout of")
    convert.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="number format; default: as it is")
    convert.add_argument("--layout", choices=("ours", "original"), default="ours", help="'original': the authors' own")
    convert.add_argument("--force", action="store_true", help="replace what DST holds")
    convert.set_defaults(run=_convert)

    train = verbs.add_parser("train", help="train a diffusion model, as scripts/train.py does")
    train.add_argument("config", metavar="CONFIG", help="configuration file, or its name below configs/")
    add_flags(train, TrainSettings)
    train.set_defaults(run=_train)

    table = verbs.add_parser("table", help="write a table of the videos in a folder, to train on")
    table.add_argument("folder", metavar="FOLDER", help="folder with videos and images, each beside its text in a .txt")
    table.add_argument("table", metavar="OUT.csv", help="table to write; it appears whole or not at all")
    table.add_argument("--force", action="store_true", help="replace a table that is there")
    table.set_defaults(run=_table)

    buckets = verbs.add_parser("buckets", help="say which rows of a table are trained at what size, or why not")
    buckets.add_argument("table", metavar="TABLE", help="table with the columns path, num_frames, height and width")
    buckets.add_argument("config", metavar="CONFIG", help="configuration of the training, with its bucket_config")
    buckets.add_argument("--world-size", type=int, default=1, help="ranks that share the data")
    buckets.add_argument("--epoch", type=int, default=0, help="the epoch to show; each draws anew")
    buckets.add_argument("--seed", type=int, help="random seed")
    buckets.add_argument("--pad", action="store_true", help="repeat rows instead of dropping what fills no batch")
    buckets.add_argument("--save-dir", default="./samples/buckets", help="folder for the list of rows and the picture")
    buckets.add_argument("--trust-config", action="store_true", help="run the configuration as a program")
    buckets.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="other settings")
    buckets.set_defaults(run=_buckets)

    search = verbs.add_parser("search-bs", help="search the batch size of each bucket with training steps")
    add_search(search)
    search.set_defaults(run=_search)

    models = verbs.add_parser("models", help="list the models")
    models.set_defaults(run=_models)
    return parser


def _add_request(parser: Parser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to show")
    parser.add_argument("--model", dest="config", default="embedded", help="'embedded' (default) or a configuration")
    add_flags(parser, InferenceSettings)
    parser.add_argument("--loops", dest="loop", type=int, help="the same as --loop")


def _request(args: argparse.Namespace) -> InferenceSettings:
    args.prompt = [*args.prompts, *(args.prompt or [])] or None
    if (args.resolution or args.aspect_ratio) and not args.image_size:
        args.cfg_options = ["image_size=None", *(args.cfg_options or [])]  # the flags beat the file's image_size
    return settings_of(InferenceSettings, args)


def _generate(args: argparse.Namespace) -> int:
    return generate(_request(args))


def keeping_names(settings: InferenceSettings) -> InferenceSettings:
    """The settings as the documents' script takes them: results keep their names, and replace what lies there."""
    return dataclasses.replace(settings, overwrite=settings.overwrite or not settings.prompt_as_path)


def generate(settings: InferenceSettings) -> int:
    """Makes what the settings ask for and prints the path of each result."""
    from opensora.pipeline import VideoPipeline

    return _tell(VideoPipeline(settings).generate())


def _tell(outputs: Iterable[Any]) -> int:
    """Prints the path of each file when it is there."""
    for output in outputs:
        for path in filter(None, (output.path, output.preview, output.state)):
            print(path, flush=True)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from opensora.plan import make_plan

    print(make_plan(_request(args)))
    return 0


def _continue(args: argparse.Namespace) -> int:
    from opensora.replay import finish

    return _tell(finish(args.states, lambda settings: merge(settings, args)))


def _replay(args: argparse.Namespace) -> int:
    from opensora.replay import replay

    weights = {"model": args.model, "vae": args.vae, "text_encoder": args.text_encoder}
    result = replay(args.file, args.save_dir, args.device, weights, args.allow_downloads)
    print(result.output.path)
    if result.identical:
        print("identical: every decoded frame has the same bytes")
        return 0
    print(f"different: {', '.join(result.differences) or 'same weights and versions, other frames'}")
    return 1


def _inspect(args: argparse.Namespace) -> int:
    from opensora.weights import inspect

    print(inspect(args.path))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from opensora.convert import convert

    print(convert(**{name: value for name, value in vars(args).items() if name != "run"}))
    return 0


def _train(args: argparse.Namespace) -> int:
    from opensora.training.diffusion import train

    print(train(settings_of(TrainSettings, args)))
    return 0


def _table(args: argparse.Namespace) -> int:
    from opensora.video_table import make_table

    made = make_table(args.folder, args.table, args.force)
    left_out = f"; left out: {len(made.broken)}" if made.broken else ""
    print(f"{args.table}: {made.num_rows} rows, {made.num_captions} of them with a text of their own{left_out}")
    return 0


def _buckets(args: argparse.Namespace) -> int:
    from opensora import bucket_report

    settings = settings_of(TrainSettings, args)
    paths, sampler = bucket_report.load(
        args.table, settings, world_size=args.world_size, epoch=args.epoch, pad=args.pad
    )
    print(bucket_report.describe(sampler))
    for path in bucket_report.write(sampler, paths, args.save_dir, args.table):
        print(path)
    sampler.require_steps()
    return 0


def _search(args: argparse.Namespace) -> int:
    from opensora.training.search_report import search_batch_sizes

    search_batch_sizes(settings_of(SearchSettings, args))
    return 0


def _models(args: argparse.Namespace) -> int:
    from opensora.catalog import table

    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
