"""The initial noise of a clip, seeded by (seed, sample, loop) so that it does not depend on the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from opensora.pipeline.mask_strategy import ClipConditioning


def noise_generator(seed: int, sample: int, loop: int = 0, stream: str = "edit") -> torch.Generator:
    """A CPU generator seeded by a hash of its four keys.

    `sample` is the index of the video among those of its prompt, not in its batch; `loop` the index of the clip in that
    video; `stream` names the use: different uses have independent numbers. Hashing makes (seed 1, sample 0)
    and (seed 0, sample 1) independent. PyTorch's CPU generator uses 32 bits of a seed.
    """
    key = f"{int(seed)}/{int(sample)}/{int(loop)}/{stream}".encode()
    digest = hashlib.blake2b(key, digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def initial_noise(seed: int, sample: int, loop: int, shape: Sequence[int]) -> torch.Tensor:
    """Standard-normal latent [C, T, H, W] of one clip, float32 on the CPU; move and split it afterwards."""
    return torch.randn(tuple(shape), generator=noise_generator(seed, sample, loop, stream="initial"))


def condition_latents(
    noise: Tensor, references: Sequence[Tensor], conditioning: ClipConditioning
) -> tuple[Tensor, Tensor]:
    """Noise [C, T, H, W] with frames of the encoded references [C, T', H, W] in place, and `edit` [T] float32."""
    latents = noise.clone()
    for frame, source in enumerate(conditioning.sources):
        if source is not None:
            reference, reference_frame = source
            latents[:, frame] = references[reference][:, reference_frame].to(latents)
    return latents, torch.tensor(conditioning.edit)
