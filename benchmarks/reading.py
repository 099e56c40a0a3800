"""Clips per second and memory of reading 51 random frames from 10-second 720p files, against decoding whole files.

python benchmarks/reading.py [--files 2] [--clips 12] [--output FILE]

The files are made on the spot: textures that move in two directions under film grain, H.264, with a key frame every
24 frames, every 48 (what streaming services ask for), and every 250 (the default of x264). Three ways are timed in
turn, clip by clip, on one thread: `span` is what the data sets do; `whole` decodes the file into memory, then makes
the same frames small; `stream` decodes it frame by frame and keeps only the wanted ones. Peak memory is that of a
fresh process for each way.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from opensora.datasets.transforms import resize_crop
from opensora.datasets.video import iterate_video, read_span, read_video

HEIGHT, WIDTH, FPS, SECONDS = 720, 1280, 24, 10
NUM_FRAMES, TARGET = 51, (240, 426)
KEY_FRAMES = (24, 48, 250)


def make_file(path: Path, seed: int, key_every: int) -> None:
    """Writes a video of two textures that slide over one another, with grain that changes from frame to frame."""
    import av

    generator = np.random.default_rng(seed)
    far, near = (_texture(generator, cells) for cells in (16, 6))
    hole = near[..., :1] > 128
    grain = generator.normal(0, 4, (HEIGHT + 64, WIDTH + 64, 1)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", key_every
        for number in range(SECONDS * FPS):
            place = (3 * number, number)
            picture = np.where(_window(hole, *place), _window(near, *place), _window(far, number, 0))
            y, x = generator.integers(0, 64, 2)
            noisy = picture + grain[y : y + HEIGHT, x : x + WIDTH]
            frame = av.VideoFrame.from_ndarray(noisy.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _texture(generator: np.random.Generator, cells: int) -> np.ndarray:
    """uint8 [2 H, 2 W, 3], smooth noise with `cells` spots a height."""
    spots = torch.from_numpy(generator.integers(0, 256, (1, 3, 2 * cells, 4 * cells), dtype=np.uint8)).float()
    large = torch.nn.functional.interpolate(spots, (2 * HEIGHT, 2 * WIDTH), mode="bicubic").clamp(0, 255)
    return large[0].permute(1, 2, 0).byte().numpy()


def _window(texture: np.ndarray, right: int, down: int) -> np.ndarray:
    return texture[down : down + HEIGHT, right : right + WIDTH]


def span(path: Path, start: int) -> torch.Tensor:
    frames, _ = read_span(
        path, lambda total: range(start, start + NUM_FRAMES), lambda frame: resize_crop(frame[None], TARGET)
    )
    return torch.cat(frames, dim=1)


def whole(path: Path, start: int) -> torch.Tensor:
    frames = read_video(path)[0][start : start + NUM_FRAMES]
    return torch.cat([resize_crop(frame[None], TARGET) for frame in frames], dim=1)


def stream(path: Path, start: int) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    for number, frame in enumerate(iterate_video(path, 10_000)):
        if start <= number < start + NUM_FRAMES:
            kept.append(resize_crop(frame[None], TARGET))
    return torch.cat(kept, dim=1)


WAYS: dict[str, Callable[[Path, int], torch.Tensor]] = {"span": span, "whole": whole, "stream": stream}


def measure(files: Sequence[Path], starts: Sequence[int]) -> dict[str, dict[str, float]]:
    """Seconds a clip by the clock and of the processor, for each way; the ways take turns at every clip."""
    clock, busy = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, 0.0)
    for number, start in enumerate(starts):
        path, made = files[number % len(files)], {}
        for way in np.roll(list(WAYS), number):
            began = time.perf_counter(), time.process_time()
            made[way] = WAYS[way](path, start)
            clock[way] += time.perf_counter() - began[0]
            busy[way] += time.process_time() - began[1]
        assert all(torch.equal(made["span"], clip) for clip in made.values()), "the ways differ in their frames"
    count = len(starts)
    return {way: {"seconds": clock[way] / count, "processor_seconds": busy[way] / count} for way in WAYS}


def peak(way: str, path: Path, starts: Sequence[int]) -> float:
    """MiB that a fresh process needs at most for some clips, beyond what it had before the first."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (way, path, list(starts)))


def _peak(way: str, path: Path, starts: list[int]) -> float:
    torch.set_num_threads(1)
    list(islice(iterate_video(path, 10_000), 1))  # libraries are loaded
    before = _high_water()
    for start in starts:
        WAYS[way](path, start)
    return _high_water() - before


def _high_water() -> float:
    """MiB that this process has needed at most; getrusage would count its parent's in."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2, help="files of each kind")
    parser.add_argument("--clips", type=int, default=12, help="clips read from the files of each kind")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/reading.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator, results = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        for key_every in KEY_FRAMES:
            files = [Path(folder) / f"{key_every}_{number}.mp4" for number in range(args.files)]
            for seed, file in enumerate(files):
                make_file(file, seed, key_every)
            starts = generator.integers(0, SECONDS * FPS - NUM_FRAMES + 1, args.clips).tolist()
            result = measure(files, starts)
            for way in WAYS:
                result[way]["peak_mib"] = peak(way, files[0], starts[:3])
            rate = sum(file.stat().st_size for file in files) * 8 / len(files) / SECONDS / 1e6
            ratios = {way: result[way]["seconds"] / result["span"]["seconds"] for way in ("whole", "stream")}
            results.append({"key_frame_every": key_every, "megabit_per_second": rate, "ways": result, "ratios": ratios})
            print(line(results[-1]), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "clips": args.clips, "target": TARGET}
    args.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(f"{args.output}")


def line(result: dict) -> str:
    ways, ratios = result["ways"], result["ratios"]
    rates = ", ".join(f"{way} {1 / ways[way]['seconds']:.2f} ({ways[way]['peak_mib']:.0f} MiB)" for way in WAYS)
    head = f"key frame every {result['key_frame_every']:3d}, {result['megabit_per_second']:.1f} Mbit/s"
    return f"{head}: clips/s {rates}; {ratios['whole']:.1f}x whole, {ratios['stream']:.1f}x stream"


if __name__ == "__main__":
    main()
