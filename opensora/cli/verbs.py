"""The verbs of `opensora` and what each of them takes. What they do stands in `opensora/cli/__init__.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from opensora import __version__
from opensora.cli.accelerator_guide import add_counts
from opensora.cli.flags import Flag, add_flags
from opensora.cli.parser import Parser
from opensora.config.settings import ExtractSettings, InferenceSettings, SearchSettings, TrainSettings

Run = Callable[[argparse.Namespace], int]
PROMPT = '"a red circle moving right"'
MODEL = Flag(
    "model", {"type": str, "metavar": "MODEL", "dest": "config", "default": "embedded"},
    "the model: 'embedded', a name that `opensora models` prints, or a configuration", "embedded",
)  # fmt: skip
WEIGHTS = (("--ckpt-path", "model"), ("--vae-path", "vae"), ("--text-encoder-path", "text_encoder"))


def make_parser(runs: Mapping[str, Run]) -> Parser:
    """The command line of `opensora`; `runs` has what each verb does."""
    parser = Parser(prog="opensora", description="Text in, video out.", example=f"opensora generate {PROMPT}")
    parser.add_argument("--version", action="version", version=__version__)
    below = parser.add_subparsers(required=True, metavar="VERB")
    for verb, run in runs.items():
        text, example, add = VERBS[verb]
        one = below.add_parser(verb, help=text, description=f"{text[0].upper()}{text[1:]}.", example=example)
        add(one)
        one.set_defaults(run=run, example=example)
    parser.verbs = list(runs)
    return parser


def _add_request(parser: Parser) -> None:
    parser.usage = "%(prog)s PROMPT ... [flags]"
    what = parser.group("what to make")
    what.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to show, in quotes; several make several")
    add_flags(parser, InferenceSettings, documented=False, more=[MODEL])


def _add_benchmark(parser: Parser) -> None:
    _add_request(parser)
    add_counts(parser)


def _add_continue(parser: Parser) -> None:
    parser.usage = "%(prog)s STATE ... [flags]"
    parser.add_argument("states", nargs="+", metavar="STATE", help="a .draft.safetensors file that generate wrote")
    add_flags(parser, InferenceSettings, documented=False)  # checked to be those of the draft


def _add_replay(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="an mp4, png or recipe .json that opensora wrote")
    folder = "./samples/replay"
    parser.add_argument("--save-dir", default=folder, metavar="FOLDER", help=f"folder for the result [{folder}]")
    parser.add_argument("--device", metavar="TEXT", help="device to run on [that of the recipe]")
    fetch = "fetch weights and references that the recipe names by an address [no]"
    parser.add_argument("--allow-downloads", action="store_true", help=fetch)
    for flag, part in WEIGHTS:
        text = f"where the weights of the {part.replace('_', ' ')} lie now [as the recipe says]"
        parser.add_argument(flag, dest=part, metavar="PATH", help=text)


def _add_inspect(parser: Parser) -> None:
    text = "a weight file, a folder, a hub id or a published file's name; or an mp4, png, recipe .json or draft of ours"
    parser.add_argument("path", metavar="PATH", help=text)
    _add_offline(parser)


def _add_convert(parser: Parser) -> None:
    parser.add_argument("source", metavar="SRC", help="a file, a folder or a hub id")
    parser.add_argument("destination", metavar="DST", help="what to write; it appears whole or not at all")
    parser.add_argument("--to", required=True, choices=("safetensors", "hf", "pt"), help="a file, a folder or a file")
    parser.add_argument("--config", help="configuration whose model the weights have to fit, and take the layout of")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="number format [as it is]")
    layouts = ("ours", "original")
    parser.add_argument("--layout", choices=layouts, default="ours", help="'original': the authors' own [ours]")
    parser.add_argument("--force", action="store_true", help="replace what DST holds [no]")
    _add_offline(parser)


def _add_offline(parser: Parser) -> None:
    parser.add_argument("--offline", action="store_true", help="never ask the network for anything [no]")


def _add_export(parser: Parser) -> None:
    parser.add_argument("checkpoint", help="experiment folder, one of its checkpoints, or a model folder")
    parser.add_argument("destination", metavar="DST", help="folder to write config.json and weights into")
    parser.add_argument("--no-ema", action="store_true", help="take the trained weights, not their average [no]")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="number format [as they are]")


def _adder(kind: Any) -> Callable[[Parser], None]:
    """What adds a configuration and the flags of such settings."""

    def add(parser: Parser) -> None:
        parser.usage = "%(prog)s CONFIG [flags]"
        parser.add_argument("config", metavar="CONFIG", help="configuration file, or its name below configs/")
        add_flags(parser, kind)

    return add


def _add_table(parser: Parser) -> None:
    parser.add_argument(
        "folder", metavar="FOLDER", help="folder with videos and images, each beside its text in a .txt"
    )
    parser.add_argument("table", metavar="OUT.csv", help="table to write; it appears whole or not at all")
    parser.add_argument("--force", action="store_true", help="replace a table that is there [no]")
    text = "files without a text: make it of their names, or refuse them [names]"
    parser.add_argument("--captions", choices=("names", "required"), default="names", help=text)


def _add_buckets(parser: Parser) -> None:
    parser.add_argument("table", metavar="TABLE", help="table with the columns path, num_frames, height and width")
    parser.add_argument("config", metavar="CONFIG", help="configuration of the training, with its bucket_config")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks that share the data [1]")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="the epoch to show; each draws anew [0]")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed [as the configuration says]")
    parser.add_argument("--pad", action="store_true", help="repeat rows instead of dropping what fills no batch [no]")
    folder = "./samples/buckets"
    parser.add_argument("--save-dir", default=folder, metavar="FOLDER", help=f"for the rows and the picture [{folder}]")
    parser.add_argument("--trust-config", action="store_true", help="run the configuration as a program [no]")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="other settings [none]")


# Verb -> what it does, a command line to start from, and what adds its arguments.
VERBS: dict[str, tuple[str, str, Callable[[Parser], None]]] = {
    "generate": ("make videos or images from prompts", f"opensora generate {PROMPT}", _add_request),
    "plan": (
        "say what generate would do with the same arguments, without doing it",
        f"opensora plan {PROMPT}", _add_request,
    ),
    "continue": (
        "finish what generate --draft or --steps-until began",
        "opensora continue samples/sample_0000.draft.safetensors", _add_continue,
    ),
    "replay": (
        "make an output again from its own recipe and compare",
        "opensora replay samples/sample_0000.mp4", _add_replay,
    ),
    "inspect": (
        "say what a checkpoint holds, or how an output was made",
        "opensora inspect samples/sample_0000.mp4", _add_inspect,
    ),
    "convert": (
        "write a checkpoint in another format, or a published one in ours",
        "opensora convert SRC DST --to safetensors", _add_convert,
    ),
    "export": ("write a model for inference from a training run", "opensora export RUN DST", _add_export),
    "train": (
        "train a diffusion model, as scripts/train.py does",
        "opensora train embedded/train/stdit3", _adder(TrainSettings),
    ),
    "train-vae": (
        "train an autoencoder, as scripts/train_vae.py does",
        "opensora train-vae embedded/train/vae_2d", _adder(TrainSettings),
    ),
    "table": (
        "write a table of the videos in a folder, to train on",
        "opensora table my-videos my-videos.csv", _add_table,
    ),
    "buckets": (
        "say which rows of a table are trained at what size, or why not",
        "opensora buckets my-videos.csv embedded/train/finetune_buckets", _add_buckets,
    ),
    "extract": (
        "encode a table of videos once, for training from the features",
        "opensora extract opensora-v1-2/misc/extract --data-path my-videos.csv", _adder(ExtractSettings),
    ),
    "search-bs": (
        "search the batch size of each bucket with training steps",
        "opensora search-bs opensora-v1-2/misc/bs --base-step-time 12", _adder(SearchSettings),
    ),
    "benchmark": ("time the stages of a request and write a report", f"opensora benchmark {PROMPT}", _add_benchmark),
    "models": ("list the models", "opensora models", lambda parser: None),
}  # fmt: skip
