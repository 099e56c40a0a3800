"""Requests of the embedded model in one batch against the same requests one by one, in one process, in turn.

python -m benchmarks.batches [--batch-size 4] [--num-frames 17] [--steps 10] [--rounds 3] [--device NAME]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import opensora
from opensora.pipeline.recipe import frames_digest

PROMPT = "a red circle moving right"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    pipe = opensora.load("embedded", device=args.device, num_frames=args.num_frames, steps=args.steps)
    seconds: dict[int, list[float]] = {1: [], args.batch_size: []}
    digests: dict[int, list[str]] = {}
    pipe(PROMPT, num_inference_steps=1)  # reads the weights
    for _ in range(args.rounds):
        for size, taken in seconds.items():
            begin = time.perf_counter()
            videos = pipe(PROMPT, num_videos_per_prompt=args.batch_size, batch_size=size)
            taken.append(time.perf_counter() - begin)
            digests[size] = [frames_digest(video.frames) for video in videos]
    single, together = (statistics.median(taken) for taken in seconds.values())
    print(
        f"{args.batch_size} requests one by one {single:.2f} s, in one batch {together:.2f} s: {single / together:.2f}x"
    )
    print("same bytes" if digests[1] == digests[args.batch_size] else "other bytes")


if __name__ == "__main__":
    main()
