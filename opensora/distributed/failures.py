"""Failures of ranks: one message for a run, lost peers, and a launcher that is gone."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from opensora.distributed.ranks import rank, started_by_torchrun, world_size
from opensora.errors import OpenSoraError

GRACE_SECONDS = 30.0  # in which a rank may save after its launcher is gone
POLL_SECONDS = 1.0  # between two checks of the launcher
FAILED_KEY = "opensora/failed"  # in the store of all ranks: the first rank that failed
# How gloo reports a connection that is closed or silent; other back ends raise a DistError.
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|timeout caused pair closure|gloo/", re.IGNORECASE
)


@contextmanager
def report_first_failure() -> Iterator[None]:
    """Only the first failing rank raises; the others exit with code 1.

    A failing rank ends the others: they lose their connection, or torchrun ends them. If a rank is gone without an
    error of its own, each of the others reports in one line that it is lost.
    """
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        lost = lost_rank_error(error)
        if _another_failed_first(default=lost is None):
            time.sleep(1)  # lets that rank print its message before torchrun ends it
            raise SystemExit(1) from None
        if lost is not None:
            raise lost from error
        raise


def _another_failed_first(default: bool) -> bool:
    """Whether another rank has recorded a failure in the shared store; otherwise records this one.

    `default` is returned if the store is gone with the rank that held it. A rank that has lost another one records
    nothing.
    """
    from torch.distributed.rendezvous import rendezvous

    own, connected = str(rank()), dist.is_initialized()
    try:
        store = dist.distributed_c10d._get_default_store() if connected else next(rendezvous("env://"))[0]
        if not default:
            return store.check([FAILED_KEY])
        return store.compare_set(FAILED_KEY, "", own).decode() != own
    except Exception:
        return default


def lost_rank_error(error: BaseException | None) -> OpenSoraError | None:
    """The error of a rank that cannot reach the others, in one line; None for any other error."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            reason = " ".join(re.sub(r"^\[[^]]*\]", "", str(error).partition("\n")[0]).split())[:120]
            remedy = "check its log, and restart all ranks; resume training with --load"
            return OpenSoraError(f"rank {rank()} has lost another rank ({reason}); {remedy}")
        error = error.__cause__ or error.__context__
    return None


def exit_with_launcher() -> None:
    """Ends this process after torchrun is gone: by SIGTERM, and GRACE_SECONDS later by force."""
    if started_by_torchrun():
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_SECONDS)
    sys.stderr.write(f"error: rank {rank()}: the process that started it has ended, so this rank exits\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)
