"""What the stages of a generation cost, counted on copies of the models without values (meta device)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opensora.acceleration.memory_plan import FAST, MemoryPlan
from opensora.acceleration.model_parts import kept_in_float32
from opensora.acceleration.replace_modules import copy_structure
from opensora.profiling.operation_counter import Cost, CountedModel


def meta_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` on the meta device, in the number types of inference in `dtype`."""

    def convert(name: str, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=_inference_dtype(name, tensor, dtype), device="meta")

    return copy_structure(model, convert)


def weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the parameters and buffers of a model in inference in `dtype`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.numel() * _inference_dtype(name, tensor, dtype).itemsize for name, tensor in tensors)


def _inference_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() and not kept_in_float32(name) else tensor.dtype


class CostModel:
    """Counts what the stages of a generation cost in `dtype` on `device`.

    It keeps a copy of each model, so that later counts trace what is new to them alone. The models must not change.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._copies: dict[tuple[nn.Module, bool], CountedModel] = {}

    def step(
        self, model: nn.Module, latent: tuple[int, ...], conditioning: Mapping[str, Tensor], tokens: int,
        batch: int = 2, frames_given: bool = False, plan: MemoryPlan = FAST,
    ) -> Cost:  # fmt: skip
        """One evaluation of a diffusion model.

        latent: (T, H, W); conditioning: its size conditioning; tokens: length of the text; batch: samples times
        guidance branches; frames_given: some frames are kept or edited.
        """
        inputs, others = _step_inputs(model, latent, conditioning, tokens, self.dtype, batch, frames_given)
        return self._copy(model, plan).count(lambda copy: copy(*inputs, **others))

    def decoding(self, vae: nn.Module, size: tuple[int, ...], streamed: bool = False) -> Cost:
        """Decoding one clip (T, H, W); `streamed`: in pieces, one of which is held at a time."""
        z = torch.empty(1, vae.out_channels, *vae.get_latent_size(size), dtype=self.dtype, device="meta")

        def decode(vae: Any) -> None:
            if streamed:
                deque(vae.decoded(z, num_frames=size[0]), maxlen=1)
            else:
                vae.decode(z, num_frames=size[0])

        return self._copy(vae).count(decode)

    def encoding(self, vae: nn.Module, size: tuple[int, ...], frames_at_once: int | None = None) -> Cost:
        """Encoding a video (T, H, W), `frames_at_once` frames at a time (None: all)."""
        pieces = torch.empty(1, 3, *size, dtype=self.dtype, device="meta").split(frames_at_once or size[0], dim=2)
        return self._copy(vae).count(lambda vae: vae.encoded(pieces))

    def _copy(self, model: nn.Module, plan: MemoryPlan = FAST) -> CountedModel:
        key = model, plan.chunked
        if key not in self._copies:
            copy = meta_copy(model, self.dtype)
            plan.prepare_model(copy)
            self._copies[key] = CountedModel(copy, self.device)
        return self._copies[key]


def _step_inputs(
    model: nn.Module, latent: tuple[int, ...], conditioning: Mapping[str, Tensor], tokens: int, dtype: torch.dtype,
    batch: int, frames_given: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:  # fmt: skip
    """(x, timestep, y) and the size conditioning of one evaluation, without values."""
    config: Mapping[str, Any] = model.config
    others = {name: value.to("meta") for name, value in conditioning.items()}
    if str(config.get("condition", "text")).startswith("label"):
        y = torch.empty(batch, dtype=torch.int64, device="meta")
    else:
        y = torch.empty(batch, 1, tokens, config["caption_channels"], dtype=dtype, device="meta")
    if frames_given:
        others["x_mask"] = torch.empty(batch, latent[0], dtype=torch.bool, device="meta")
    x = torch.empty(batch, model.in_channels, *latent, device="meta")
    return (x, torch.empty(batch, device="meta"), y), others


def text_cost(config: Any, parameters: int, tokens: int) -> Cost:
    """Encoding one text with a T5 or CLIP of this transformers configuration, in float32."""
    width = getattr(config, "d_model", None) or config.hidden_size
    inner = getattr(config, "d_ff", None) or config.intermediate_size
    heads = getattr(config, "num_heads", None) or config.num_attention_heads
    peak = 4 * tokens * (3 * inner + 6 * width + 3 * heads * tokens)
    blocks = parameters - width * config.vocab_size
    return Cost(products=2.0 * tokens * blocks, moved=4.0 * blocks, calls=500, peak=peak)
