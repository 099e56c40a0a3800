"""A whole request to the embedded model: text, 30 guided steps, decoding, frames. Plain against the fast path.

python -m benchmarks.request [--steps 30] [--repeats 5] [--threads N] [--output results]

Both sides hold their weights already. Plainly the text is padded to the model's longest, as published, both when it is
encoded and when it is read in every step. `int8` is the fast path with the model's linear layers in 8 bits.
`share` is the part of each side's time that the products of the model's linear layers would take at the best pace that
this machine shows for any product.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import common, plain
from opensora.acceleration.placement import to_device
from opensora.acceleration.quantization import KINDS, quantize
from opensora.checkpoints import builder
from opensora.checkpoints.fit import load_weights
from opensora.config import read_config
from opensora.datasets.video import to_uint8
from opensora.models.sizes import size_conditioning
from opensora.pipeline.noise import initial_noise, noise_generator
from opensora.pipeline.step_cache import psnr
from opensora.schedulers.rf import RFLOW, sampling_times

PROMPT = "a red circle moving left on a black background"
CPU = torch.device("cpu")


class Parts(NamedTuple):
    """What a request needs."""

    encoder: Any
    model: Any
    vae: Any


def read(config: dict[str, Any]) -> Parts:
    """The parts of a configuration with their weights, as they were built."""
    paths = {name: builder.find_weights(config[name], name) for name in ("text_encoder", "model", "vae")}
    encoder = builder.build_text_encoder(config["text_encoder"], paths["text_encoder"], torch.float32)
    built = {name: builder.build_model(config[name], paths[name]) for name in ("model", "vae")}
    load_weights(encoder.model, paths["text_encoder"])
    for name, module in built.items():
        load_weights(module, paths[name])
        module.eval().requires_grad_(False)
    return Parts(encoder, built["model"], built["vae"])


@torch.inference_mode()
def fast_request(parts: Parts, config: dict[str, Any], steps: int) -> np.ndarray:
    """Frames as the package makes them."""
    scheduler = RFLOW(num_sampling_steps=steps, cfg_scale=config["scheduler"]["cfg_scale"])
    text, noise, told = parts.encoder.encode([PROMPT])[0], *start(parts, config)
    null = {"y": parts.model.null_caption(text)}
    z = scheduler.sample(parts.model, noise, {"y": text, **told}, null, precompute=True)
    return np.concatenate([to_uint8(piece[0]) for piece in parts.vae.decoded(z, config["num_frames"])])


def plain_request(parts: Parts, config: dict[str, Any], steps: int) -> np.ndarray:
    """The same frames by the plain formulation."""
    encoder, longest = parts.encoder, parts.encoder.model_max_length
    real = torch.tensor(encoder.tokenizer.ids(PROMPT, longest))
    ids = F.pad(real, (0, longest - len(real)), value=encoder.tokenizer.pad_id)[None]
    mask = F.pad(torch.ones_like(real), (0, longest - len(real)))[None]
    with torch.no_grad():
        y = encoder.model(ids, mask)[:, None]
    noise, told = start(parts, config)
    null, times = parts.model.y_embedder.y_embedding[None, None, :longest], sampling_times(steps).tolist()
    scale, source = config["scheduler"]["cfg_scale"], noise_generator(config["seed"], 0, 0)
    told = {name: told[name] for name in ("fps", "height", "width")}
    z = plain.sample(parts.model, noise, y, mask, null, times, scale, source, **told)
    return to_uint8(plain.decode(parts.vae, z, config["num_frames"])[0])


def start(parts: Parts, config: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Noise, and what the model is told of the size."""
    frames, size = config["num_frames"], config["image_size"]
    shape = (parts.vae.out_channels, *parts.vae.get_latent_size((frames, *size)))
    told = size_conditioning(config["multi_resolution"], 1, size, frames, config["fps"])
    return initial_noise(config["seed"], 0, 0, shape)[None], told


def main() -> None:
    given = common.arguments(__doc__, config="configs/embedded/inference/sample.py", steps=30)
    config = read_config(given.config)
    parts = read(config)
    model = plain.PlainSTDiT3(parts.model.config).eval().requires_grad_(False)
    model.load_state_dict(parts.model.state_dict())
    slow = Parts(copy.deepcopy(parts.encoder), model, copy.deepcopy(parts.vae))
    small = {kind: parts._replace(model=to_device(quantize(copy.deepcopy(parts.model), kind), CPU)) for kind in KINDS}
    for module in (parts.encoder.model, parts.model, parts.vae):
        to_device(module, CPU)
    sides = {
        "plain": lambda: plain_request(slow, config, given.steps),
        "fast": lambda: fast_request(parts, config, given.steps),
        "int8": lambda: fast_request(small["int8"], config, given.steps),
    }
    expected, made = (sides[name]().astype(int) for name in ("plain", "fast"))
    times = common.race(sides, given.repeats)
    report = {"times": times, "faster": common.ratios(times), "steps": given.steps}
    flops = common.linear_flops(parts.model, sides["fast"])
    compared = {name: sides[name] for name in ("plain", "fast")}
    report["products"] = common.bound(flops, common.peak_flops(), times, **compared)
    report["pixels that differ"] = float((expected != made).mean())
    report["largest difference of levels"] = int(abs(expected - made).max())
    for kind, one in small.items():
        report[f"psnr of {kind} in dB"] = psnr(fast_request(one, config, given.steps), expected)
    report["summary"] = {key: value for key, value in report.items() if key not in ("times", "steps")}
    common.save("request", report, {"request": {side: t["seconds"] for side, t in times.items()}}, given.output)


if __name__ == "__main__":
    main()
