"""Runs commands in forks of a process that has imported everything once, and says what each took.

python -m tests.wrong_inputs.server reads one JSON list a line, of a folder and the arguments of a command to run there,
and answers with one JSON object a line: status, what was printed, seconds of processor time, and MB of memory above
those of the imports.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import tempfile
import traceback
from contextlib import redirect_stdout
from typing import Any

CPU_SECONDS = 60  # after which a command is killed: it has failed long before
MODULES = (
    "torch", "torch._dynamo", "av", "PIL.Image", "pyarrow.parquet", "transformers", "ftfy", "bs4",
    "opensora.cli", "opensora.pipeline.pipeline", "opensora.pipeline.replay", "opensora.pipeline.plan",
    "opensora.datasets.folder_table", "opensora.datasets.bucket_report", "opensora.training.diffusion",
    "opensora.models.stdit.stdit3",
    "opensora.models.vae.vae", "opensora.models.text_encoder.t5", "opensora.schedulers.rf", "tests.wrong_inputs.resume",
)  # fmt: skip


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def warm_up() -> None:
    """Makes a video here, for what is imported no sooner than it is used."""
    from opensora import cli

    size = ["--image-size", "16", "24", "--num-frames", "5", "--steps", "1", "--verbose", "0"]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        assert cli.main(["generate", "a red circle", "--save-dir", folder, *size]) == 0
        assert cli.main(["plan", "a red circle", *size]) == 0


def run(words: list[str]) -> dict[str, Any]:
    """What a command does in a fork of this process."""
    folder, *arguments = words
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).encode())
            os.dup2(printed.fileno(), 1)
            os.dup2(told.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            os.chdir(folder)
            work(arguments)
        _, status, usage = os.wait4(child, 0)
        before = int(os.read(reader, 64))  # kilobytes, of what was imported
        os.close(reader)
        os.close(writer)
        texts = []
        for file in (printed, told):
            file.seek(0)
            texts.append(file.read().decode(errors="backslashreplace"))
    return {
        "status": os.waitstatus_to_exitcode(status), "printed": texts[0], "told": texts[1],
        "seconds": usage.ru_utime + usage.ru_stime, "megabytes": (usage.ru_maxrss - before) / 1024,
    }  # fmt: skip


def work(arguments: list[str]) -> None:
    """Runs a command and ends this process with its status."""
    import torch

    from opensora import cli
    from tests.wrong_inputs import resume

    torch.set_num_threads(torch.get_num_threads())  # a fork's thread pool is made anew, before several threads want it
    programs = {"resume": resume.resume, "make a run": resume.make_run, "make weights": resume.make_weights}
    try:
        name, *rest = arguments
        code = programs[name](rest) if name in programs else cli.main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
