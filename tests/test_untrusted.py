"""What a recipe or draft from anybody may decide: no address, no key, no place to write, nothing without a bound."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora.checkpoints.read import read_metadata, read_state_dict
from opensora.checkpoints.save import save_file
from opensora.cli import main
from opensora.config.settings import InferenceSettings
from opensora.datasets.video import write_image
from opensora.errors import ConfigError
from opensora.pipeline import draft, recipe
from opensora.pipeline.recipe import RECIPE_SETTINGS, USER_SETTINGS, read_recipe
from opensora.pipeline.request import make_requests
from tests.checkpoints import SAMPLE, run_script, tree, use_cache
from tests.full import some

KEY = "sk-very-secret-0123"
SMALL = ("--image-size", "16", "24", "--num-frames", "1", "--num-sampling-steps", "3", "--verbose", "0")
GIVEN = ("--reference-path", "image.png", "--mask-strategy", "0,0,0,0,1,0.5", "--prompt", "a cat")
Change = Callable[[dict[str, Any], str], Any]


class Listener:
    """Takes connections on this machine, and keeps what came over them."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self.url, self.heard = f"http://{self.address}/v1", []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(1)
                try:
                    self.heard.append(connection.recv(65536))
                except OSError:
                    self.heard.append(b"")


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """A listener, a key that it must not get, and a hub that would be this listener."""
    found = Listener()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("BASE_URL", "MODEL"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{found.address}")
    yield found
    found.socket.close()


@pytest.fixture(scope="module")
def made(filled_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image, a result that it was given to, `out/sample_0000.png`, and a draft, `out/sample_0001`."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        use_cache(filled_cache, patch)
        write_image(np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8), "image.png")
        assert run_script(SAMPLE, *SMALL, *GIVEN, "--save-dir", "out") == 0
        more = ("--start-index", "1", "--steps-until", "1", "--prompt", "x", "a cat", "--save-dir", "out")
        words = ("--reference-path", "", "image.png", "--mask-strategy", "", "0,0,0,0,1,0.5")
        assert run_script(SAMPLE, *SMALL, *words, *more) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filled_cache: Path) -> Path:
    """A copy of it, in a folder within an empty one, so that nothing can be written beside it unseen."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(filled_cache))
    return tmp_path


RECIPE, DRAFT = "out/sample_0000.json", "out/sample_0001.draft.safetensors"


def forge(change: Change, address: str = "", **tensors: torch.Tensor | None) -> None:
    """Changes the recipe, and what the draft says of itself, which is sealed again."""
    stated = json.loads(Path(RECIPE).read_text())
    stated = change(stated, address) or stated
    Path(RECIPE).write_text(json.dumps(stated))
    Path("out/sample_0000.png").unlink(missing_ok=True)  # it holds a recipe too
    told = json.loads(read_metadata(DRAFT)[draft.KEY])
    told["recipe"] = change(told["recipe"], address) or told["recipe"]
    seal(told, **tensors)


def seal(told: Any, **tensors: torch.Tensor | None) -> None:
    held = {n: t for n, t in {**read_state_dict(DRAFT), **tensors}.items() if t is not None}
    text = told if isinstance(told, str) else json.dumps(told)
    save_file(held, DRAFT, {draft.KEY: text, draft.DIGEST: draft._digest(text, held)})


def run(command: str, capsys: pytest.CaptureFixture, *flags: str) -> tuple[int, str]:
    """The exit status and what was said by `replay` or `continue`, which ends at once and in one line if it fails."""
    capsys.readouterr()
    argv = ["replay", RECIPE, "--save-dir", "again"] if command == "replay" else ["continue", DRAFT]
    before, begin = tree(Path()), time.process_time()
    code = main([*argv, *flags])
    out, error = capsys.readouterr()
    if code:
        assert code == 1 and error.splitlines()[-1].startswith("error: ") and "Traceback" not in error
        assert len(error.splitlines()[-1]) < 2000 and not out.startswith("out/")
        assert time.process_time() - begin < 5
        if not out:
            assert tree(Path()) == before
    assert KEY not in out + error
    return code, error


def test_every_setting_is_decided_by_a_recipe_or_by_the_user() -> None:
    """A new setting needs a place in one of the two lists of opensora/pipeline/recipe.py."""
    assert not RECIPE_SETTINGS & USER_SETTINGS
    assert {field.name for field in fields(InferenceSettings)} == RECIPE_SETTINGS | USER_SETTINGS


def settings(**changed: Any) -> Change:
    def change(stated: dict[str, Any], address: str) -> None:
        for name, value in changed.items():
            text = json.dumps(value).replace("ADDRESS", address)
            stated["settings"][name] = json.loads(text)

    return change


def sections(name: str, **changed: Any) -> Change:
    def change(stated: dict[str, Any], address: str) -> None:
        text = json.dumps(changed).replace("ADDRESS", address)
        stated["settings"][name] |= json.loads(text)

    return change


def references(path: str) -> Change:
    """Another reference, with a hash of its own."""

    def change(stated: dict[str, Any], address: str) -> None:
        source = path.replace("ADDRESS", address)
        stated["settings"]["reference_path"], stated["references"] = [source], {source: "a" * 64}

    return change


def prompts(text: str) -> Change:
    def change(stated: dict[str, Any], address: str) -> None:
        stated["prompt"] = text.replace("ADDRESS", address)

    return change


ASKING: dict[str, Change] = {
    "refine": settings(llm_refine=True, llm_base_url="http://ADDRESS/v1", llm_model="x", refined=None),
    "refine, server of the environment": settings(llm_refine=True, refined=None),
    "refined is empty": settings(llm_refine=True, llm_base_url="http://ADDRESS/v1", llm_model="x", refined={}),
    "refined lacks the text": settings(
        llm_refine=True, llm_base_url="http://ADDRESS", llm_model="x", refined={"b": "c"}
    ),
    "not to be refined, but a server": settings(llm_base_url="http://ADDRESS/v1", llm_model="x"),
    "refine as a number": settings(llm_refine=1, llm_base_url="http://ADDRESS/v1", llm_model="x", refined=None),
    "refine in another spelling": settings(**{"llm-refine": True, "llm-base-url": "http://ADDRESS", "refined": None}),
    "a generator of prompts": settings(prompt_generator="http://ADDRESS/"),
    "a reference": references("http://ADDRESS/a.png"),
    "a reference, capitals": references("HTTP://ADDRESS/a.png#hold=17"),
    "one of two references": references("image.png;http://ADDRESS/a.png"),
    "a reference of another scheme": references("tcp://ADDRESS"),
    "a reference on a share": references("//ADDRESS/a.png"),
    "a reference of the prompt": prompts('a cat{"reference_path": "http://ADDRESS/a.png", "mask_strategy": "0"}'),
    "an image": settings(image="http://ADDRESS/a.png", reference_path=None, mask_strategy=None),
    "a video to go on from": settings(extend="http://ADDRESS/a.mp4", reference_path=None, mask_strategy=None),
    "weights of the hub": sections("model", from_pretrained="someone/weights"),
    "an autoencoder of the hub": sections("vae", from_pretrained="someone/weights", local_files_only=False),
    "a text encoder of the hub": sections("text_encoder", from_pretrained="someone/weights", cache_dir="cache"),
    "weights at an address": sections("model", from_pretrained="http://ADDRESS/model.safetensors"),
    "weights on a share": sections("model", from_pretrained="\\\\ADDRESS\\share\\model.safetensors"),
    "frames and time apart": sections("vae", vae_2d={"from_pretrained": "someone/weights"}),
    "not offline": settings(offline=False, allow_downloads=True, reference_path=["http://ADDRESS/a.png"]),
}
WITHOUT_EFFECT = ("not to be refined, but a server", "a generator of prompts")


@pytest.mark.parametrize("command", ["replay", "continue"])
@pytest.mark.parametrize("name", ASKING)
@some(20)
def test_nobody_is_asked(
    here: Path, listener: Listener, capsys: pytest.CaptureFixture, name: str, command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if "environment" in name:
        monkeypatch.setenv("OPENAI_BASE_URL", listener.url)
        monkeypatch.setenv("OPENAI_MODEL", "x")
    forge(ASKING[name], listener.address)
    code, error = run(command, capsys)
    assert listener.heard == []
    assert not Path("cache").exists()
    assert code == 1 or name in WITHOUT_EFFECT
    if "reference" in name and "scheme" not in name and "share" not in name:
        assert "--allow-downloads" in error


@pytest.mark.parametrize("command", ["replay", "continue"])
def test_addresses_are_asked_if_the_user_says_so(
    here: Path, listener: Listener, capsys: pytest.CaptureFixture, command: str
) -> None:
    forge(ASKING["weights of the hub"])
    code, error = run(command, capsys)
    assert code == 1 and "--allow-downloads fetches those of the hub" in error and not listener.heard
    code, error = run(command, capsys, "--allow-downloads")
    assert code == 1 and "the hub" in error and listener.heard
    assert not any(KEY.encode() in heard for heard in listener.heard)
    forge(references("http://ADDRESS/a.png"), listener.address)
    assert "is not public" in run(command, capsys, "--allow-downloads")[1]  # refused for another reason


def test_a_file_of_prompts_has_nobody_asked(
    here: Path, listener: Listener, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opensora.pipeline.remote_media._check_public", lambda *_: None)
    Path("p.txt").write_text(f'a cat{{"reference_path": "{listener.url}/a.png", "mask_strategy": "0"}}\n')
    argv = ("--prompt-path", "p.txt", "--save-dir", "new")
    assert run_script(SAMPLE, *SMALL, *argv) == 1
    error = capsys.readouterr().err
    assert f"the prompts of p.txt name the address '{listener.url}/a.png'; --allow-downloads" in error
    assert not listener.heard and not Path("new").exists()
    assert run_script(SAMPLE, *SMALL, *argv, "--allow-downloads") == 1 and listener.heard


@pytest.mark.parametrize("command", ["replay", "continue"])
def test_places_out_of_a_file_are_not_used(here: Path, capsys: pytest.CaptureFixture, command: str) -> None:
    elsewhere = str(here / "elsewhere")
    forge(settings(
        save_dir=elsewhere, sample_name="../../x", outputs=elsewhere, prompt_path="/etc/passwd", prompt_as_path=True,
        output=f"{elsewhere}.png", overwrite=True,
    ))  # fmt: skip
    before = {name for name in tree(here) if not name.startswith("work/")}
    assert run(command, capsys)[0] == 0
    assert {name for name in tree(here) if not name.startswith("work/")} == before
    found = ["sample_0001.json", "sample_0001.png"] if command == "continue" else []
    assert sorted(set(os.listdir("out")) - {"sample_0000.json"}) == sorted(
        [*found, *(f"sample_0001.draft.{kind}" for kind in ("json", "png", "safetensors"))]
    )


@pytest.mark.parametrize(
    "name",
    ["../../x", "/tmp/opensora-x", "a/b", "..", "", ".hidden", "C:x", "a\\b", "x" * 300, "a\nb", 5, None, ["x"]],
)
def test_a_draft_writes_in_its_folder_only(here: Path, capsys: pytest.CaptureFixture, name: object) -> None:
    told = json.loads(read_metadata(DRAFT)[draft.KEY])
    seal({**told, "name": name})
    shutil.copy(DRAFT, "out/best.safetensors")  # whose name says nothing of the result's
    for file in (DRAFT, "out/best.safetensors"):
        before = tree(here)
        assert main(["continue", file]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {file}: ") and error.count("\n") == 1 and tree(here) == before


PATHS = ["/dev/zero", "/dev/full", "fifo", "out", "huge", "/etc/passwd", "gone.png", "/proc/self/mem", "a\0b"]


@pytest.fixture
def places(here: Path) -> None:
    os.mkfifo("fifo")
    with open("huge", "wb") as file:
        file.truncate(2**42)


@pytest.mark.parametrize("command", ["replay", "continue"])
@pytest.mark.parametrize("path", PATHS)
def test_only_regular_files_are_references(
    here: Path, places: None, capsys: pytest.CaptureFixture, path: str, command: str
) -> None:
    forge(references(path))
    Path("huge").unlink() if path != "huge" else None
    begin = time.monotonic()
    capsys.readouterr()
    assert main(["replay", RECIPE, "--save-dir", "again"] if command == "replay" else ["continue", DRAFT]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and time.monotonic() - begin < 60
    if Path("/etc/passwd").exists() and path == "/etc/passwd":
        import hashlib

        assert hashlib.sha256(Path(path).read_bytes()).hexdigest()[:6] not in error
    assert not Path("again").exists()


def test_hashes_without_a_reference_are_refused(here: Path, capsys: pytest.CaptureFixture) -> None:
    def change(stated: dict[str, Any], _: str) -> None:
        stated["references"] |= {"/dev/zero": "a" * 64}

    forge(change)
    for command in ("replay", "continue"):
        assert "a hash of '/dev/zero', which is no reference of its settings" in run(command, capsys)[1]


def test_references_without_a_hash_are_refused(here: Path, capsys: pytest.CaptureFixture) -> None:
    def change(stated: dict[str, Any], _: str) -> None:
        stated["references"] = {}

    forge(change)
    for command in ("replay", "continue"):
        assert "has no hash of its reference 'image.png'" in run(command, capsys)[1]


@pytest.mark.parametrize("part", ["model", "vae", "text_encoder"])
@pytest.mark.parametrize("path", ["/dev/zero", "fifo", "/etc/passwd", "out/sample_0000.json", "/proc/self/mem"])
@some(7)
def test_only_weights_are_weights(here: Path, capsys: pytest.CaptureFixture, part: str, path: str) -> None:
    os.mkfifo("fifo")
    forge(sections(part, from_pretrained=path))
    os.replace("fifo", here / "fifo")  # which a listing of the folder would read
    os.symlink(here / "fifo", "fifo")
    capsys.readouterr()
    assert main(["replay", RECIPE, "--save-dir", "again"]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and "root:" not in error


@pytest.mark.parametrize("file", ["/dev/zero", "fifo", "out", "/proc/self/mem", "fifo.mp4", "out.png", "fifo.json"])
@pytest.mark.parametrize("command", ["replay", "continue"])
def test_only_files_are_recipes_and_drafts(here: Path, capsys: pytest.CaptureFixture, file: str, command: str) -> None:
    for name in ("fifo", "fifo.mp4", "fifo.json"):
        os.mkfifo(name)
    os.mkdir("out.png")
    assert main([command, file]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ") and error.count("\n") == 1


def put(*path: str, value: Any = None, remove: bool = False) -> Change:
    def change(stated: dict[str, Any], _: str) -> None:
        place = stated
        for key in path[:-1]:
            place = place[key]
        if remove:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return change


def nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


BROKEN: dict[str, Change] = {
    **{f"{name} is {json.dumps(value)[:20]}": put(name, value=copy.deepcopy(value))
       for name in ("format", "program", "prompt", "encoded_prompts", "seed", "sample_index", "settings", "weights",
                    "references", "threads")
       for value in (True, [1], {"a": {"b": 1}}, "x", 1.5, -1, 10**30)
       if not (name in ("seed",) and value in (-1,)) and not (name == "prompt" and value == "x")},
    **{f"{name} is missing": put(name, remove=True)
       for name in ("format", "program", "prompt", "encoded_prompts", "settings", "weights", "references", "seed")},
    "a deep setting": put("settings", "model", value=nest(60)),
    "an unknown field": put("extra", value=1),
    "a hash that is none": put("weights", value={"model": "../../x"}),
    "a hash in capitals": put("references", value={"image.png": "A" * 64}),
    "too many threads": put("threads", value=10**6),
    "no threads": put("threads", value=0),
    "a newer one": put("format", value=2),
    "sample 10^8": put("sample_index", value=10**8),
    "a prompt of ten million characters": put("prompt", value="." * 10**7),
    "10^9 steps": put("settings", "scheduler", "num_sampling_steps", value=10**9),
    "10^9 blocks": put("settings", "model", "depth", value=10**9),
    "10^9 heads": put("settings", "model", "num_heads", value=10**9),
    "10^9 clips": put("settings", "loop", value=10**9),
    "10^9 frames": put("settings", "num_frames", value=10**9),
    "a side of 10^9": put("settings", "image_size", value=[10**9, 16]),
    "text as a number of frames": put("settings", "num_frames", value=[1]),
    "infinite": put("settings", "scheduler", value={"type": "rflow", "cfg_scale": 1e400}),
}  # fmt: skip


@pytest.mark.parametrize("command", ["replay", "continue"])
@pytest.mark.parametrize("name", BROKEN)
@some(80)
def test_broken_fields_are_one_line(here: Path, capsys: pytest.CaptureFixture, name: str, command: str) -> None:
    forge(BROKEN[name])
    assert run(command, capsys)[0] == 1


WHOLE = ["[]", "null", "3", '"x"', "{}", "[" * 10_000, "{" * 100, '{"format": 1}', '{"format": null}', '{"format": []}',
         '{"format": ' + "1" * 5_000 + "}", '{"a":' * 60 + "1" + "}" * 60, "", "NaN", "\ufeff{}"]  # fmt: skip


@pytest.mark.parametrize("text", WHOLE)
def test_other_json_is_no_recipe_and_no_draft(here: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    Path(RECIPE).write_text(text)
    seal(text)
    write_image(np.zeros((4, 4, 3), np.uint8), "other.png", {recipe.KEY: text})
    for argv in (["replay", RECIPE], ["continue", DRAFT], ["replay", "other.png"]):
        before = tree(Path())
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 600 and tree(Path()) == before


LATENTS = (1, 4, 1, 2, 3)
STATE = torch.Generator().get_state()
TENSORS: dict[str, dict[str, torch.Tensor | None]] = {
    "no latents": {"x": None},
    "no generator": {"generator": None},
    "no mask": {"given": None},
    "NaN": {"x": torch.full(LATENTS, float("nan"))},
    "infinite": {"x": torch.full(LATENTS, float("inf"))},
    "whole numbers": {"x": torch.zeros(LATENTS, dtype=torch.int64)},
    "a single number": {"x": torch.tensor(1.0)},
    "no numbers": {"x": torch.zeros(1, 4, 0, 2, 3)},
    "other latents": {"x": torch.zeros(1, 4, 1, 4, 4)},
    "two samples": {"x": torch.zeros(2, 4, 1, 2, 3)},
    "a short generator": {"generator": STATE[:100]},
    "another type of generator": {"generator": STATE.to(torch.int64)},
    "a generator of zeros": {"generator": torch.zeros_like(STATE)},
    "a generator of ones": {"generator": torch.full_like(STATE, 255)},
    "another type of mask": {"given": torch.ones(1, 1)},
    "a longer mask": {"given": torch.ones(1, 9, dtype=torch.bool)},
    "another tensor": {"y": torch.zeros(3)},
    "many tensors": {f"known{n}": torch.zeros(LATENTS) for n in range(40)},
}


@pytest.mark.parametrize("name", TENSORS)
def test_other_tensors_are_no_draft(here: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    seal(json.loads(read_metadata(DRAFT)[draft.KEY]), **TENSORS[name])
    code, error = run("continue", capsys)
    assert code == 1 and "create the draft again" in error


@pytest.mark.parametrize(
    "change",
    [{"done": 0}, {"done": 3}, {"done": 10**12}, {"done": "1"}, {"num_steps": 10**12}, {"num_steps": -1},
     {"device": None}, {"device": "x" * 5000}, {"format": 2}, {"format": "1"}, {"recipe": []}, {"extra": 1}],
    ids=str,
)  # fmt: skip
def test_other_words_are_no_draft(here: Path, capsys: pytest.CaptureFixture, change: dict[str, Any]) -> None:
    seal({**json.loads(read_metadata(DRAFT)[draft.KEY]), **change})
    assert run("continue", capsys)[0] == 1


@pytest.mark.parametrize("number", [10**3, 10**4, 10**5])
def test_the_other_samples_of_a_run_are_not_made_up(
    here: Path, capsys: pytest.CaptureFixture, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one of them is asked for, however many there are said to be."""

    def counted(settings: InferenceSettings) -> list[Any]:
        raise ConfigError(f"{len(make_requests(settings))} requests")

    monkeypatch.setattr("opensora.pipeline.job_spec.make_requests", counted)
    forge(settings(num_sample=number))
    for command in ("replay", "continue"):
        assert "1 requests" in run(command, capsys)[1]


def test_an_older_recipe_is_read(here: Path, capsys: pytest.CaptureFixture) -> None:
    def change(stated: dict[str, Any], _: str) -> None:
        del stated["threads"]
        for name in USER_SETTINGS:
            stated["settings"].pop(name, None)

    forge(change)
    assert run("replay", capsys)[0] == 0 and run("continue", capsys)[0] == 0
    assert read_recipe("out/sample_0001.png")["threads"] == torch.get_num_threads()
