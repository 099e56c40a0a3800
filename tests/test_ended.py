"""A program that is told to end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, sys
from opensora.outputs import output_folder
from opensora.utils.config_utils import run_program

def program():
    with output_folder(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)
        print("went on")

sys.exit(run_program(program))
"""


def test_what_it_has_begun_is_put_in_order(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "new/out")], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stdout == ended.stderr == ""
    assert not (tmp_path / "new").exists()
