"""Measures a model of moving shapes on text, given frames and edits at several sizes; prints and writes figures.

References are rendered, so that what should follow is known. Everything is measured on the decoded pixels.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora import registry
from opensora.acceleration.device import pick_device
from opensora.acceleration.precision import inference_dtype
from opensora.checkpoints import builder
from opensora.cli.parser import Parser
from opensora.cli.program import run_program
from opensora.config import find_config, read_config
from opensora.config.settings import InferenceSettings
from opensora.datasets.synthetic.dataset import to_model
from opensora.datasets.synthetic.measure import measure
from opensora.datasets.synthetic.render import CANONICAL, Clip, caption, make_clip
from opensora.datasets.video import contact_sheet, tile, to_uint8, write_image
from opensora.models.sizes import size_conditioning
from opensora.models.text_encoder.cleaning import preprocess
from opensora.pipeline.noise import initial_noise, noise_generator
from opensora.pipeline.output_folder import check_folder

SIZES = ("17x64x64", "34x64x64", "1x64x64", "17x48x80", "34x48x80", "1x48x80", "17x80x48", "34x80x48", "1x80x48")
CHUNK, CHUNK_LATENTS = 17, 5
EDITS = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLES = 6
LOOPS = 6
Figures = dict[str, float]


class Maker:
    """The parts of a configuration, and batches of clips of one size made with them."""

    def __init__(self, settings: InferenceSettings, size: tuple[int, int, int], seed: int) -> None:
        self.settings, self.size, self.seed = settings, size, seed
        self.device = pick_device(settings.device)
        self.dtype = inference_dtype(self.device, settings.dtype)
        how = (self.device, self.dtype, settings.offline)
        self.model, _ = builder.load_component(settings.model, "model", *how)
        self.vae, _ = builder.load_component(settings.vae, "vae", *how)
        self.text_encoder, _ = builder.load_component(settings.text_encoder, "text_encoder", *how)
        self.scheduler = registry.build(settings.scheduler)

    def clips(self, count: int) -> list[Clip]:
        """Scenes that training never saw: every second one of a combination that was held out."""
        return [make_clip(self.seed, index, *self.size, held_out=index % 2 == 1) for index in range(count)]

    @torch.inference_mode()
    def encode(self, videos: Sequence[np.ndarray]) -> Tensor:
        """The latents [B, C, T', H, W] of uint8 clips [T, H, W, 3]."""
        return self.vae.encode(to_model(list(videos)).to(self.device, self.dtype), sample=False).float()

    @torch.inference_mode()
    def make(self, texts: Sequence[str], given: Tensor | None = None, edit: Tensor | None = None) -> list[np.ndarray]:
        """Clips uint8 [T, H, W, 3] for the texts; `given` [B, C, T', H, W] counts where `edit` [T'] is below 1."""
        frames, height, width = self.size
        batch = range(len(texts))
        shape = (self.vae.out_channels, *self.vae.get_latent_size(self.size))
        noise = torch.stack([initial_noise(self.seed, index, 0, shape) for index in batch]).to(self.device)
        if given is not None and edit is not None:
            noise[:, :, edit < 1] = given[:, :, edit < 1]
            edit = edit.expand(len(texts), -1)
        y, mask = self.text_encoder.encode([preprocess(text) for text in texts])
        y = y.to(self.device, self.dtype)
        kind = self.settings.multi_resolution or "STDiT2"
        told = size_conditioning(kind, len(texts), (height, width), frames, self.settings.fps, device=self.device)
        cond = {"y": y, "mask": mask.to(self.device), **told}
        null = {"y": self.model.null_caption(y)}
        source = [noise_generator(self.seed, index, 0) for index in batch]
        known = {"height": height, "width": width, "num_frames": frames}
        options = {**known, "edit": edit, "source": source, "precompute": True}
        latents = self.scheduler.sample(self.model, noise, cond, null, **options)
        parts = latents.to(self.dtype).split(8)
        decoded = torch.cat([self.vae.decode(part, num_frames=frames).float() for part in parts])
        return [to_uint8(one) for one in decoded]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB."""
    error = np.square(a.astype(float) - b).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def percent(values: Sequence[bool]) -> float:
    return 100 * float(np.mean(values))


def right(clips: Sequence[Clip], made: Sequence[np.ndarray], *names: str) -> Figures:
    """How many percent show what they should; without names all that a clip of this length can show."""
    names = names or ("shape", "colour", "background", *(["motion"] if len(made[0]) > 1 else []))
    shown = [measure(video) for video in made]
    rows = [[getattr(a, n) == getattr(b.scene, n) for n in names] for a, b in zip(shown, clips, strict=True)]
    rates = {name: percent([row[i] for row in rows]) for i, name in enumerate(names)}
    return rates | {"all": percent([all(row) for row in rows])}


def at_end(clips: Sequence[Clip], made: Sequence[np.ndarray]) -> Figures:
    """How many percent still show the object, in shape and colour, in their last four frames."""
    found = right(clips, [video[-4:] for video in made], "shape", "colour")
    return {f"{name}_at_end": value for name, value in found.items()}


def kept(name: str, made: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> Figures:
    """PSNR of frames that were given."""
    ratios = [psnr(a, b) for a, b in zip(made, wanted, strict=True)]
    return {f"{name}_psnr": float(np.mean(ratios)), f"{name}_psnr_least": min(ratios)}


def seams(made: Sequence[np.ndarray], at: int) -> Figures:
    """Change between frames at - 1 and at, over the median change of their neighbours (1 grey level at least)."""
    ratios = []
    for video in made:
        change = np.abs(np.diff(video.astype(float), axis=0)).mean((1, 2, 3))
        around = np.concatenate([change[max(at - 9, 0) : at - 1], change[at : at + 8]])
        ratios.append(float(change[at - 1] / max(np.median(around), 0.2)))
    return {"seam_median": float(np.median(ratios)), "seam_worst": max(ratios)}


def from_text(maker: Maker, clips: list[Clip]) -> tuple[Figures, list[np.ndarray]]:
    """Text alone."""
    made = maker.make([clip.text for clip in clips])
    return right(clips, made), made


def from_image(maker: Maker, clips: list[Clip]) -> tuple[Figures, list[np.ndarray]]:
    """The first frame is given as a picture."""
    first = [clip.video[:1] for clip in clips]
    given, edit = _placed(maker, {0: maker.encode(still(first))[:, :, :1]})
    made = maker.make([clip.text for clip in clips], given, edit)
    figures = kept("first", [video[:1] for video in made], first)
    return figures | at_end(clips, made) | right(clips, made), made


def between_images(maker: Maker, clips: list[Clip]) -> tuple[Figures, list[np.ndarray]]:
    """The first and the last frame are given as pictures."""
    first, last = [clip.video[:1] for clip in clips], [clip.video[-1:] for clip in clips]
    ends = {0: maker.encode(still(first))[:, :, :1], -1: maker.encode(still(last))[:, :, -1:]}
    given, edit = _placed(maker, ends)
    made = maker.make([clip.text for clip in clips], given, edit)
    figures = kept("first", [video[:1] for video in made], first)
    figures |= kept("last", [video[-1:] for video in made], last)
    return figures | right(clips, made), made


def still(frames: list[np.ndarray]) -> list[np.ndarray]:
    """Clips in which nothing moves, as `--image` and `--last-frame` encode a picture."""
    return [np.repeat(frame, CHUNK, axis=0) for frame in frames]


def extended(maker: Maker, clips: list[Clip]) -> tuple[Figures, list[np.ndarray]]:
    """The first 17 of 34 frames are given."""
    start = [clip.video[:CHUNK] for clip in clips]
    given, edit = _placed(maker, {0: maker.encode(start)})
    made = maker.make([clip.text for clip in clips], given, edit)
    figures = kept("given", [video[:CHUNK] for video in made], start) | seams(made, CHUNK)
    return figures | at_end(clips, made) | right(clips, made), made


def looped(maker: Maker, clips: list[Clip]) -> tuple[Figures, list[np.ndarray]]:
    """Six clips, each told a text of its own, each going on where the one before ends."""
    motions = [segments(np.random.default_rng((maker.seed, index))) for index in range(len(clips))]
    scenes = [[clip.scene._replace(motion=name) for name in names] for clip, names in zip(clips, motions, strict=True)]
    texts = [[caption(scene, CANONICAL, scene.motion) for scene in row] for row in scenes]
    parts = [maker.make([row[0] for row in texts])]
    made, carried = [list(part) for part in parts[0]], []
    for loop in range(1, LOOPS):
        given, edit = _placed(maker, {0: maker.encode([video[-CHUNK:] for video in made])})
        parts.append([video[CHUNK:] for video in maker.make([row[loop] for row in texts], given, edit)])
        made = [np.concatenate(pair) for pair in zip(made, parts[-1], strict=True)]
    figures = {}
    wanted = [[Clip(video, "", row[loop]) for row in scenes] for loop, video in enumerate(parts)]
    visible = np.array([right(want, part)["all"] for want, part in zip(wanted, parts, strict=True)])
    colour = [right(want, part, "colour")["colour"] for want, part in zip(wanted, parts, strict=True)]
    figures |= {"frames": len(made[0]), "segment": visible.mean(), "segment_least": visible.min()}
    figures |= {"colour": float(np.mean(colour)), "colour_least": min(colour)}
    for loop in range(1, LOOPS):
        carried.append(seams(made, maker.size[0] + (loop - 1) * (maker.size[0] - CHUNK))["seam_median"])
    return figures | {"seam_median": float(np.median(carried))} | at_end(wanted[-1], made), made


def segments(rng: np.random.Generator) -> list[str]:
    """A motion for each loop that has room where the ones before it end: along one line, or resting."""
    there, back = (("moving right", "moving left"), ("moving down", "moving up"))[rng.integers(2)]
    if rng.random() < 0.5:
        there, back = back, there
    names, position = [there], 0.82  # of the way that is open to it; a loop of half a clip's length goes half as far
    while len(names) < LOOPS:
        name, travel = ((there, 0.41), (back, -0.41), ("standing still", 0.0))[rng.choice(3, p=(0.4, 0.4, 0.2))]
        if -0.02 <= position + travel <= 1.02:
            names.append(name)
            position += travel
    return names


def edited(maker: Maker, clips: list[Clip]) -> tuple[Figures, list[np.ndarray]]:
    """A rendered clip is repainted from another text, from weakly to wholly: the stronger, the farther from it."""
    texts, reference = [clip.text for clip in clips[1:] + clips[:1]], [clip.video for clip in clips]
    latents = maker.encode(reference)
    made = [maker.make(texts, latents, torch.full(latents.shape[2:3], edit)) for edit in EDITS]
    far = np.array([[np.abs(a.astype(float) - b).mean() for a, b in zip(m, reference, strict=True)] for m in made])
    figures = {f"change_at_{edit}": float(row.mean()) for edit, row in zip(EDITS, far, strict=True)}
    figures["each_step_stronger"] = percent((np.diff(far, axis=0) > -0.5).all(axis=0).tolist())
    return figures, [strip for pair in zip(*made, strict=True) for strip in pair]


Job = Callable[[Maker, list[Clip]], tuple[Figures, list[np.ndarray]]]
JOBS: dict[str, tuple[int, Job]] = {  # name -> least number of frames, what is done
    "text": (1, from_text), "image": (2, from_image), "both_ends": (2, between_images),
    "extend": (34, extended), "loop": (34, looped), "edit": (2, edited),
}  # fmt: skip


def _placed(maker: Maker, frames: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Latents [B, C, T', H, W] that hold given ones from those latent frames on, and the edit [T'] that keeps them."""
    one = next(iter(frames.values()))
    count = maker.vae.get_latent_size(maker.size)[0]
    given, edit = torch.zeros(*one.shape[:2], count, *one.shape[3:], device=one.device), torch.ones(count)
    for start, latents in frames.items():
        where = slice(start % count, start % count + latents.shape[2])
        given[:, :, where], edit[where] = latents, 0
    return given, edit


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    folder = check_folder(args.save_dir)
    config = find_config(args.model)
    values = read_config(config)
    for section, path in (("model", args.ckpt_path), ("vae", args.vae_path)):
        if path:
            values[section] = {**values[section], "from_pretrained": path}
    settings = InferenceSettings.from_config(values, config.name)
    report: dict[str, dict[str, Figures]] = {}
    for name in args.sizes:
        frames, height, width = map(int, name.split("x"))
        maker = Maker(settings, (frames, height, width), args.seed)
        for job in args.jobs:
            least, run = JOBS[job]
            if frames < least:
                continue
            started = time.monotonic()
            clips = maker.clips(args.num)
            figures, made = run(maker, clips)
            report.setdefault(job, {})[name] = figures
            shown = "  ".join(f"{key} {value:.1f}" for key, value in figures.items())
            print(f"{job:10}{name:10}{shown}  ({time.monotonic() - started:.0f} s)", flush=True)
            strips = [contact_sheet(video, columns=12, most=12, side=64) for video in made[: EXAMPLES * 4]]
            write_image(tile(strips[: EXAMPLES * (4 if job == "edit" else 1)], columns=1), folder / f"{job}_{name}.png")
            (folder / "conditioning.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="configuration to generate with")
    parser.add_argument("--ckpt-path", help="weights of the model, in place of the configuration's")
    parser.add_argument("--vae-path", help="weights of the autoencoder, in place of the configuration's")
    parser.add_argument("--num", type=int, default=24, help="requests for each job and size")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="frames x height x width, such as 17x64x64")
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=tuple(JOBS))
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--save-dir", default="./samples/conditioning", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main))
