"""The process group of a run, and the place of each rank in it.

Ranks form a mesh, data x sequence: the ranks of a row share a batch, and each computes other tokens of it. Parameters,
gradients and optimizer state are sharded over all ranks, and every gradient is the mean over all of them.
"""

from __future__ import annotations

import atexit
import logging
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from opensora.acceleration.device import HOST, is_cpu, set_device
from opensora.distributed.failures import exit_with_launcher
from opensora.distributed.ranks import Ranks, ranks
from opensora.errors import ConfigError

if TYPE_CHECKING:  # imported where it is used: it takes as long as all of torch
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = 1800  # seconds
LONG_WAIT = timedelta(days=1)  # for what one rank does while the others wait: encoding, hashing, writing


@dataclass(frozen=True)
class RankLayout:
    """The place of this process among the ranks of a run; the ranks of one sequence are consecutive."""

    rank: int = 0
    world_size: int = 1
    sequence_size: int = 1  # ranks that share a sequence
    mesh: DeviceMesh | None = None  # with dimensions ("data", "sequence"); None for a single process

    @property
    def data_rank(self) -> int:
        """The data-parallel index of this rank."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """The data-parallel size."""
        return self.world_size // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        """The index of this rank within its sequence."""
        return self.rank % self.sequence_size

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and logs."""
        return self.rank == 0


def start(device: torch.device, sp_size: int = 1, timeout: float = TIMEOUT) -> RankLayout:
    """The layout of the ranks that torchrun has started, `sp_size` to a sequence; the first call connects them.

    Collectives time out after `timeout` seconds. Those of tensors on the host go by gloo. Ranks other than the first
    log errors only. Raises ConfigError if the environment, `sp_size` or the devices do not fit.
    """
    connected = dist.is_initialized()
    own = ranks(connecting=not connected)
    if own.world_size % sp_size:
        remedy = f"start a multiple of {sp_size} with torchrun --nproc_per_node, or change sp_size"
        raise ConfigError(f"sp_size {sp_size} does not divide the number of ranks, {own.world_size}; {remedy}")
    if own.world_size == 1:
        return RankLayout()
    from torch.distributed.device_mesh import init_device_mesh

    if not connected:
        connect(set_device(device, own.local_rank), own, timeout)
        atexit.register(stop)
        exit_with_launcher()
    if own.rank:
        logging.getLogger("opensora").setLevel(logging.ERROR)
    shape = (own.world_size // sp_size, sp_size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "sequence"))
    return RankLayout(own.rank, own.world_size, sp_size, mesh)


def connect(device: torch.device, own: Ranks, timeout: float) -> None:
    """Creates the process group of ranks whose tensors are on `device`, their own, and on the host."""
    backend, own_device = dist.get_default_backend_for_device(device), None
    if not is_cpu(device):
        backend, own_device = f"{HOST.type}:gloo,{device.type}:{backend}", device
    dist.init_process_group(
        backend, rank=own.rank, world_size=own.world_size, timeout=timedelta(seconds=timeout), device_id=own_device
    )


def stop() -> None:
    """Destroys the process group."""
    host_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def host_group(long_wait: bool = False) -> dist.ProcessGroup | None:
    """A gloo group of all ranks, for values on the host; with `long_wait` its timeout is LONG_WAIT.

    None is the default group, if that is a gloo group.
    """
    if not long_wait and dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo", timeout=LONG_WAIT if long_wait else None)
