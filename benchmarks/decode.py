"""Decoding a clip with the published autoencoder of Open-Sora 1.2, random weights: plain against the fast path.

python -m benchmarks.decode [--size 96 160] [--frames 17] [--repeats 3] [--threads N] [--output results]

The plain side decodes a clip as a whole; the package gives its frames in pieces, as uint8. `bf16` is the package in
that type (`--cpu-dtype bf16` of a request), where the processor has products for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import common, plain
from opensora.acceleration.placement import to_device
from opensora.acceleration.precision import multiplies_bf16
from opensora.datasets.video import to_uint8
from opensora.models.vae.vae import OpenSoraVAE_V1_2, VideoAutoencoderPipeline

TINY = dict(
    vae_2d=dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
    vae_temporal=dict(filters=32, num_res_blocks=1, temporal_downsample=(False, True, True)),
)


def build(**config: Any) -> tuple[VideoAutoencoderPipeline, VideoAutoencoderPipeline]:
    """The autoencoder as the package runs it, and as it was built, with one set of weights."""
    torch.manual_seed(0)
    fast, slow = (OpenSoraVAE_V1_2(**config).eval().requires_grad_(False) for _ in range(2))
    fast.load_state_dict(slow.state_dict())
    return to_device(fast, torch.device("cpu")), slow


def streamed(vae: VideoAutoencoderPipeline, z: Tensor, num_frames: int) -> list[Any]:
    """The pieces of a clip, each uint8 before the next is made."""
    return [to_uint8(piece[0]) for piece in vae.decoded(z, num_frames)]


@torch.no_grad()
def main() -> None:
    given = common.arguments(__doc__, repeats=3, size=[96, 160], frames=17, tiny=0)
    fast, slow = build(**(TINY if given.tiny else {}))
    z = torch.randn(1, 4, *fast.get_latent_size((given.frames, *given.size)))
    exact = plain.decode(slow, z, given.frames)
    errors = {"fast": common.relative_error(fast.decode(z, given.frames), exact)}
    sides = {
        "plain": lambda: to_uint8(plain.decode(slow, z, given.frames)[0]),
        "fast": lambda: streamed(fast, z, given.frames),
    }
    if multiplies_bf16():
        half, rounded = to_device(common.cast(slow, torch.bfloat16), torch.device("cpu")), z.bfloat16()
        errors["bf16"] = common.relative_error(half.decode(rounded, given.frames), exact)
        sides["bf16"] = lambda: streamed(half, rounded, given.frames)
    times = common.race(sides, given.repeats)
    flops = common.convolution_flops(slow, sides["plain"])
    report = {
        "size": [given.frames, *given.size], "times": times, "faster": common.ratios(times), "relative_error": errors,
        "products": common.bound(flops, common.peak_flops(), times, plain=sides["plain"], fast=sides["fast"]),
    }  # fmt: skip
    report["summary"] = common.summary(report)
    common.save("decode", report, {"decode": {side: t["seconds"] for side, t in times.items()}}, given.output)


if __name__ == "__main__":
    main()
