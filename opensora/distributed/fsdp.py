"""How the ranks of a run are laid out, what they tell one another, and parameters sharded over them (FSDP2).

Ranks lie in a grid, data x sequence: those of a row share one batch, of which each computes other tokens. Parameters,
gradients and the optimizer's state are sharded over all ranks, and every gradient is the mean over all of them.
"""

from __future__ import annotations

import atexit
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.acceleration.device import take_own
from opensora.acceleration.model_parts import blocks_of, kept_in_float32
from opensora.distributed import peers
from opensora.distributed.peers import world_size
from opensora.errors import ConfigError, OpenSoraError

if TYPE_CHECKING:  # imported where they are used: they take as long as all of torch
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # for what one rank does while the others wait: encoding, hashing, writing
FAILED = "opensora/failed"  # key of the rank that tells of an error, in the store of all ranks


@dataclass(frozen=True)
class Layout:
    """The place of this process among the ranks of a run; ranks of one sequence follow one another."""

    rank: int = 0
    world_size: int = 1
    sequence_size: int = 1
    mesh: DeviceMesh | None = None  # of dimensions ("data", "sequence"); None for a single process

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank computes."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """The number of shares."""
        return self.world_size // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        """Which tokens of its batch this rank computes."""
        return self.rank % self.sequence_size

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and tells."""
        return self.rank == 0


def start(device: torch.device, sp_size: int = 1, timeout: float | None = None) -> Layout:
    """The layout of the ranks that torchrun has started, `sp_size` to a sequence; they are connected on the first call.

    They wait for one another for `timeout` seconds, or for as long as their back end has it. Other ranks than the
    first log errors only. Raises ConfigError when the ranks or the devices do not fit.
    """
    ranks, rank = world_size(), peers.rank()
    if ranks % sp_size:
        remedy = f"start a multiple of {sp_size} with torchrun --nproc_per_node, or change sp_size"
        raise ConfigError(f"sp_size {sp_size} does not divide the number of ranks, {ranks}; {remedy}")
    if ranks == 1:
        return Layout()
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        take_own(device, peers.local_rank())
        _connect(device, rank, ranks, timeout)
        atexit.register(stop)
        peers.end_with_launcher()
    if rank:
        logging.getLogger("opensora").setLevel(logging.ERROR)
    mesh = init_device_mesh(device.type, (ranks // sp_size, sp_size), mesh_dim_names=("data", "sequence"))
    return Layout(rank, ranks, sp_size, mesh)


def _connect(device: torch.device, rank: int, ranks: int, timeout: float | None) -> None:
    how = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    try:
        dist.init_process_group(dist.get_default_backend_for_device(device), rank=rank, world_size=ranks, **how)
    except ValueError as error:  # MASTER_ADDR or MASTER_PORT is not set, or no address
        said = " ".join(str(error).split())
        raise ConfigError(f"the ranks cannot be connected ({said}); {peers.ENVIRONMENT}") from error


def stop(layout: Layout | None = None) -> None:
    """Ends what connects the ranks."""
    _hosts.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def _hosts(patient: bool = False) -> Any:
    """A group of all ranks that no device takes part in, for a few numbers on the host, or to wait for long."""
    if not patient and dist.get_backend() == "gloo":
        return None  # the group of all that there is
    return dist.new_group(backend="gloo", **({"timeout": PATIENCE} if patient else {}))


def barrier(layout: Layout) -> None:
    """Waits until all ranks are here, however long that takes."""
    if layout.world_size > 1:
        dist.barrier(group=_hosts(patient=True))


def of_main(make: Callable[[], T], layout: Layout) -> T:
    """What `make` gives on the main rank, on every rank, however long it takes.

    Its OpenSoraError is raised on all of them.
    """
    if layout.world_size == 1:
        return make()
    made: Any = None
    if layout.is_main:
        try:
            made = make()
        except OpenSoraError as error:
            made = error
    barrier(layout)
    made = share(made, layout)
    if isinstance(made, OpenSoraError):
        raise made
    return made


def total(values: Sequence[float], layout: Layout) -> list[float]:
    """The sums over all ranks of a few numbers of their hosts; no device is waited for."""
    if layout.world_size == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers, group=_hosts())
    return numbers.tolist()


def share(value: T, layout: Layout) -> T:
    """The main rank's `value`, on every rank; any object that can be pickled. What other ranks pass is ignored."""
    if layout.world_size == 1:
        return value
    box = [value if layout.is_main else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T, layout: Layout) -> list[T]:
    """The values of all ranks in their order, on every rank."""
    if layout.world_size == 1:
        return [value]
    values: list[Any] = [None] * layout.world_size
    dist.all_gather_object(values, value)
    return values


def mean(tensor: Tensor, layout: Layout) -> Tensor:
    """`tensor` averaged over the ranks; ranks of one sequence hold the same, so it is the mean over the data."""
    if layout.world_size == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / layout.world_size


@contextmanager
def one_voice() -> Iterator[None]:
    """Lets one rank alone tell of what ended the run: the first that fails raises, the others leave with exit code 1.

    A rank that fails takes the others with it: they lose their connection or are ended by torchrun. Where a rank has
    gone without a word, each of the others says in one line that it has lost it.
    """
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        gone = peers.lost(error)
        if _told_by_another(silent=gone is None):
            time.sleep(1)  # the message comes before torchrun ends the rank that has it
            raise SystemExit(1) from None
        if gone is not None:
            raise gone from error
        raise


def _told_by_another(silent: bool) -> bool:
    """Whether another rank has failed before, by the store that all ranks share; else this one tells of it.

    `silent` is the answer where that store has gone with the rank that failed first.
    """
    own, connected = str(peers.rank()), dist.is_initialized()
    try:
        store = dist.distributed_c10d._get_default_store() if connected else next(dist.rendezvous("env://"))[0]
        if not silent:  # a rank that was lost has told of nothing
            return store.check([FAILED])
        return store.compare_set(FAILED, "", own).decode() != own
    except Exception:
        return silent


def shard(model: nn.Module, layout: Layout, dtype: torch.dtype | None = None) -> None:
    """Shards the parameters over all ranks, block by block and then the rest; nothing is done for one rank.

    Every rank must hold the same values before. Parameters keep their type. With `dtype` they are computed with in that
    type where the device is an accelerator, and their gradients are summed in float32. Parameters `kept_in_float32`
    stay whole. Nothing stays gathered after its use, so that a changed parameter never has a stale copy.
    """
    if layout.mesh is None:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = layout.mesh.device_type
    mesh = init_device_mesh(device, (layout.world_size,))
    mixed = dtype is not None and device != torch.empty(0).device.type
    policy = MixedPrecisionPolicy(*((dtype, torch.float32) if mixed else ()), cast_forward_inputs=False)
    whole = {parameter for name, parameter in model.named_parameters() if kept_in_float32(name)}
    options = {"mesh": mesh, "reshard_after_forward": True, "mp_policy": policy, "ignored_params": whole}
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody writes into outputs
    for part in (*blocks_of(model), model):
        fully_shard(part, **options)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank, sharing its memory; all of it, where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float = math.inf) -> Tensor:
    """The norm of all gradients, over all ranks; they are scaled down to `max_norm` where it is larger."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
