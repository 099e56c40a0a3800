"""Trains the embedded model from nothing, in stages that can be interrupted: run it again and it goes on.

A stage whose result is there (OUTPUTS/STAGE/ema) is skipped; one that has a checkpoint is resumed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from opensora.cli.parser import Parser
from opensora.training.checkpoint.folders import checkpoints

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "embedded" / "train"
EMBEDDED = ROOT / "opensora" / "embedded"


class Stage(NamedTuple):
    """A training program with its configuration, and what it takes of other stages."""

    config: str  # below CONFIGS; of the text encoder: the captions it learns
    begins: str | None = None  # stage whose weights it begins with
    features: str | None = None  # folder of a transformer, which also takes the recipe's encoders
    restorer: str | None = None  # stage of the transformer whose latents a decoder learns


class Recipe(NamedTuple):
    """The stages of a model in order, the autoencoder that its transformer learns from, and what is exported."""

    stages: dict[str, Stage]
    vae: str
    exported: dict[str, str]  # folder in the package -> stage
    small: bool = False  # whether there are configurations for a CPU, in a folder `cpu` beside the others


RECIPES = {
    "shapes": Recipe(
        {
            "text_encoder": Stage("shapes"),
            "vae_2d": Stage("vae_2d.py"),
            "vae_temporal": Stage("vae_temporal.py", "vae_2d"),
            "stdit3": Stage("stdit3.py", None, "features"),
            "stdit3_masks": Stage("stdit3_masks.py", "stdit3", "features_masks"),
            "stdit3_extend": Stage("stdit3_extend.py", "stdit3_masks", "features_masks"),
            "stdit3_correct": Stage("stdit3_correct.py", "stdit3_extend", "features_correct"),
            "vae_decoder": Stage("vae_decoder.py", "vae_temporal", restorer="stdit3_correct"),
        },
        "vae_temporal",
        {"text_encoder": "text_encoder", "vae": "vae_decoder", "stdit3": "stdit3_correct"},
    ),
    "world": Recipe(
        {
            "text_encoder": Stage("world"),
            "vae_frames": Stage("world/vae_frames.py"),
            "vae_video": Stage("world/vae_video.py", "vae_frames"),
            "vae_decoder": Stage("world/vae_decoder.py", "vae_video"),
            "stdit3": Stage("world/stdit3.py", None, "features"),
            "stdit3_masks": Stage("world/stdit3_masks.py", "stdit3", "features_masks"),
        },
        "vae_video",
        {"world/text_encoder": "text_encoder", "world/vae": "vae_decoder", "world/stdit3": "stdit3_masks"},
        small=True,
    ),
}


def smaller(stage: Stage) -> Stage:
    """The stage with the configuration for a CPU; their results are alike, so each stage may have either."""
    folder, _, name = stage.config.rpartition("/")
    return stage._replace(config=f"{folder}/cpu/{name}") if folder else stage


def plan(recipe: Recipe, name: str, outputs: Path, flags: Sequence[str], export_dtype: str) -> list[list[str]]:
    """The commands (script and arguments) that are left to run for a stage; none when its result is there."""
    result = {stage: outputs / stage / "ema" for stage in recipe.stages}
    if name == "export":
        pairs = [(str(result[trained]), str(EMBEDDED / part)) for part, trained in recipe.exported.items()]
        return [["scripts/misc/export.py", *pair, "--dtype", export_dtype] for pair in pairs]
    if (result[name] / "config.json").is_file():  # the last file of a model to be written
        return []
    stage = recipe.stages[name]
    if name == "text_encoder":
        return [["scripts/train_text_encoder.py", "--output", str(result[name]), "--captions", stage.config]]
    inputs = ["--ckpt-path", str(result[stage.begins])] if stage.begins else []
    if stage.features:
        inputs += ["--vae-path", str(result[recipe.vae]), "--text-encoder-path", str(result["text_encoder"])]
        inputs += ["--cfg-options", f"dataset.features={str(outputs / stage.features)!r}"]
    if stage.restorer:
        inputs += ["--text-encoder-path", str(result["text_encoder"])]
        inputs += ["--cfg-options", f"restorer.from_pretrained={str(result[stage.restorer])!r}"]
    script = "scripts/train.py" if stage.features else "scripts/train_vae.py"
    arguments = [str(CONFIGS / stage.config), "--outputs", str(outputs / name), *flags, *inputs]
    begun = [folder for folder in sorted((outputs / name).glob("[0-9][0-9][0-9]*-*")) if checkpoints(folder)]
    return [[script, *arguments, *(["--load", str(begun[-1])] if begun else [])]]


def run(command: Sequence[str]) -> int:
    """Runs a script of this repository; returns its exit status."""
    return subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode


def main(argv: Sequence[str] | None = None) -> int:
    names = dict.fromkeys(name for recipe in RECIPES.values() for name in recipe.stages)
    parser = Parser(description=__doc__)
    parser.add_argument("--model", choices=tuple(RECIPES), default="shapes", help="what the clips show")
    parser.add_argument("--outputs", type=Path, help="folder of the training runs; default: outputs/embedded or /world")
    parser.add_argument("--stages", nargs="+", choices=(*names, "export"), help="default: all of them")
    parser.add_argument("--small", action="store_true", help="small batches and windows, for a CPU (world)")
    parser.add_argument("--device", help="device to train on")
    parser.add_argument("--dtype", help="bf16, fp16 or fp32: precision of the training")
    parser.add_argument("--export-dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of the package")
    args = parser.parse_args(argv)
    recipe = RECIPES[args.model]
    if args.small:
        if not recipe.small:
            parser.error(f"--model {args.model} has one size; leave --small out")
        recipe = recipe._replace(stages={name: smaller(stage) for name, stage in recipe.stages.items()})
    outputs = args.outputs or Path("outputs", {"shapes": "embedded"}.get(args.model, args.model))
    flags = [word for name in ("device", "dtype") if (value := getattr(args, name)) for word in (f"--{name}", value)]
    for stage in (*recipe.stages, "export"):
        if args.stages and stage not in args.stages:
            continue
        commands = plan(recipe, stage, outputs, flags, args.export_dtype)
        print(f"{stage}: {'done' if not commands else 'running'}", flush=True)
        for command in commands:
            if status := run(command):
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
