"""Renders clips of something that the embedded model does not know, with captions: what docs/lora.md trains on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora.cli.program import run_program
from opensora.datasets.synthetic.render import NEW_MOTIONS, NEW_SHAPES, Clip, make_clip, make_new_clip
from opensora.datasets.video import write_video
from opensora.pipeline.output_folder import check_folder

NUM_FRAMES, SIDE, FPS = 17, 64, 24  # of the clips that the embedded model was trained on


def main(argv: Sequence[str] | None = None) -> int:
    """Writes FOLDER/new_0000.mp4, its caption in new_0000.txt, and so on; known_0000.mp4 for known scenes."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("new", choices=[*NEW_SHAPES, *NEW_MOTIONS], help="what all clips show")
    parser.add_argument("folder", help="receives the clips")
    parser.add_argument("--num", type=int, default=40, help="number of clips [40]")
    parser.add_argument("--known", type=int, default=0, help="number of further clips, of what the model knows [0]")
    parser.add_argument("--seed", type=int, default=1, help="other seeds give other clips [1]")
    args = parser.parse_args(argv)
    folder = Path(check_folder(args.folder))
    for index in range(args.num):
        write(make_new_clip(args.seed, index, [args.new], NUM_FRAMES, SIDE, SIDE), folder / f"new_{index:04d}")
    for index in range(args.known):
        write(make_clip(args.seed, index, NUM_FRAMES, SIDE, SIDE), folder / f"known_{index:04d}")
    print(folder)
    return 0


def write(clip: Clip, path: Path) -> None:
    """Writes a clip and its caption to `path` with .mp4 and .txt."""
    write_video(clip.video, path.with_suffix(".mp4"), FPS)
    path.with_suffix(".txt").write_text(clip.text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_program(main))
