"""Renders clips of something that the embedded model does not know, with captions: what docs/lora.md trains on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora.cli.program import run_program
from opensora.datasets.synthetic.render import NEW_MOTIONS, NEW_SHAPES, make_new_clip
from opensora.datasets.video import write_video
from opensora.pipeline.output_folder import check_folder

NUM_FRAMES, SIDE, FPS = 17, 64, 8  # of the clips that the embedded model was trained on


def main(argv: Sequence[str] | None = None) -> int:
    """Writes FOLDER/0000.mp4, its caption in 0000.txt, and so on."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("new", choices=[*NEW_SHAPES, *NEW_MOTIONS], help="what all clips show")
    parser.add_argument("folder", help="receives the clips")
    parser.add_argument("--num", type=int, default=40, help="number of clips [40]")
    parser.add_argument("--seed", type=int, default=1, help="other seeds give other clips [1]")
    args = parser.parse_args(argv)
    folder = Path(check_folder(args.folder))
    for index in range(args.num):
        clip = make_new_clip(args.seed, index, args.new, NUM_FRAMES, SIDE, SIDE)
        write_video(clip.video, folder / f"{index:04d}.mp4", FPS)
        (folder / f"{index:04d}.txt").write_text(clip.text + "\n", encoding="utf-8")
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
