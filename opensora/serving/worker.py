"""`python -m opensora.serving.worker`: computes jobs on one device. It holds the loaded models.

Its working directory is the data folder, so that recipes hold no path of the server. It takes messages {"jobs": [...]},
{"cancel": id} and {"watch": id, "on": bool}, and answers with {"type": ...}: ready, step, saved, preview, done, failed,
idle.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
from typing import Any

from opensora.acceleration.device import available_devices
from opensora.errors import ConfigError
from opensora.serving.channel import Message, Outbox, WorkerChannel
from opensora.serving.models import load_models
from opensora.serving.runner import Runner


class Worker:
    """Computes batches of jobs one after the other."""

    def __init__(self, outbox: Outbox, runner: Runner) -> None:
        self.outbox, self.runner = outbox, runner
        self._batches: queue.SimpleQueue[list[dict[str, Any]]] = queue.SimpleQueue()

    def handle(self, message: Message) -> None:
        """Takes a message of the server, in any thread."""
        if "cancel" in message:
            self.runner.cancelled.add(message["cancel"])
        elif "watch" in message:
            (self.runner.watched.add if message["on"] else self.runner.watched.discard)(message["watch"])
        else:
            self._batches.put(message["jobs"])

    def run(self) -> None:
        """Computes batches for ever."""
        while True:
            tasks = self._batches.get()
            self.runner.compute(tasks)
            self.outbox.send(type="idle", alone=self.runner.wants_alone(tasks))


def main() -> None:
    """The program of a worker."""
    channel = WorkerChannel()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="worker: %(message)s")
    options = channel.receive()
    os.nice(options["nice"])  # the HTTP process answers first
    models = load_models(options["models"])
    os.chdir(options["data"])
    try:
        runner = Runner(channel, models, options["device"])
    except ConfigError as error:
        channel.send(type="broken", message=str(error))
        sys.exit(1)
    channel.send(type="ready", device=runner.device, devices=available_devices())
    worker = Worker(channel, runner)
    channel.listen(worker.handle)
    worker.run()


if __name__ == "__main__":
    main()
