"""The page in a real browser, on a real server with the embedded model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora.cli import main
from opensora.datasets.synthetic.render import make_clip
from opensora.datasets.video import write_image, write_video
from tests import chat_server
from tests.full import FULL
from tests.lora_files import embedded_lora

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PROMPT = "a red circle moving right on a black background"
MODELS = ("embedded", "opensora-v1-2/inference/sample")
PATIENCE = 120_000  # milliseconds, on a busy machine
SHOTS = os.environ.get("OPENSORA_SCREENSHOTS")  # a folder for pictures to look at

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


class Server:
    """`opensora serve` in a process group of its own, on the same port after a restart."""

    def __init__(self, folder: Path, language_model: str) -> None:
        self.data, self.adapter, self.language_model = folder / "data", folder / "style.safetensors", language_model
        embedded_lora(self.adapter)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self) -> None:
        words = ["-m", "opensora", "serve", "--port", str(self.port), "--data", str(self.data), "--model", *MODELS]
        words += ["--llm-refine", "--llm-base-url", self.language_model, "--llm-model", "some-model"]
        words += ["--lora", str(self.adapter)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "sk-very-secret"}
        self.process = subprocess.Popen([sys.executable, *words], env=environment, start_new_session=True)
        for _ in range(2400):
            try:
                with urllib.request.urlopen(f"{self.url}health", timeout=60):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server does not start")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with chat_server.Server() as language_model:
        threading.Thread(target=language_model.serve_forever, args=(0.02,), daemon=True).start()
        language_model.answers = [chat_server.says("A vivid red circle glides to the right.")]
        running = Server(tmp_path_factory.mktemp("served"), language_model.url)
        yield running
        running.kill()
        language_model.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    frames = make_clip(3, 1, 17, 64, 64).video
    write_image(frames[0], folder / "given.png")
    write_video(frames, folder / "given.mp4", 8)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing else")
    return folder


@pytest.fixture
def page(browser: playwright.Browser, server: Server) -> Iterator[playwright.Page]:
    """The open page. No script may fail, and no request may leave the server."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    failures: list[str] = []
    own = lambda url: url.startswith((server.url, "blob:", "data:"))  # noqa: E731
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("request", lambda request: own(request.url) or failures.append(request.url))
    page.goto(server.url)
    expect(page.locator("#model option")).not_to_have_count(0)
    yield page
    page.close()
    assert not failures


def ask(page: playwright.Page, prompt: str = PROMPT, **settings: object) -> None:
    """Fills the form; settings by the ids of their fields. Few steps, so that it takes no time."""
    page.fill("#prompt", prompt)
    page.locator("summary").click()
    for name, value in {"num_sampling_steps": 2, **settings}.items():
        page.fill(f"#{name}", str(value))


