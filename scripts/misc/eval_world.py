"""Measures a model of the drawn world: generates clips, recognizes what they show and finds what a person would mind.

Half of the prompts name combinations that were held out of training. Flags that are not listed go to
`opensora generate`, for example `--num-sampling-steps 50`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensora import cli
from opensora.acceleration.device import pick_device
from opensora.acceleration.precision import inference_dtype
from opensora.checkpoints import builder
from opensora.cli.program import run_program
from opensora.config import find_config, read_config
from opensora.config.settings import InferenceSettings
from opensora.datasets.synthetic.dataset import to_model
from opensora.datasets.synthetic.world.assess import ALL, assess
from opensora.datasets.synthetic.world.clips import Clip, make_clip
from opensora.datasets.video import contact_sheet, read_video, tile, to_uint8, write_image, write_video
from opensora.pipeline.output_folder import check_folder

FPS, SIDE = 8, 128
BARS = {"thing": 93, "colour": 98, "motion": 95, "scene": 98, "camera": 95, ALL: 85}  # least percent right
TWO_THINGS = 70  # least percent of two-thing clips of which all is right
MOST_LOWER = 5  # points that held-out combinations may lie below trained ones
MOST_FLAWED = {"wavers": 1, "melts": 2, "flickers": 1}  # most percent
EXAMPLES = 24  # rows of the picture
SEEDS = 10  # one seed gives every prompt the same noise: groups of prompts get seeds of their own
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the evaluation; 1 if `--bars` is given and missed, else 0."""
    args, extra = _parser().parse_known_args(argv)
    folder = check_folder(args.save_dir)
    frames, height, width = map(int, args.size.split("x"))
    clips = [make_clip(args.seed, i, frames, height, width, held_out=i % 2 == 1) for i in range(args.num_prompts)]
    paths = [folder / f"sample_{i:04d}.mp4" for i in range(args.num_prompts)]
    report: dict[str, Any] = {"num_prompts": args.num_prompts, "seed": args.seed, "size": args.size}
    if args.source == "rendered":
        for clip, path in zip(clips, paths, strict=True):
            write_video(clip.video, path, FPS)
    elif args.source == "autoencoder":
        report["psnr"] = reconstruct(clips, paths, args.model, args.vae_path)
        print(f"PSNR {report['psnr']['mean']:.2f} dB mean, {report['psnr']['least']:.2f} least")
    elif args.source == "generated" and (status := generate(clips, args.model, folder, args.seed, extra)):
        return status
    rows = [judge(clip, path, held_out=i % 2 == 1) for i, (clip, path) in enumerate(zip(clips, paths, strict=True))]
    report |= {"figures": figures(rows), "failures": (failures := find_failures(figures(rows)))}
    print_figures(report["figures"])
    (folder / "evaluation.json").write_text(json.dumps({**report, "clips": rows}, indent=2) + "\n", encoding="utf-8")
    shown = np.unique(np.linspace(0, len(rows) - 1, EXAMPLES).round().astype(int))  # evenly spaced, not chosen
    print(write_image(tile([draw(rows[i], folder) for i in shown], columns=2, gap=8), folder / "evaluation.png"))
    if args.bars and failures:
        print("below the bars: " + "; ".join(failures), file=sys.stderr)
        return 1
    return 0


def generate(clips: list[Clip], model: str, folder: Path, first_seed: int, extra: list[str]) -> int:
    """Makes a clip of each caption with `opensora generate`; returns its exit status."""
    flags = ["--model", model, "--save-dir", str(folder), "--overwrite", *extra]
    for seed, part in enumerate(np.array_split(np.arange(len(clips)), min(SEEDS, len(clips))), start=first_seed):
        numbers = ["--seed", str(seed), "--start-index", str(part[0]), "--end-index", str(part[-1] + 1)]
        if status := cli.main(["generate", *(clip.text for clip in clips), *flags, *numbers]):
            return status
    return 0


@torch.inference_mode()
def reconstruct(clips: list[Clip], paths: list[Path], model: str, vae_path: str | None) -> dict[str, float]:
    """Writes the clips as the autoencoder gives them back, and returns their PSNR in dB: what a model can reach."""
    config = find_config(model)
    values = read_config(config)
    values["vae"] = {**values["vae"], **({"from_pretrained": vae_path} if vae_path else {})}
    settings = InferenceSettings.from_config(values, config.name)
    device = pick_device(settings.device)
    vae, _ = builder.load_component(settings.vae, "vae", device, inference_dtype(device, settings.dtype))
    ratios = []
    for clip, path in zip(clips, paths, strict=True):
        x = to_model([clip.video]).to(next(vae.parameters()))
        back = to_uint8(vae.decode(vae.encode(x, sample=False), num_frames=x.shape[2])[0].float())
        error = np.square(back.astype(float) - clip.video).mean()
        ratios.append(10 * np.log10(255**2 / max(error, 1e-3)))
        write_video(back, path, FPS)
    return {"mean": float(np.mean(ratios)), "least": float(np.min(ratios))}


