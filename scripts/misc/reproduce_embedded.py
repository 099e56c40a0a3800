"""Trains the embedded model from nothing, in stages that can be interrupted: run it again and it goes on.

A stage whose result is there (OUTPUTS/STAGE/ema) is skipped; one that has a checkpoint is resumed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora.training.checkpoint.folders import checkpoints

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "embedded" / "train"
EMBEDDED = ROOT / "opensora" / "embedded"
TRAINED = ("text_encoder", "vae_2d", "vae_temporal", "stdit3", "stdit3_masks", "stdit3_extend", "vae_decoder")
BEGUN = {  # stage -> the one whose result it begins with
    "vae_temporal": "vae_2d", "stdit3_masks": "stdit3", "stdit3_extend": "stdit3_masks", "vae_decoder": "vae_temporal",
}  # fmt: skip
FEATURES = {"stdit3": "features", "stdit3_masks": "features_masks", "stdit3_extend": "features_masks"}
EXPORTED = {"text_encoder": "text_encoder", "vae": "vae_decoder", "stdit3": "stdit3_extend"}  # in the package -> stage


def plan(stage: str, outputs: Path, flags: Sequence[str], export_dtype: str) -> list[list[str]]:
    """The commands (script and arguments) that are left to run for a stage; none when its result is there."""
    result = {name: outputs / name / "ema" for name in TRAINED}
    if stage == "export":
        pairs = [(str(result[trained]), str(EMBEDDED / name)) for name, trained in EXPORTED.items()]
        return [["scripts/misc/export.py", *pair, "--dtype", export_dtype] for pair in pairs]
    if (result[stage] / "config.json").is_file():  # the last file of a model to be written
        return []
    if stage == "text_encoder":
        return [["scripts/train_text_encoder.py", "--output", str(result[stage])]]
    encoders = ["--vae-path", str(result["vae_temporal"]), "--text-encoder-path", str(result["text_encoder"])]
    inputs = ["--ckpt-path", str(result[BEGUN[stage]])] if stage in BEGUN else []
    script = "scripts/train_vae.py"
    if stage in FEATURES:
        script = "scripts/train.py"
        inputs += [*encoders, "--cfg-options", f"dataset.features={str(outputs / FEATURES[stage])!r}"]
    arguments = [str(CONFIGS / f"{stage}.py"), "--outputs", str(outputs / stage), *flags, *inputs]
    begun = [folder for folder in sorted((outputs / stage).glob("[0-9][0-9][0-9]*-*")) if checkpoints(folder)]
    return [[script, *arguments, *(["--load", str(begun[-1])] if begun else [])]]


def run(command: Sequence[str]) -> int:
    """Runs a script of this repository; returns its exit status."""
    return subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode


def main(argv: Sequence[str] | None = None) -> int:
    stages = (*TRAINED, "export")
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--outputs", type=Path, default=Path("outputs/embedded"), help="folder of the training runs")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages, help="default: all of them")
    parser.add_argument("--device", help="device to train on")
    parser.add_argument("--dtype", help="bf16, fp16 or fp32: precision of the training")
    parser.add_argument("--export-dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of the package")
    args = parser.parse_args(argv)
    flags = [word for name in ("device", "dtype") if (value := getattr(args, name)) for word in (f"--{name}", value)]
    for stage in sorted(args.stages, key=stages.index):
        commands = plan(stage, args.outputs, flags, args.export_dtype)
        print(f"{stage}: {'done' if not commands else 'running'}", flush=True)
        for command in commands:
            if status := run(command):
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