def shot(page: playwright.Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


def drop(page: playwright.Page, place: str, file: Path) -> None:
    """Drops a picture on a place."""
    make = "([bytes, name]) => { const data = new DataTransfer(); const kind = { type: 'image/png' };" \
        " data.items.add(new File([new Uint8Array(bytes)], name, kind)); return data; }"  # fmt: skip
    data = page.evaluate_handle(make, [list(file.read_bytes()), file.name])
    page.dispatch_event(place, "drop", {"dataTransfer": data})


def gallery(page: playwright.Page, seed: int) -> playwright.Locator:
    """The finished videos with this seed."""
    return page.locator("#gallery li", has_text=f"seed {seed}")


def test_a_clip_is_planned_made_played_replayed_and_deleted(page: playwright.Page) -> None:
    ask(page, seed=11)
    expect(page.locator("#plan")).to_contain_text("17 frames of 64 x 64")
    page.click("#generate")
    card = gallery(page, 11)
    expect(card).to_have_count(1)
    card.get_by_role("button", name=re.compile("^Play")).click()
    expect(card.locator("video")).to_have_js_property("videoWidth", 64)
    shot(page, "clip")
    check_copies(page, card)
    card.get_by_role("button", name="Replay:").click()
    expect(page.locator("#gallery li", has_text="replay, identical")).to_have_count(1)
    page.fill("#search", "no such prompt")
    expect(card.first).to_be_hidden()
    expect(page.locator("#gallery-empty")).to_have_text("No video has these words.")
    page.fill("#search", "")
    expect(card.first).to_be_visible()
    for box in page.locator("#gallery li input[type=checkbox]").all():
        box.check()
    page.click("#compare")
    expect(page.locator("#pair video")).to_have_count(2)
    shot(page, "compare")
    page.click("#close-compare")
    page.locator("#gallery li", has_text="replay, identical").get_by_role("button", name="Delete").click()
    expect(page.locator("#gallery li", has_text="replay, identical")).to_have_count(0)


def check_copies(page: playwright.Page, card: playwright.Locator) -> None:
    """What the card copies is a command, a program and a request."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])

    def copied(form: str) -> str:
        page.locator("#announcer").evaluate("element => element.textContent = ''")
        card.get_by_role("combobox", name="Copy as").select_option(form)
        expect(page.locator("#announcer")).to_have_text("Copied.")
        return page.evaluate("navigator.clipboard.readText()")

    program, verb, *words = shlex.split(copied("Command"))
    assert (program, verb) == ("opensora", "generate") and main(["plan", *words]) == 0
    python = copied("Python")
    assert compile(python, "copied", "exec") and "seed=11" in python and repr(PROMPT)[1:-1] in python
    url, *words = shlex.split(copied("Request"))[1:]
    body = json.loads(words[words.index("-d") + 1])
    answer = page.request.post(f"{url}/plan", data=body)
    assert answer.status == 200 and answer.json()["num_frames"] == 17 and body["seed"] == 11


def test_a_prompt_is_refined_and_a_size_is_named(page: playwright.Page) -> None:
    page.fill("#prompt", PROMPT)
    page.fill("#loop", "2")
    page.click("#refine")
    expect(page.locator("#prompt")).to_have_value("A vivid red circle glides to the right.")
    expect(page.locator("#loop-text-2")).to_have_value("")  # as before
    page.click("#undo-refine")
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    page.fill("#loop", "1")
    page.select_option("#model", MODELS[1])
    expect(page.locator("#size")).to_have_value("426x240")
    expect(page.locator("#num_frames")).to_have_value("51")
    expect(page.locator("#lora")).to_have_attribute("placeholder", "style:0.8")
    page.select_option("#size", "named")
    page.select_option("#resolution", "480p")
    page.select_option("#aspect_ratio", "16:9")
    expect(page.locator("#plan")).to_contain_text("51 frames of 480 x 848")
    shot(page, "named")


@pytest.mark.skipif(not FULL, reason="tests/serving/test_runner.py continues drafts: set OPENSORA_FULL=1")
def test_one_of_four_drafts_is_continued(page: playwright.Page) -> None:
    ask(page, seed=20, num_sampling_steps=3, lora="style:0.5")
    page.click("#drafts")
    drafts = page.locator("#draft-list li")
    expect(drafts).to_have_count(4)
    shot(page, "drafts")
    drafts.filter(has_text="seed 22").get_by_role("button", name="Continue").click()
    expect(gallery(page, 22)).to_have_count(1)


def test_a_dropped_picture_is_animated_and_extended(page: playwright.Page, media: Path) -> None:
    ask(page, seed=31)
    page.set_input_files("#image", media / "broken.png")
    expect(page.locator("#image-error")).not_to_be_empty()
    drop(page, "#drop-image", media / "given.png")
    expect(page.locator("#timeline .kept")).to_have_count(1)
    shot(page, "picture")
    page.click("#generate")
    card = gallery(page, 31)
    expect(card).to_have_count(1)
    card.get_by_role("button", name="Extend").click()
    expect(page.locator("#drop-extend")).to_contain_text("Remove it")
    told = "Clip 1: about 17 frames kept, about 17 frames generated"
    expect(page.locator("#timeline")).to_have_attribute("aria-label", told)


@pytest.mark.skipif(not FULL, reason="one more clip: set OPENSORA_FULL=1")
def test_three_clips_in_a_row_have_a_text_each(page: playwright.Page) -> None:
    ask(page, seed=41)
    page.fill("#loop", "3")
    page.fill("#loop-text-2", "a red circle growing on a black background")
    page.fill("#loop-text-3", "a red circle moving left on a black background")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    card = gallery(page, 41)
    expect(card).to_have_count(1)
    expect(card.locator("h3")).to_contain_text("black background \u2192 a red circle growing")
    card.get_by_role("button", name="Use settings").click()
    expect(page.locator("#loop-text-3")).to_have_value("a red circle moving left on a black background")


def test_a_wrong_request_is_told_at_its_field_and_a_long_one_is_cancelled(page: playwright.Page) -> None:
    page.click("#generate")
    expect(page.locator("#prompt-error")).to_have_text("Describe the video first.")
    ask(page, "<img src=x onerror=alert(1)> a red circle", seed=51, fps=0)
    page.click("#generate")
    expect(page.locator("#fps-error")).to_contain_text("fps")
    expect(page.locator("#fps")).to_have_attribute("aria-invalid", "true")
    shot(page, "wrong")
    page.fill("#fps", "24")
    page.fill("#num_sampling_steps", "300")
    page.click("#generate")
    card = page.locator("#queue li", has_text="<img src=x")
    card.get_by_role("button", name="Cancel").click()
    expect(card).to_contain_text("cancelled")
    assert page.locator("#queue li img[src=x]").count() == 0  # markup stays text


@pytest.mark.skipif(not FULL, reason="starts the server again: set OPENSORA_FULL=1")
def test_the_page_lives_through_a_restart(page: playwright.Page, server: Server) -> None:
    ask(page, seed=61, num_sampling_steps=12)
    page.click("#generate")
    expect(page.locator("#queue li", has_text="seed 61")).to_have_count(1)
    server.kill()
    expect(page.locator("#connection")).to_contain_text("does not answer")
    server.start()
    expect(page.locator("#connection")).to_have_text("Connected")
    expect(gallery(page, 61)).to_have_count(1)


def test_narrow_screens_dark_colours_and_accessibility(page: playwright.Page) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.locator("summary").click()
    for theme in ("light", "dark"):
        for width in (360, 1280):
            page.set_viewport_size({"width": width, "height": 780})
            shot(page, f"{theme}-{width}")
            broad = page.locator("body").evaluate("body => document.documentElement.scrollWidth")
            assert broad <= width, "the page scrolls sideways"
            found = axe.run(page).response["violations"]
            serious = [
                f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in ("serious", "critical")
            ]
            assert not serious
        page.click("#theme")
