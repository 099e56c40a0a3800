"""The client of OpenAI, unchanged, against a server; and what the server adds to the protocol."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from opensora.datasets.video import encode_image, read_image, read_video, write_video
from tests.serving.programs import KEY, OTHER, ServerProgram, wait_for_all

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

PROMPT = "a red circle moving right on a black background"
SMALL = {"num_frames": 17, "steps": 3, "width": 32, "height": 32}


@pytest.fixture
def client(server: ServerProgram) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


def png(tmp_path: Path, value: int = 200) -> Path:
    file = tmp_path / "start.png"
    encode_image(np.full((32, 32, 3), value, np.uint8), file)
    return file


def test_create_poll_and_content(client: openai.OpenAI, tmp_path: Path) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, size="32x32", extra_body={"num_frames": 17, "steps": 3})
    assert (video.status, video.progress, video.size, video.seconds) == ("completed", 100, "32x32", "2.125")
    assert video.model == "embedded" and video.prompt == PROMPT and video.expires_at > video.completed_at
    file = tmp_path / "video.mp4"
    client.videos.download_content(video.id).write_to_file(file)
    frames, fps = read_video(file)
    assert frames.shape == (17, 32, 32, 3) and fps == 8
    for variant in ("thumbnail", "spritesheet"):
        picture = tmp_path / f"{variant}.png"
        client.videos.download_content(video.id, variant=variant).write_to_file(picture)
        assert read_image(picture).ndim == 3


def test_upload_pages_and_delete(client: openai.OpenAI, tmp_path: Path) -> None:
    with png(tmp_path).open("rb") as image:
        first = client.videos.create_and_poll(prompt=PROMPT, input_reference=image, extra_body=SMALL)
    assert first.status == "completed", first.error
    second = client.videos.remix(first.id, prompt="a blue square")
    assert second.remixed_from_video_id == first.id
    ids = [video.id for video in client.videos.list(limit=1)]  # follows the pages
    assert ids[:2] == [second.id, first.id] and len(set(ids)) == len(ids) >= 2
    oldest_first = [video.id for video in client.videos.list(limit=1, order="asc")]
    assert oldest_first == ids[::-1]
    client.videos.poll(second.id)
    assert client.videos.delete(second.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(second.id)


def test_edits_and_extensions(client: openai.OpenAI, web: httpx.Client, tmp_path: Path) -> None:
    clip = np.zeros((20, 32, 32, 3), np.uint8)
    clip[:, 8:24, 8:24] = 255
    file = write_video(clip, tmp_path / "clip.mp4", 8)
    with file.open("rb") as video:
        edited = client.videos.edit(prompt="a green square", video=video, extra_body=SMALL)
        longer = client.videos.extend(prompt=PROMPT, seconds="4", video=video, extra_body=SMALL | {"num_frames": 34})
    assert client.videos.poll(edited.id).status == "completed"
    by_id = {"prompt": PROMPT, "seconds": "4", "steps": "3"}
    in_json = web.post("/v1/videos/extensions", json={**by_id, "seconds": 4, "steps": 3, "video": {"id": edited.id}})
    form = {name: (None, value) for name, value in {**by_id, "video[id]": edited.id}.items()}
    in_form = web.post("/v1/videos/extensions", files=form)
    jobs = wait_for_all(web, [longer.id, in_json.json()["id"], in_form.json()["id"]])
    assert {job["status"] for job in jobs.values()} == {"completed"}, jobs
    assert [job["num_frames"] for job in jobs.values()] == [34, 32, 32]


def test_every_kind_of_error(client: openai.OpenAI, server: ServerProgram) -> None:
    def refused(kind: type[openai.APIStatusError], **fields: object) -> str:
        with pytest.raises(kind) as error:
            client.videos.create(**{"prompt": PROMPT, **fields})
        return error.value.message

    assert "size is 'big'; write width x height" in refused(openai.BadRequestError, size="big")
    assert "model 'sora-2' is not served" in refused(openai.BadRequestError, model="sora-2")
    assert "unknown field 'stepz'; did you mean 'steps'" in refused(openai.BadRequestError, extra_body={"stepz": 3})
    assert "seed must be" in refused(openai.BadRequestError, extra_body={"seed": "x"})
    assert "save_dir is chosen by the server" in refused(openai.BadRequestError, extra_body={"save_dir": "/tmp"})
    assert "no image or video" in refused(openai.BadRequestError, input_reference=io.BytesIO(b"text"))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong-key").videos.list()
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve("video_000000000000000000000000")
    video = client.videos.create(prompt=PROMPT, extra_body=SMALL)
    with pytest.raises(openai.NotFoundError):  # of another key
        client.with_options(api_key=OTHER).videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError):
        client.videos.list(limit=1000)
    client.videos.delete(video.id)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["embedded"]


def test_drafts_continue_and_replay(web: httpx.Client) -> None:
    whole = web.post("/v1/videos", json={"prompt": PROMPT, **SMALL, "seed": 5}).json()
    draft = web.post("/v1/videos", json={"prompt": PROMPT, **SMALL, "seed": 5, "steps_until": 1}).json()
    jobs = wait_for_all(web, [whole["id"], draft["id"]])
    assert jobs[draft["id"]]["draft"] and jobs[draft["id"]]["sha256"] != jobs[whole["id"]]["sha256"]
    rest = web.post(f"/v1/videos/{draft['id']}/continue").json()
    again = web.post(f"/v1/videos/{whole['id']}/replay").json()
    jobs |= wait_for_all(web, [rest["id"], again["id"]])
    assert jobs[rest["id"]]["sha256"] == jobs[whole["id"]]["sha256"], jobs[rest["id"]]["error"]
    assert jobs[rest["id"]]["made_from"] == {"continue": draft["id"]} and jobs[again["id"]]["identical"]
    assert web.post(f"/v1/videos/{whole['id']}/continue").status_code == 409
    recipe = web.get(f"/v1/videos/{whole['id']}/recipe").json()
    assert recipe["seed"] == 5 and recipe["output"]["sha256"] == jobs[whole["id"]]["sha256"]


def test_events_tell_progress_and_cancel_stops(web: httpx.Client) -> None:
    job = web.post("/v1/videos", json={"prompt": PROMPT, "steps": 500}).json()
    seen = []
    with web.stream("GET", f"/v1/videos/{job['id']}/events") as stream:
        for name, data in events(stream.iter_lines()):
            seen.append(name)
            if name == "preview" and data["step"] > 1:
                assert data["image"].startswith("data:image/webp;base64,")
                assert web.post(f"/v1/videos/{job['id']}/cancel").json()["error"]["code"] == "cancelled"
    assert seen[0] == "status" and seen[-1] == "status" and seen.count("progress") >= 2
    job = web.get(f"/v1/videos/{job['id']}").json()
    assert (job["status"], job["error"]["code"]) == ("failed", "cancelled") and job["progress"] < 50


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict]]:
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def test_a_plan_tells_sizes_and_costs(web: httpx.Client, tmp_path: Path) -> None:
    uploaded = web.post("/v1/files", files={"file": png(tmp_path).open("rb")}).json()
    plan = web.post("/v1/videos/plan", json={"prompt": PROMPT, **SMALL, "image": uploaded["id"]}).json()
    assert (plan["num_frames"], plan["height"], plan["width"]) == (17, 32, 32) and plan["seconds"] > 0
    assert plan["timeline"][0][0]["kind"] == "kept" and plan["timeline"][0][-1]["kind"] == "generated"
    assert web.delete(f"/v1/files/{uploaded['id']}").json()["deleted"]
    wrong = web.post("/v1/videos/plan", json={"prompt": PROMPT, "image": "/etc/passwd"})
    assert wrong.status_code == 400 and "the server reads no paths" in wrong.json()["error"]["message"]


def test_health_and_metrics(web: httpx.Client) -> None:
    assert web.get("/health").json()["status"] == "ok"
    text = web.get("/metrics").text
    assert 'opensora_jobs{status="completed"}' in text and 'opensora_memory_bytes{process="worker0"}' in text
