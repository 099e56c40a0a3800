"""`python -m opensora.serving.ray_worker`: a worker whose jobs are computed by an actor on a Ray cluster.

It speaks the messages of `opensora.serving.worker`, so that the server knows no difference, and alone reads and writes
the data folder: it adds the files of a job to its message, and stores those that come back before it passes on that
they are there. When the actor or its machine is lost, it ends as a local worker does. It imports no torch.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opensora import __version__
from opensora.distributed.ray_cluster import connected
from opensora.errors import ConfigError, OpenSoraError
from opensora.files import atomic_write
from opensora.pipeline.adapter_uses import adapter_uses
from opensora.serving import folders
from opensora.serving.adapters import adapter_files
from opensora.serving.channel import Message, WorkerChannel
from opensora.serving.models import Models, load_models
from opensora.serving.ray_actor import Files, WorkerActor

logger = logging.getLogger("opensora")

START_SECONDS = 600.0  # until a machine of the cluster has room for the actor


class Relay:
    """Passes messages between the server and an actor, and the files that belong to them."""

    def __init__(self, ray: Any, channel: WorkerChannel, actor: Any) -> None:
        self._ray, self._channel, self._actor = ray, channel, actor
        self._sent: set[str] = set()  # adapters that the actor has

    def deliver(self, message: Message) -> None:
        """Passes a message of the server on, in the thread of the channel."""
        try:
            self._ray.get(self._actor.deliver.remote(message, self._files_of(message)))
        except Exception as error:  # the server sees the end of this process
            logger.error("a message cannot be delivered to the actor (%s)", type(error).__name__)
            os._exit(1)

    def run(self) -> None:
        """Passes the actor's messages on until it is lost. Raises what Ray raises then."""
        while True:
            for message, files in self._ray.get(self._actor.receive.remote()):
                self._take(message, files)

    def _files_of(self, message: Message) -> Files:
        """What the jobs of a message read, as far as it is there; the actor says what is missing."""
        files: Files = {}
        for job in message.get("jobs", ()):
            folder = folders.folder_of(job["id"])
            folder.mkdir(parents=True, exist_ok=True)
            files |= _read([folder / folders.STATE, *job["media"].values()])
            adapters = {use.path for use in adapter_uses(adapter_files(job["request"]["given"].get("lora") or ()))}
            files |= _read(adapters - self._sent)
            self._sent |= adapters & files.keys()
        return files

    def _take(self, message: Message, files: Files) -> None:
        """Stores the files of a message, and passes it on. A job that was deleted meanwhile is left alone."""
        if files and folders.folder_of(message["id"]).is_dir():
            try:
                self._store(message, files)
            except OpenSoraError as error:
                message = {"type": "failed", "id": message["id"], "code": "server_error", "message": str(error)}
        if message["type"] != "saved":
            self._channel.send(**message)

    def _store(self, message: Message, files: Files) -> None:
        with atomic_write(*files) as written:
            for path, content in zip(written, files.values(), strict=True):
                path.write_bytes(content)
        if message["type"] == "done":
            (folders.folder_of(message["id"]) / folders.STATE).unlink(missing_ok=True)


def start_actor(ray: Any, models: Models) -> Any:
    """An actor that is ready to compute, on a machine of its own as far as there are any. Raises ConfigError."""
    gpus, cores, _ = _resources(ray)
    options = {"num_gpus": min(gpus, 1), "num_cpus": 1 if gpus else cores, "max_concurrency": 2}
    actor = ray.remote(WorkerActor).options(**options, scheduling_strategy="SPREAD").remote(models)
    try:
        version = ray.get(actor.version.remote(), timeout=START_SECONDS)
    except ray.exceptions.GetTimeoutError:
        wanted = "GPU" if gpus else f"{cores} cores"
        raise ConfigError(f"no machine of the Ray cluster has had a free {wanted} for {START_SECONDS:g} s") from None
    except ray.exceptions.RayError as error:
        problem = f"a worker cannot be started on the Ray cluster ({type(error).__name__})"
        raise ConfigError(f"{problem}; opensora must be installed on each of its machines") from error
    if version != __version__:
        raise ConfigError(f"the Ray cluster has opensora {version}, and this machine {__version__}; install the same")
    return actor


def count_actors(ray: Any) -> int:
    """How many actors a cluster takes: one a GPU, or one a machine where there are none."""
    gpus, _, machines = _resources(ray)
    return gpus or machines


def _resources(ray: Any) -> tuple[int, int, int]:
    """GPUs of a cluster, cores of its smallest machine, and machines; those without cores are not counted."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    return sum(int(node.get("GPU", 0)) for node in nodes), min(cores, default=1), max(len(cores), 1)


def _read(paths: Iterable[str | Path]) -> Files:
    return {str(path): Path(path).read_bytes() for path in paths if Path(path).is_file()}


def main() -> None:
    """The program: connects, starts an actor, and relays until either side ends."""
    channel = WorkerChannel()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="worker: %(message)s")
    options = channel.receive()
    models = load_models(options["models"])
    os.chdir(options["data"])
    try:
        with connected(options["address"], show_logs=True) as ray:
            names = [f"actor {number}" for number in range(options["workers"] or count_actors(ray))]
            relay = Relay(ray, channel, start_actor(ray, models))
            channel.send(type="ready", device=options["device"] or names[0], devices=names)
            channel.listen(relay.deliver)
            try:
                relay.run()
            except ray.exceptions.RayError as error:
                logger.error("the actor is lost (%s)", type(error).__name__)
                os._exit(1)  # a thread still waits for messages of the server
    except ConfigError as error:
        channel.send(type="broken", message=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
