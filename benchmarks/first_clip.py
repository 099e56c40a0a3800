"""Seconds from a newcomer's clone to the first clip in the browser.

python benchmarks/first_clip.py [--python PYTHON] [--output FILE]

Clones this repository, installs it as README.md's third command does, starts `opensora serve`, and drives the page in
Chromium: example prompt, Generate, play. `--python` names an interpreter that has the packages, in place of an
installation. Printed are the seconds of each part; the installation, which is mostly downloads, is not in the sum.
Needs playwright and Chromium. Exits with 1 above two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from opensora.cli.program import run_program
from opensora.errors import OpenSoraError
from opensora.files import atomic_write

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 120.0
PATIENCE = 300_000  # milliseconds
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


class Watch:
    """Seconds of the parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Notes the time of a block."""
        begin = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - begin


def install(clone: Path) -> str:
    """Installs the clone into an environment of its own, as README.md says; returns its interpreter."""
    python = str(clone / ".venv" / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(clone / ".venv")], check=True)
    pinned = ["-c", "constraints.txt"] if sys.version_info[:2] == (3, 11) else []
    subprocess.run([python, "-m", "pip", "install", "-q", *pinned, "-e", ".[serve]"], cwd=clone, check=True)
    return python


@contextmanager
def served(python: str, clone: Path) -> Iterator[str]:
    """The address of `opensora serve`, run in the clone."""
    log = clone / "serve.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [python, "-m", "opensora", "serve", "--port", "0"], cwd=clone, stderr=file, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(clone)},
        )  # fmt: skip
    try:
        while not (found := re.search(r"http://\S+(?=\n)", log.read_text(encoding="utf-8"))):
            if process.poll() is not None:
                raise OpenSoraError(f"the server did not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.05)
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def make_clip(url: str, watch: Watch, picture: Path) -> None:
    """What a newcomer does on the page, until the clip plays."""
    from playwright.sync_api import expect, sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        with watch.timed("page"):
            page.goto(url)
            expect(page.locator("#model option")).not_to_have_count(0)
        with watch.timed("clip"):
            page.click("#example")
            page.click("#generate")
            card = page.locator("#gallery li")
            expect(card).to_have_count(1)
            card.get_by_role("button", name=re.compile("^Play")).click()
            expect(card.locator("video")).to_have_js_property("paused", False)
        page.screenshot(path=picture, full_page=True)
        browser.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the seconds of each part; 1 where their sum without the installation is too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="an interpreter that has the packages, in place of an installation")
    parser.add_argument("--output", default="outputs/benchmarks/first_clip.json")
    args, watch = parser.parse_args(argv), Watch()
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name, "clone")
        with watch.timed("clone"):
            subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(clone)], check=True)
        with watch.timed("installation"):
            python = args.python or install(clone)
        with watch.timed("server and page"), served(python, clone) as url:
            make_clip(url, watch, Path(args.output).with_suffix(".png"))
    total = watch.seconds["clone"] + watch.seconds["server and page"]
    print(json.dumps({**watch.seconds, "without installation": total}, indent=2))
    with atomic_write(args.output, make_folders=True) as [file]:
        file.write_text(json.dumps({**watch.seconds, "without installation": total}, indent=2) + "\n", encoding="utf-8")
    return int(total > MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(run_program(main))
