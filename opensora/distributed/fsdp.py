"""Fully sharded parameters (FSDP2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from opensora.acceleration.device import HOST
from opensora.acceleration.model_parts import blocks_of, kept_in_float32
from opensora.distributed.process_group import RankLayout


def shard(model: nn.Module, layout: RankLayout, dtype: torch.dtype | None = None) -> None:
    """Shards the parameters over all ranks, block by block and then the rest; does nothing for one rank.

    Every rank must hold the same values before. Parameters keep their dtype. With `dtype`, an accelerator computes in
    that type and reduces gradients in float32. Parameters `kept_in_float32` are replicated. Parameters are resharded
    after each use, so that no stale copy of a changed parameter is left.
    """
    if layout.mesh is None:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = layout.mesh.device_type
    mesh = init_device_mesh(device, (layout.world_size,))
    mixed = dtype is not None and device != HOST.type
    param_dtype, reduce_dtype = (dtype, torch.float32) if mixed else (None, None)
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype, cast_forward_inputs=False)
    replicated = {parameter for name, parameter in model.named_parameters() if kept_in_float32(name)}
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # outputs are never written to
    for part in (*blocks_of(model), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=replicated)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, sharing its memory; a tensor that is not sharded is returned."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float = math.inf) -> Tensor:
    """Scales all gradients down to a total norm of `max_norm`; returns their norm before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
