"""Memory plans: how a request trades speed for memory. The result is the same, to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from opensora.acceleration.chunked_forward import chunk_blocks
from opensora.models.vae.vae import frames_at_once

CHUNK_TOKENS = 2**13  # of a chunked forward pass: enough for efficient matrix products


@dataclass(frozen=True)
class MemoryPlan:
    """What saves memory."""

    name: str
    sequential_cfg: bool = False  # the guidance branches are computed one after the other
    single_frames: bool = False  # large frames are encoded one at a time
    chunked: bool = False  # the parts of transformer blocks take CHUNK_TOKENS tokens at a time
    offload: bool = False  # weights are on an accelerator only while they are used

    def split_video(self, video: Tensor) -> Sequence[Tensor]:
        """A video [..., T, H, W] as the parts that are encoded one after the other."""
        frames, height, width = video.shape[-3:]
        return video.split(frames_at_once(height, width) if self.single_frames else frames, dim=-3)

    def prepare_model(self, model: nn.Module) -> None:
        """Wraps the parts of a diffusion model's blocks as the plan says."""
        if self.chunked:
            chunk_blocks(model, CHUNK_TOKENS)


FAST, BALANCED, LOW = PLANS = (
    MemoryPlan("fast"),
    MemoryPlan("balanced", sequential_cfg=True, single_frames=True),
    MemoryPlan("low", sequential_cfg=True, single_frames=True, chunked=True, offload=True),
)
BY_NAME = {plan.name: plan for plan in PLANS}
