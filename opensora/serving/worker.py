"""`python -m opensora.serving.worker`: computes jobs on one device. It holds the loaded models.

Its working directory is the data folder, so that recipes hold no path of the server. It takes messages {"jobs": [...]},
{"cancel": id} and {"watch": id, "on": bool}, and answers with {"type": ...}: ready, step, preview, done, failed, idle.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
from typing import Any

from opensora.acceleration.device import available_devices
from opensora.errors import ConfigError
from opensora.serving.channel import Message, WorkerChannel
from opensora.serving.models import load_models
from opensora.serving.runner import Runner


class Worker:
    """Takes batches of jobs from the channel and computes them one after the other."""

    def __init__(self, channel: WorkerChannel, runner: Runner) -> None:
        self.channel, self.runner = channel, runner
        self._batches: queue.SimpleQueue[list[dict[str, Any]]] = queue.SimpleQueue()

    def handle(self, message: Message) -> None:
        """Takes a message, in the thread of the channel."""
        if "cancel" in message:
            self.runner.cancelled.add(message["cancel"])
        elif "watch" in message:
            (self.runner.watched.add if message["on"] else self.runner.watched.discard)(message["watch"])
        else:
            self._batches.put(message["jobs"])

    def run(self) -> None:
        """Computes batches until the server ends."""
        self.channel.listen(self.handle)
        while True:
            tasks = self._batches.get()
            self.runner.compute(tasks)
            self.channel.send(type="idle", alone=self.runner.wants_alone(tasks))


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
    Worker(channel, runner).run()


if __name__ == "__main__":
    main()
