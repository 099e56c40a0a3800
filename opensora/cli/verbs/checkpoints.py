"""inspect, convert, export, models: weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from opensora.checkpoints.hub import locate
from opensora.cli import preflight
from opensora.cli.parser import Parser
from opensora.cli.verbs.verb import Verb
from opensora.config import load_config
from opensora.errors import ConfigError

DTYPES = ("fp16", "bf16", "fp32")
LORA = ("lora-diffusers", "lora-peft", "lora-comfyui", "lora-kohya")
FORMATS = ("safetensors", "hf", "pt", "int8", "fp8", *LORA)


def _inspect(args: argparse.Namespace) -> int:
    locate(args.path, offline=args.offline)  # refuses a missing file before torch is imported
    from opensora.pipeline.recipe_report import describe_output, is_output

    if is_output(args.path):
        print(describe_output(args.path))
        return 0
    from opensora.checkpoints import inspect

    print(inspect(args.path, args.offline))
    return 0


def _convert(args: argparse.Namespace) -> int:
    locate(args.source, offline=args.offline)
    if args.to in LORA:
        from opensora.checkpoints.lora_conversion import convert_adapter

        print(convert_adapter(args.source, args.destination, args.to, args.config, args.force, args.offline))
        return 0
    from opensora.checkpoints import convert

    written = convert(
        source=args.source, destination=args.destination, to=args.to, config=args.config, dtype=args.dtype,
        layout=args.layout, force=args.force, offline=args.offline,
    )  # fmt: skip
    print(written)
    return 0


def _export(args: argparse.Namespace) -> int:
    if args.to == "hub":
        return _export_hub(args)
    preflight.check_exists(args.checkpoint)
    from opensora.acceleration.precision import DTYPES
    from opensora.training.checkpoint.export import export

    print(export(Path(args.checkpoint), Path(args.destination), not args.no_ema, DTYPES.get(args.dtype)))
    return 0


def _export_hub(args: argparse.Namespace) -> int:
    """Exports a run, or the models of a configuration, as a hub folder."""
    config, _ = load_config(args.config or args.checkpoint)
    if Path(args.destination).exists():
        raise ConfigError(f"{args.destination} exists; choose another folder")
    from opensora.acceleration.precision import DTYPES
    from opensora.pipeline.hub_export import export_hub_folder
    from opensora.pipeline.model_card import CardFacts

    facts = CardFacts(
        args.license,
        args.base_model,
        args.training and Path(args.training),
        [Path(file) for file in args.samples or []],
    )
    with TemporaryDirectory() as work:
        if args.config:
            from opensora.training.checkpoint.export import export

            preflight.check_exists(args.checkpoint)
            export(Path(args.checkpoint), Path(work), not args.no_ema, DTYPES.get(args.dtype))
            config["model"] = {**config["model"], "from_pretrained": work}
        for summary in export_hub_folder(config, Path(args.destination), facts).values():
            print(summary)
    return 0


def _models(_: argparse.Namespace) -> int:
    from opensora.config.model_zoo import table

    print(table())
    return 0


def _add_inspect(parser: Parser) -> None:
    text = "a weight file, folder, hub id or published file name; or an mp4, png, recipe .json or draft of generate"
    parser.add_argument("path", metavar="PATH", help=text)
    _add_offline(parser)


def _add_convert(parser: Parser) -> None:
    parser.add_argument("source", metavar="SRC", help="a file, a folder or a hub id")
    parser.add_argument("destination", metavar="DST", help="file or folder to write, whole or not at all")
    text = "hf is a folder; int8 and fp8 quantize; lora-... are layouts of adapters"
    parser.add_argument("--to", required=True, choices=FORMATS, help=text)
    parser.add_argument("--config", help="configuration whose model the weights must fit")
    parser.add_argument("--dtype", choices=DTYPES, help="number format [unchanged]")
    text = "key names: this package's, or the authors' own [ours]"
    parser.add_argument("--layout", choices=("ours", "original"), default="ours", help=text)
    parser.add_argument("--force", action="store_true", help="replace DST [no]")
    _add_offline(parser)


def _add_export(parser: Parser) -> None:
    text = "experiment folder, one of its checkpoints, or a model folder; with --to hub also a configuration"
    parser.add_argument("checkpoint", help=text)
    parser.add_argument("destination", metavar="DST", help="folder to write config.json and weights into")
    parser.add_argument("--to", choices=("model", "hub"), default="model", help="hub: all models, with a card [model]")
    parser.add_argument("--config", help="of hub: configuration of the other models and the sampler [none]")
    parser.add_argument("--license", default="other", help="of hub: license id for the card [other]")
    parser.add_argument("--base-model", help="of hub: id of the model it was trained from [none]")
    parser.add_argument("--training", metavar="FILE", help="of hub: training configuration to show in the card [none]")
    parser.add_argument(
        "--samples", nargs="+", metavar="FILE", help="of hub: outputs of generate to show in the card [none]"
    )
    parser.add_argument("--no-ema", action="store_true", help="export the trained weights, not their EMA [no]")
    parser.add_argument("--dtype", choices=DTYPES, help="number format [unchanged]")


def _add_offline(parser: Parser) -> None:
    parser.add_argument("--offline", action="store_true", help="never use the network [no]")


VERBS = {
    "inspect": Verb(
        "describe a checkpoint, or the recipe of an output",
        "opensora inspect samples/sample_0000.mp4", _add_inspect, _inspect,
    ),
    "convert": Verb(
        "convert a checkpoint to another format, number type or key layout",
        "opensora convert SRC DST --to safetensors", _add_convert, _convert,
    ),
    "export": Verb("export a trained model for inference", "opensora export RUN DST", _add_export, _export),
    "models": Verb("list the models", "opensora models", lambda parser: None, _models),
}  # fmt: skip
