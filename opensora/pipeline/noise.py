"""Random numbers of a request: the same (seed, sample, loop) gives the same noise, whatever the batch around it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def noise_generator(seed: int, sample: int, loop: int = 0, stream: str = "edit") -> torch.Generator:
    """A CPU generator that depends on nothing but its four keys.

    `sample` is the index of the video in the whole request (not in its batch), `loop` the index of the clip in that
    video, and `stream` names what is drawn, so that one use never shifts another. The keys are hashed, not added:
    (seed 1, sample 0) and (seed 0, sample 1) have nothing in common. PyTorch's CPU generator looks at 32 bits of a
    seed, so those are what is taken.
    """
    key = f"{int(seed)}/{int(sample)}/{int(loop)}/{stream}".encode()
    digest = hashlib.blake2b(key, digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def initial_noise(seed: int, sample: int, loop: int, shape: Sequence[int]) -> torch.Tensor:
    """Standard-normal latent [C, T, H, W] of one clip, float32 on the CPU; move and split it afterwards."""
    return torch.randn(tuple(shape), generator=noise_generator(seed, sample, loop, stream="initial"))
