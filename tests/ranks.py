"""Runs a function under several ranks: processes of their own, connected by gloo over loopback through a file."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from opensora.cli.program import run_program

TIMEOUT = 250  # seconds, for all that the ranks do
PRELOADED = [
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch.multiprocessing.spawn", "torch._dynamo",
    "torch.utils.tensorboard", "tokenizers", "opensora.models.text_encoder.cleaning", "opensora.models.vae.vae",
    "opensora.pipeline.pipeline", "opensora.training.autoencoder", "opensora.training.diffusion",
]  # fmt: skip


def fork_server() -> Any:
    """The context whose processes are forks of a server that has imported torch once, and has done nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What `function(*args)`, of the top level of a module, returns on each rank. Raises what a rank has met."""
    with TemporaryDirectory() as folder:
        deadline = time.monotonic() + timeout
        fork_server()
        how = {"join": False, "start_method": "forkserver"}
        context = mp.start_processes(_rank, (ranks, folder, function, args), ranks, **how)
        try:
            while not context.join(max(deadline - time.monotonic(), 0.1), grace_period=5):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{ranks} ranks did not end in {timeout} seconds")
        except mp.ProcessRaisedException as error:
            told = [path.read_text() for path in Path(folder).glob("error*")]
            raise AssertionError("\n".join(told) or str(error)) from None
        finally:
            for process in context.processes:
                process.kill()
        return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(ranks)]


def apart(function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> Any:
    """What `function(*args)` returns in a process of its own, which it may change as it likes."""
    with TemporaryDirectory() as folder:
        process = fork_server().Process(target=_apart, args=(folder, function, args))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        if (error := Path(folder) / "error").exists():
            raise AssertionError(error.read_text())
        assert process.exitcode == 0, f"the process ended with {process.exitcode}"
        return torch.load(Path(folder) / "result", weights_only=False)


class End(NamedTuple):
    """How a rank ended: its exit code, negative for a signal, and what it wrote to standard error."""

    code: int
    stderr: str


def ends(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[End]:
    """How the ranks end that run `function(*args)` as the program of each of them."""
    with TemporaryDirectory() as folder:
        context = fork_server()
        processes = [
            context.Process(target=_program, args=(rank, ranks, folder, function, args)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.1))
            process.kill()
            process.join()
        told = [(Path(folder) / f"stderr{rank}").read_text() for rank in range(ranks)]
        return [End(process.exitcode, text) for process, text in zip(processes, told, strict=True)]


def _program(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    os.dup2(os.open(Path(folder) / f"stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)

    def program() -> Any:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        return function(*args)

    sys.exit(run_program(program))


def _apart(folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), Path(folder) / "result")
    except BaseException:
        (Path(folder) / "error").write_text(traceback.format_exc())
        raise


def _rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        result = function(*args)
        torch.save(result, Path(folder) / f"result{rank}")
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