def judge(clip: Clip, path: Path, held_out: bool) -> Row:
    """A row of the report."""
    verdict = assess(clip.world, read_video(path)[0])
    row: Row = {"file": path.name, "prompt": clip.text, "held_out": held_out, "two": len(clip.world.actors) > 1}
    row |= {"seen": verdict.seen, "right": verdict.right}
    if verdict.flaws:
        row["flaws"] = {**verdict.flaws._asdict(), **{name: getattr(verdict.flaws, name) for name in MOST_FLAWED}}
    return row


def figures(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Percent right of each group of clips, percent flawed, and the median of the softest edges."""
    one = [row for row in rows if not row["two"]]
    groups = {
        "trained": [row for row in one if not row["held_out"]], "held out": [row for row in one if row["held_out"]],
        "all": one, "two things": [row for row in rows if row["two"]],
    }  # fmt: skip
    found = {group: _percent([row["right"] for row in members]) for group, members in groups.items()}
    flaws = [row["flaws"] for row in one if "flaws" in row]
    edge = {"edge": float(np.median([flaw["edge"] for flaw in flaws]))} if flaws else {}
    flawed = [{name: flaw[name] for name in MOST_FLAWED if name in flaw} for flaw in flaws]
    return {**found, "flawed": _percent(flawed) | edge}


def _percent(rows: list[dict[str, bool]]) -> dict[str, float]:
    """How often each name is true, of the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: 100 * float(np.mean([row[name] for row in rows if name in row])) for name in names}


def find_failures(found: dict[str, dict[str, float]]) -> list[str]:
    """The bars that were missed, in words."""
    missed = [
        f"{name} {found['all'][name]:.1f} % (bar {bar} %)"
        for name, bar in BARS.items()
        if found["all"].get(name, 100) < bar
    ]
    if found["two things"].get(ALL, 100) < TWO_THINGS:
        missed.append(f"two things {found['two things'][ALL]:.1f} % (bar {TWO_THINGS} %)")
    if found["held out"].get(ALL, 100) < found["trained"].get(ALL, 0) - MOST_LOWER:
        missed.append(f"held out {found['held out'][ALL]:.1f} % (trained {found['trained'][ALL]:.1f} %)")
    most = MOST_FLAWED.items()
    return missed + [
        f"{name} {found['flawed'][name]:.1f} %" for name, bar in most if found["flawed"].get(name, 0) > bar
    ]


def print_figures(found: dict[str, dict[str, float]]) -> None:
    for group, rates in found.items():
        print(f"{group:12}" + "  ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))


def draw(row: Row, folder: Path) -> np.ndarray:
    """A strip uint8 [H, W, 3] of six frames over the prompt and the verdict."""
    from PIL import Image, ImageDraw

    strip = contact_sheet(read_video(folder / row["file"])[0], columns=6, most=6, side=SIDE)
    image = Image.fromarray(np.pad(strip, ((0, 32), (0, 0), (0, 0)), constant_values=40))
    wrong = [f"{name}: {row['seen'].get(name)}" for name, right in row["right"].items() if not right and name != ALL]
    wrong += [name for name in MOST_FLAWED if row.get("flaws", {}).get(name)]
    drawn = ImageDraw.Draw(image)
    drawn.text((6, len(strip)), row["prompt"][:120], fill="white")
    verdict = f"{'held out' if row['held_out'] else 'trained'}: {', '.join(wrong) or 'right'}"
    drawn.text((6, len(strip) + 15), verdict, fill="salmon" if wrong else "lightgreen")
    return np.asarray(image)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="embedded", help="configuration to generate with")
    parser.add_argument("--vae-path", help="weights of the autoencoder for --source autoencoder")
    parser.add_argument("--num-prompts", type=int, default=300, help="half of them held out of training")
    parser.add_argument(
        "--size", default="17x128x128", help="frames x height x width of --source rendered, autoencoder"
    )
    parser.add_argument("--seed", type=int, default=2024, help="of the prompts, and the first of the videos")
    parser.add_argument("--save-dir", default="./samples/world", help="receives the videos, a JSON and a picture")
    parser.add_argument("--bars", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument(
        "--source", choices=("generated", "files", "rendered", "autoencoder"), default="generated",
        help="the model's clips; those of an earlier run; perfect ones; perfect ones that were encoded and decoded",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main))
