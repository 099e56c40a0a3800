"""What a worker computes: resumed, together and after failures, always with the bytes of single, undisturbed jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.pipeline import draft
from opensora.serving import runner as module
from opensora.serving.folders import DRAFT, STATE, folder_of
from opensora.serving.models import load_models
from opensora.serving.runner import Runner, Task
from tests.full import some

GIVEN = {"num_frames": 17, "num_sampling_steps": 4, "width": 32, "height": 32}
PROMPTS = ("a red circle", "a blue circle", "a green circle")


class Channel:
    """Notes what a worker tells; `on_send` may interrupt it."""

    def __init__(self, on_send: Callable[[dict[str, Any]], None] = lambda message: None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.on_send = on_send

    def send(self, **message: Any) -> None:
        self.messages.append(message)
        self.on_send(message)

    def of(self, type: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == type]


class Killed(BaseException):
    """What ends a worker in the middle of a step."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def undisturbed_runner() -> Runner:
    """One whose models stay loaded."""
    return Runner(Channel(), load_models(["embedded"]), "cpu")  # type: ignore[arg-type]


def task(id: str, prompt: str = PROMPTS[0], seed: int = 1, **given: Any) -> Task:
    request = {"model": "embedded", "given": {"prompt": prompt, "seed": seed, **GIVEN, **given}, "media": {}}
    return {"id": id, "request": request, "batch_key": "alike", "continues": False, "media": {}}


def compute(tasks: list[Task], on_send: Callable[[dict[str, Any]], None] = lambda message: None) -> Channel:
    channel = Channel(on_send)
    Runner(channel, load_models(["embedded"]), "cpu").compute(tasks)  # type: ignore[arg-type]
    return channel


def content(id: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder_of(id).iterdir()}


@pytest.mark.parametrize("scheduler_steps", [{}, {"steps_until": 3}], ids=["whole", "draft"])
@some(1)
def test_a_killed_job_goes_on_with_the_same_bytes(scheduler_steps: dict[str, int], undisturbed_runner: Runner) -> None:
    def kill(message: dict[str, Any]) -> None:
        if message["type"] == "step" and message["done"] == 3:
            raise Killed

    with pytest.raises(Killed):
        compute([task("killed", **scheduler_steps)], kill)
    assert (folder_of("killed") / STATE).is_file()
    resumed = compute([task("killed", **scheduler_steps)])
    undisturbed_runner.compute([task("undisturbed", **scheduler_steps)])
    assert len(resumed.of("step")) < (3 if scheduler_steps else 4) and len(resumed.of("done")) == 1
    assert [name for name in content("killed") if name.startswith("video.state")] == []
    killed, undisturbed = content("killed"), content("undisturbed")
    assert killed.keys() == undisturbed.keys()
    if killed.pop(DRAFT, None):  # the order of the metadata in such a file varies
        one, other = (draft.load(folder_of(id) / DRAFT) for id in ("killed", "undisturbed"))
        assert one.recipe == other.recipe and torch.equal(one.state.x, other.state.x)
    assert [name for name in killed if killed[name] != undisturbed[name]] == []


@pytest.mark.parametrize("scheduler_steps", [{"steps_until": 3}, {}], ids=["draft", "whole"])
@some(1)
def test_a_job_that_is_killed_after_its_last_step(
    scheduler_steps: dict[str, int], undisturbed_runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step is taken again: what was decoded is not in a saved state."""

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "SAVING_SHARE", 1e9)  # after every step
        patch.setattr(module, "write_image", kill)
        compute([task("killed", **scheduler_steps)])
    resumed = compute([task("killed", **scheduler_steps)])
    undisturbed_runner.compute([task("undisturbed", **scheduler_steps)])
    assert [step["done"] for step in resumed.of("step")] == [scheduler_steps.get("steps_until", 4)]
    killed, undisturbed = content("killed"), content("undisturbed")
    assert killed.keys() == undisturbed.keys()
    assert [name for name in killed if name != DRAFT and killed[name] != undisturbed[name]] == []


def test_a_damaged_state_starts_the_job_again() -> None:
    folder_of("damaged").mkdir(parents=True)
    (folder_of("damaged") / STATE).write_bytes(b"half a file")
    done = compute([task("damaged")])
    assert [step["done"] for step in done.of("step")] == [1, 2, 3, 4] and len(done.of("done")) == 1


def test_jobs_together_have_the_bytes_of_single_ones(undisturbed_runner: Runner) -> None:
    ids = [f"together{number}" for number in range(3)]
    tasks = [task(id, PROMPTS[number], number) for number, id in enumerate(ids)]
    done = compute(tasks)
    assert sorted(message["id"] for message in done.of("done")) == ids
    for number, id in enumerate(ids):
        undisturbed_runner.compute([task(f"alone{number}", PROMPTS[number], number)])
        assert content(id) == content(f"alone{number}")
        recipe = json.loads(content(id)["video.json"])
        text = json.dumps(recipe)
        assert recipe["settings"]["prompt"] == [PROMPTS[number]] and recipe["settings"]["batch_size"] == 1
        assert not any(other in text for other in PROMPTS if other != PROMPTS[number])


def test_the_fault_of_one_job_is_not_that_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.Step.save

    def save(step: module.Step, row: int, file: Path) -> None:
        if "bad" in str(file):
            raise RuntimeError("planted")
        whole(step, row, file)

    monkeypatch.setattr(module.Step, "save", save)
    done = compute([task("first"), task("bad", PROMPTS[1]), task("last", PROMPTS[2])])
    [failed] = done.of("failed")
    assert (failed["id"], failed["code"]) == ("bad", "server_error")
    assert sorted(message["id"] for message in done.of("done")) == ["first", "last"]


def test_a_cancelled_job_stops_within_a_step() -> None:
    channel = Channel()
    runner = Runner(channel, load_models(["embedded"]), "cpu")  # type: ignore[arg-type]

    def cancel(message: dict[str, Any]) -> None:
        if message["type"] == "step" and message["done"] == 2:
            runner.cancelled.add("stopped")

    channel.on_send = cancel
    runner.compute([task("stopped")])
    assert [step["done"] for step in channel.of("step")] == [1, 2] and not channel.of("done")
    assert "stopped" not in runner.cancelled


def test_weights_by_relative_path_are_found_from_the_data_folder(tmp_path: Path) -> None:
    """Workers run in the data folder, and the operator named the files from another one."""
    (tmp_path / "weights").mkdir()
    sections = {
        "model": {"type": "STDiT3", "from_pretrained": "embedded:stdit3"},
        "vae": {"type": "VideoAutoencoderPipeline", "from_pretrained": "weights"},
        "text_encoder": {"type": "t5", "from_pretrained": "somebody/on-the-hub"},
    }
    lines = [f"{name} = {value!r}" for name, value in sections.items()]
    (tmp_path / "own.py").write_text("\n".join([*lines, "image_size = (64, 64)", "num_frames = 17"]))
    loaded = load_models(["own.py"])["own"]
    found = [loaded.section(name)["from_pretrained"] for name in sections]
    assert found == ["embedded:stdit3", str((tmp_path / "weights").resolve()), "somebody/on-the-hub"]
