"""Measures what an adapter of the embedded model teaches: generates, measures the pixels, prints a table.

The prompts name something new (docs/lora.md), a shape, a motion or both, in scenes that were not trained on. Flags that
are not listed go to `opensora generate`, such as `--lora my-lora/diagonal`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opensora import cli
from opensora.cli.program import run_program
from opensora.datasets.synthetic.measure import measure
from opensora.datasets.synthetic.render import NEW_MOTIONS, NEW_SHAPES, make_new_clip
from opensora.datasets.video import contact_sheet, read_video, tile, write_image
from opensora.pipeline.output_folder import check_folder

SIDE, SHOWN = 64, 12  # pixels of a clip; clips in the picture
FIRST = 40  # scenes before it are those of the clips; for a shape no later one has their colour, motion and background
SEEDS = 10  # one seed gives every prompt the same noise: groups of prompts get seeds of their own


def main(argv: Sequence[str] | None = None) -> int:
    """Generates into the folder, and writes evaluation.json and evaluation.png beside the clips."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("new", nargs="+", choices=[*NEW_SHAPES, *NEW_MOTIONS], help="what all prompts name")
    parser.add_argument("--num-prompts", type=int, default=100, help="number of prompts [100]")
    parser.add_argument("--seed", type=int, default=2024, help="of the prompts, and the first of the videos [2024]")
    parser.add_argument("--save-dir", default="./samples/lora", help="receives the clips [./samples/lora]")
    args, extra = parser.parse_known_args(argv)
    folder = Path(check_folder(args.save_dir))
    numbers = range(FIRST, FIRST + args.num_prompts)
    clips = [make_new_clip(args.seed, number, args.new, 1, SIDE, SIDE) for number in numbers]
    for seed, part in enumerate(np.array_split(np.arange(len(clips)), min(SEEDS, len(clips))), start=args.seed):
        span = ["--start-index", str(part[0]), "--end-index", str(part[-1] + 1), "--seed", str(seed)]
        flags = ["--save-dir", str(folder), "--overwrite", *span, *extra]
        if status := cli.main(["generate", *(clip.text for clip in clips), *flags]):
            return status
    videos = [read_video(folder / f"sample_{index:04d}.mp4")[0] for index in range(len(clips))]
    found = [measure(video, new=True)._asdict() for video in videos]
    asked = [{name: getattr(clip.scene, name) for name in one} for clip, one in zip(clips, found, strict=True)]
    right = {
        name: 100 * sum(one[name] == of[name] for one, of in zip(found, asked, strict=True)) / len(clips)
        for name in found[0]
    }
    right["all together"] = 100 * sum(one == of for one, of in zip(found, asked, strict=True)) / len(clips)
    for name, percent in right.items():
        print(f"{name:14}{percent:6.1f} %")
    rows = [{"prompt": clip.text, "measured": one} for clip, one in zip(clips, found, strict=True)]
    report = {"new": args.new, "percent_right": right, "clips": rows}
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sheets = [contact_sheet(video, columns=8, most=8, side=SIDE) for video in videos[:SHOWN]]
    print(write_image(tile(sheets, columns=2, gap=8), folder / "evaluation.png"))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
