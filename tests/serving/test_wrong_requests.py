"""Bodies with random mistakes: each is answered by a plan or by one line of the protocol's error; none is a failure."""

from __future__ import annotations

import json
import os

import httpx
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.full import count
from tests.wrong_inputs.mutations import as_json, damaged, mutated

SEED = int(os.environ.get("OPENSORA_TEST_SEED", 0))
BODY = {
    "prompt": "a red circle moving right on a black background", "model": "embedded", "size": "48x80",
    "num_frames": 34, "seed": 3, "steps": 2, "guidance_scale": 2.5, "negative_prompt": "blue", "loop": 2,
    "condition_frame_length": 5, "flow": 5, "camera_motion": "pan right", "lora": [], "fps": 8,
    "guidance_interval": [0.1, 0.9],
}  # fmt: skip


def ask(web: httpx.Client, content: bytes) -> httpx.Response:
    return web.post("/v1/videos/plan", content=content, headers={"content-type": "application/json"}, timeout=60)


def test_wrong_requests_are_told_in_one_line(web: httpx.Client) -> None:
    assert (right := ask(web, as_json(BODY))).status_code == 200, right.text
    answers = {"right": 0, "refused": 0}

    @seed(SEED)
    @settings(max_examples=count(30, 400), deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        content = as_json(data.draw(mutated(BODY), label="body"))
        if data.draw(st.integers(0, 4), label="bytes?") == 0:
            content = data.draw(damaged(content))
        answer = ask(web, content)
        if answer.status_code == 200:
            answers["right"] += 1
            return
        assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:500])
        answers["refused"] += 1
        error = answer.json()["error"]
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) <= 2000
        assert "Traceback" not in json.dumps(error)

    try_one()
    assert answers["refused"], answers
    assert web.get("/health").status_code == 200
