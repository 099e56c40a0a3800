"""Workers on a Ray cluster: the files that travel with messages, one actor of a real cluster, and kills."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opensora.cli import main
from opensora.distributed.ray_cluster import connected
from opensora.errors import ConfigError
from opensora.serving import folders, ray_worker
from opensora.serving.channel import Message
from opensora.serving.models import load_models
from opensora.serving.process import WorkerProcess
from opensora.serving.ray_actor import FileOutbox, Files, WorkerActor
from opensora.serving.ray_worker import Relay, count_actors, start_actor
from opensora.serving.runner import Runner, Task
from opensora.serving.worker_program import RayCluster, worker_program
from tests.full import FULL
from tests.ray_cluster import ray_cluster
from tests.serving.programs import KEY, SEED, ServerProgram
from tests.serving.test_survival import check_kills

GIVEN = {"prompt": "a red circle", "seed": 1, "num_frames": 17, "num_sampling_steps": 4, "width": 32, "height": 32}
SECONDS = 240.0  # that a message may take


def task(id: str, **media: str) -> Task:
    request = {"model": "embedded", "given": GIVEN, "media": {}}
    return {"id": id, "request": request, "batch_key": "alike", "continues": False, "media": media}


class Channel:
    """Notes what a worker tells the server."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, **message: Any) -> None:
        self.messages.append(message)


class Lost(Exception):
    """What Ray raises for an actor that has died."""


class OtherEnd:
    """Stands for Ray and an actor at once: notes what is delivered, and has messages to be received."""

    def __init__(self, *sent: tuple[Message, Files]) -> None:
        self.delivered: list[tuple[Message, Files]] = []
        self.batches = [list(sent)]
        self.deliver = self.receive = self

    def remote(self, *delivered: Any) -> Any:
        if delivered:
            self.delivered.append((delivered[0], delivered[1]))
            return None
        if not self.batches:
            raise Lost
        return self.batches.pop()

    def get(self, reference: Any) -> Any:
        return reference


def relay(end: OtherEnd) -> tuple[Relay, Channel]:
    channel = Channel()
    return Relay(end, channel, end), channel  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str | Path, content: bytes) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return str(path)


def test_jobs_take_their_files_along(here: Path) -> None:
    state = write(folders.folder_of("video_1") / folders.STATE, b"state")
    upload, adapter = write("files/file_1.png", b"picture"), write("adapters/style.safetensors", b"adapter")
    write("files/file_2.png", b"of another job")
    job = task("video_1", file_1=upload, file_3="files/file_3.png")
    job["request"]["given"] = {**GIVEN, "lora": ["style:0.5"]}
    end = OtherEnd()
    one, _ = relay(end)
    for message in ({"jobs": [job]}, {"jobs": [job]}, {"cancel": "video_1"}):
        one.deliver(message)
    kept = {state: b"state", upload: b"picture"}
    assert [files for _, files in end.delivered] == [{**kept, adapter: b"adapter"}, kept, {}]
    assert end.delivered[2][0] == {"cancel": "video_1"}


def test_results_are_stored_before_they_are_told(here: Path) -> None:
    folder = folders.folder_of("video_1")
    state, video = str(folder / folders.STATE), str(folder / "video.mp4")
    end = OtherEnd(
        ({"type": "step", "id": "video_1", "done": 1, "total": 2}, {}),
        ({"type": "saved", "id": "video_1"}, {state: b"state"}),
        ({"type": "done", "id": "video_1"}, {video: b"frames"}),
        ({"type": "done", "id": "deleted"}, {str(folders.folder_of("deleted") / "video.mp4"): b"frames"}),
    )
    one, channel = relay(end)
    one.deliver({"jobs": [task("video_1")]})
    seen: list[tuple[str, list[str]]] = []
    tell = channel.send

    def send(**message: Any) -> None:
        tell(**message)
        seen.append((message["type"], sorted(file.name for file in folder.iterdir())))

    channel.send = send  # type: ignore[method-assign]
    with pytest.raises(Lost):
        one.run()
    assert seen == [("step", []), ("done", ["video.mp4"]), ("done", ["video.mp4"])]
    assert not folders.folder_of("deleted").exists()


def test_a_result_that_cannot_be_stored_fails_its_job(here: Path) -> None:
    folders.folder_of("video_1").mkdir(parents=True)
    (folders.folder_of("video_1") / "video.mp4").mkdir()
    end = OtherEnd(({"type": "done", "id": "video_1"}, {str(folders.folder_of("video_1") / "video.mp4"): b"frames"}))
    one, channel = relay(end)
    with pytest.raises(Lost):
        one.run()
    [told] = channel.messages
    assert (told["type"], told["code"]) == ("failed", "server_error") and "cannot be written" in told["message"]


