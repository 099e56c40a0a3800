"""The queue: turns between keys, companions of a batch, deaths of workers, restarts, and what is deleted when."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.serving import fields, folders, retention
from opensora.serving.adapters import adapter_files, copy_adapters, named_adapters
from opensora.serving.batch_speed import BatchSpeed
from opensora.serving.dispatcher import Running
from opensora.serving.job import COMPLETED, FAILED, QUEUED, RUNNING, VideoJob
from opensora.serving.limits import Limits
from opensora.serving.process import WorkerProcess
from opensora.serving.request import make_request
from opensora.serving.store import Store
from tests.serving.asgi import Application

SMALL = {"num_frames": 17, "num_sampling_steps": 4, "width": 32, "height": 32}
LIMITS = Limits(keep_seconds=100, max_disk=1_000, max_batch=3)


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    app = Application(tmp_path / "data", limits=LIMITS)
    yield app
    app.state.store.close()


@pytest.fixture
def worker() -> WorkerProcess:
    """A worker that has not been started: it reads nothing."""
    worker = WorkerProcess("none")
    worker.send = lambda **message: None  # type: ignore[method-assign]
    return worker


def add(app: Application, owner: str = "a", **given: Any) -> VideoJob:
    """Queues a job."""
    values = {"prompt": "a red circle", **SMALL, **given}
    checked = make_request(values, {}, None, app.state.models, Limits())
    return asyncio.run(app.state.queue(owner, checked, {}))


def next_ids(app: Application) -> list[str]:
    return [job.id for job in app.state.dispatcher._next_jobs()]


def begin(app: Application, worker: WorkerProcess) -> list[VideoJob]:
    jobs = app.state.dispatcher._next_jobs()
    app.state.dispatcher._begin(jobs, worker)
    return jobs


def finish(app: Application, job: VideoJob) -> None:
    size = {"num_frames": job.num_frames, "height": job.height, "width": job.width}
    app.state.dispatcher._take({"type": "done", "id": job.id, "sha256": "0" * 64, **size})


def test_keys_take_turns(app: Application, worker: WorkerProcess) -> None:
    for number in range(6):
        add(app, "many", num_sampling_steps=10 + number)  # each of another kind, so that none are computed together
    few = [add(app, "few", num_sampling_steps=20 + number) for number in range(2)]
    order = []
    for _ in range(8):
        [job] = begin(app, worker)
        order.append(job.owner)
        finish(app, job)
    assert order == ["few", "many"] * 2 + ["many"] * 4 and all(app.state.job(job.id, "few").is_final for job in few)


def test_alike_jobs_come_together_and_others_alone(app: Application) -> None:
    first = add(app, seed=1)
    alike = [add(app, "ab"[number // 2], seed=number, prompt="a blue square") for number in range(4)]
    for other in ({"num_frames": 1}, {"draft": True}, {"guidance_scale": 3.0}, {"negative_prompt": "blurred"}):
        add(app, **other)
    assert next_ids(app) == [first.id, alike[2].id, alike[0].id]  # max_batch is 3; keys take turns
    app.state.dispatcher._learn(first, alone=True)
    assert next_ids(app) == [first.id]


def test_a_job_that_kills_its_worker_ends_and_others_go_on(app: Application, worker: WorkerProcess) -> None:
    poison, other = add(app, seed=1), add(app, seed=2)
    deaths = 0
    while not app.state.job(poison.id, "a").is_final:
        jobs = begin(app, worker)
        assert deaths == 0 or len(jobs) == 1  # after the first death each is alone
        if poison.id in [job.id for job in jobs]:
            deaths += 1
            app.state.dispatcher._recover(worker)
        else:
            finish(app, jobs[0])
    found = app.state.job(poison.id, "a")
    assert deaths == LIMITS.max_attempts and found.error == {
        "code": "worker_died", "message": f"its worker ended {deaths} times without getting further",
    }  # fmt: skip
    if not app.state.job(other.id, "a").is_final:
        finish(app, begin(app, worker)[0])
    assert app.state.job(other.id, "a").status == COMPLETED


def test_a_job_that_gets_further_is_not_given_up(app: Application, worker: WorkerProcess) -> None:
    job = add(app)
    for step in range(1, 3 * LIMITS.max_attempts):
        begin(app, worker)
        app.state.dispatcher._take({"type": "step", "id": job.id, "done": step, "total": 50})
        app.state.dispatcher._recover(worker)
    assert app.state.job(job.id, "a").status == QUEUED


def test_a_restart_queues_again_what_was_running(app: Application, worker: WorkerProcess) -> None:
    running, waiting = add(app, num_sampling_steps=3), add(app, num_sampling_steps=5)
    begin(app, worker)
    app.state.store.close()
    store = Store(app.state.store.folder)
    assert store.get(running.id).status == RUNNING and store.requeue_running() == 1
    assert [job.id for job in store.with_status(QUEUED)] == [running.id, waiting.id]
    store.close()


def test_messages_about_a_cancelled_job_are_dropped(app: Application, worker: WorkerProcess) -> None:
    job = add(app)
    begin(app, worker)
    assert isinstance(app.state.dispatcher.running[job.id], Running)
    app.state.dispatcher.cancel(app.state.job(job.id, "a"))
    finish(app, job)
    assert app.state.job(job.id, "a").error == {"code": "cancelled", "message": "the job was cancelled"}


def test_old_results_and_the_excess_are_deleted(app: Application, worker: WorkerProcess) -> None:
    jobs = [add(app, num_sampling_steps=number) for number in (2, 3, 4)]
    for job in jobs:
        begin(app, worker)
        folder = app.state.store.folder / folders.folder_of(job.id)
        folder.mkdir(parents=True)
        (folder / "video.mp4").write_bytes(bytes(400))
        finish(app, job)
    assert app.state.store.disk_use() == 1_200
    retention.clean(app.state)
    assert app.state.store.ids() == {jobs[1].id, jobs[2].id}  # the oldest, until it fits
    expired = dataclasses.replace(app.state.job(jobs[1].id, "a"), expires_at=1.0)
    app.state.store.update(expired)
    (app.state.store.folder / folders.VIDEOS / "video_of_nobody").mkdir()
    retention.clean(app.state)
    retention.sweep(app.state)
    assert [path.name for path in (app.state.store.folder / folders.VIDEOS).iterdir()] == [jobs[2].id]


def test_a_failed_job_says_why_and_is_not_computed_again(app: Application, worker: WorkerProcess) -> None:
    job = add(app)
    begin(app, worker)
    message = "/srv/models/stdit/model.safetensors: is damaged; give another"
    app.state.dispatcher._take({"type": "failed", "id": job.id, "code": "invalid_request", "message": message})
    found = app.state.job(job.id, "a")
    assert found.status == FAILED and found.error["message"] == "model.safetensors: is damaged; give another"
    assert next_ids(app) == []


def test_a_newer_queue_and_a_broken_one_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "newer")
    store._db.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(ConfigError, match="a newer program wrote its queue"):
        Store(tmp_path / "newer")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/queue.sqlite").write_bytes(b"no database" * 1_000)
    with pytest.raises(ConfigError, match="its queue cannot be opened"):
        Store(tmp_path / "broken")


def test_every_setting_is_served_or_refused() -> None:
    names = {field.name for field in dataclasses.fields(InferenceSettings)}
    assert names == fields.SETTINGS | fields.REFUSED | set(fields.MEDIA)
    assert not fields.SETTINGS & fields.REFUSED and not fields.REFUSED & set(fields.MEDIA)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "7", 7), ("steps", "12", 12), ("guidance_scale", "2.5", 2.5), ("fps", "24", 24), ("aes", "6.5", 6.5),
        ("num_frames", "4s", "4s"), ("num_frames", "17", "17"), ("draft", "true", True), ("watermark", "False", False),
        ("watermark", "made by me", "made by me"), ("image_size", "64, 48", [64, 48]), ("seconds", "2.5", 2.5),
        ("guidance_interval", "0.1 0.8", [0.1, 0.8]), ("mask_strategy", "0,0,0,0,1", ["0,0,0,0,1"]), ("seed", "x", "x"),
        ("cache_prompts", ["a", "b"], ["a", "b"]), ("prompt", "7", "7"), ("loop", 2, 2), ("keep", "5", "5"),
    ],
)  # fmt: skip
def test_texts_of_forms_become_values(name: str, text: Any, value: Any) -> None:
    assert fields.values_of({name: text}) == {name: value}


def test_batches_are_used_where_they_are_faster() -> None:
    tasks = [{"id": str(number), "batch_key": "k"} for number in range(4)]
    faster, slower = BatchSpeed(), BatchSpeed()
    for speed, seconds in ((faster, 2.0), (slower, 4.5)):
        assert [len(group) for group in speed.groups(tasks)] == [1, 3]  # the first time both ways are tried
        speed.record("k", 1, 1.0)
        speed.record("k", 3, seconds)
    assert [len(group) for group in faster.groups(tasks)] == [4]
    assert [len(group) for group in slower.groups(tasks)] == [1, 1, 1, 1]
    assert slower.is_slower("k") and not faster.is_slower("k") and not faster.is_slower("other")


class TestAdapters:
    """Adapters are the operator's files; requests name them."""

    @pytest.fixture
    def names(self, tmp_path: Path) -> list[str]:
        (tmp_path / "style.safetensors").write_bytes(b"one")
        (tmp_path / "other.safetensors").write_bytes(b"two")
        entries = [str(tmp_path / "style.safetensors"), f"soft={tmp_path / 'other.safetensors'}"]
        return copy_adapters(entries, tmp_path / "data")

    def test_are_copied_under_their_names(self, names: list[str], tmp_path: Path) -> None:
        assert names == ["soft", "style"]
        assert (tmp_path / "data/adapters/soft.safetensors").read_bytes() == b"two"
        assert copy_adapters([], tmp_path / "data") == [] and not (tmp_path / "data/adapters").exists()

    @pytest.mark.parametrize("given", ["style:0.5 soft", "style:0.5, soft:1", ["style:0.5", "soft"]])
    def test_are_named_by_requests(self, names: list[str], given: object) -> None:
        assert named_adapters(given, names) == ["style:0.5", "soft:1.0"]
        assert adapter_files(["style:0.5"]) == ["adapters/style.safetensors:0.5"]

    @pytest.mark.parametrize(
        "given", ["../style", "styl", "/etc/passwd", "style:nan", "style:1e9", 7, [None], ["a"] * 99]
    )
    def test_others_are_refused(self, names: list[str], given: object) -> None:
        with pytest.raises(ConfigError, match="lora"):
            named_adapters(given, names)

    @pytest.mark.parametrize("entry", ["gone.safetensors", "a/b=x.safetensors", "style.pt", "=x.safetensors"])
    def test_files_are_checked(self, entry: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--lora"):
            copy_adapters([entry], tmp_path)