def test_an_actor_goes_on_from_the_state_of_a_lost_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each actor has a folder of its own; the files of the messages are all that the second one has."""

    def compute(name: str, received: Files, lost_after: int | None = None) -> list[tuple[Message, Files]]:
        (here / name).mkdir()
        monkeypatch.chdir(here / name)
        for path, content in received.items():
            write(path, content)
        outbox, passed = FileOutbox(), []
        runner = Runner(outbox, load_models(["embedded"]), "cpu")

        def on_send(send: Any = outbox.send, **message: Any) -> None:
            send(**message)
            passed.extend(outbox.take())
            if message["type"] == "saved" and len([1 for one, _ in passed if one["type"] == "saved"]) == lost_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(outbox, "send", on_send)
        try:
            runner.compute([task("video_1")])
            outbox.send(type="idle")
        except KeyboardInterrupt:
            pass
        else:
            assert not Path(folders.VIDEOS).exists()
        return passed

    monkeypatch.setattr("opensora.serving.runner.SAVING_SHARE", 1e9)  # after every step
    lost = compute("lost", {}, lost_after=2)
    state = next(files for message, files in reversed(lost) if message["type"] == "saved")
    resumed, undisturbed = compute("second", state), compute("undisturbed", {})
    assert [message["done"] for message, _ in resumed if message["type"] == "step"] == [3, 4]
    [one], [other] = ([pair for pair in pairs if pair[0]["type"] == "done"] for pairs in (resumed, undisturbed))
    assert one == other and {Path(path).suffix for path in one[1]} == {".mp4", ".json", ".png"}


def test_flags_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, problem in (
        (["--address", "auto"], "give --executor ray"),
        (["--workers", "2"], "give --executor ray"),
        (["--executor", "ray", "--devices", "cpu"], "--devices names devices of this machine"),
        (["--executor", "ray", "--workers", "0"], "--workers is 0"),
    ):
        assert main(["serve", *words]) == 1
        assert problem in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["serve", "--executor", "ray"]) == 1
    assert "pip install 'opensora[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://localhost:1", "no such host:6379", "[::1]:99999"])
def test_an_address_without_a_cluster_is_told_at_once(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="no Ray cluster can be used there"), connected(address):
        raise AssertionError


# a real cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster on this machine."""
    with ray_cluster(num_cpus=1) as ray:
        yield ray.get_runtime_context().gcs_address


def test_a_job_of_an_actor_arrives_in_the_data_folder(cluster: str, here: Path) -> None:
    async def work() -> list[Message]:
        program = worker_program(["embedded"], here, RayCluster(cluster))
        worker = WorkerProcess(program.module, device=None, **program.options)
        await worker.start()
        try:
            found = [await worker.receive(SECONDS)]
            worker.send(jobs=[task("video_1")])
            while found[-1] and found[-1]["type"] != "idle":
                found.append(await worker.receive(SECONDS))
            return [message or {"type": "ended"} for message in found]
        finally:
            await worker.kill()

    messages = asyncio.run(work())
    assert messages[0] == {"type": "ready", "device": "actor 0", "devices": ["actor 0"]}
    assert [message["type"] for message in messages[1:]] == ["step"] * 4 + ["done", "idle"], messages
    names = {file.name for file in folders.folder_of("video_1").iterdir()}
    assert names == {"video.mp4", "video.json", folders.THUMBNAIL, folders.SPRITESHEET}


def test_a_cluster_that_is_not_usable(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no room, or another version of opensora."""
    ray = pytest.importorskip("ray")
    assert count_actors(ray) == 1
    monkeypatch.setattr(ray_worker, "START_SECONDS", 0.0)
    with pytest.raises(ConfigError, match="no machine of the Ray cluster has had a free 1 cores"):
        start_actor(ray, {})


@pytest.mark.skipif(not FULL, reason="tests/serving/test_survival.py kills local workers: set OPENSORA_FULL=1")
@pytest.mark.timeout(3600)
def test_kills_of_actors_and_server_lose_nothing(cluster: str, tmp_path: Path) -> None:
    flags = ("--executor", "ray", "--address", cluster, "--api-key", KEY)
    server = ServerProgram(tmp_path / "data", *flags).start()

    def kill_actors() -> None:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "cmdline").read_bytes().startswith(f"ray::{WorkerActor.__name__}".encode()):
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:
                continue  # it has ended

    check_kills(server, kill_actors, random.Random(SEED), num_jobs=20, kills=10)
    server.stop()
