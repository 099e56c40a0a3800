"""What a run tells of itself can be read again: by people, by tensorboard, by wandb."""

from __future__ import annotations

import json
import sys
import types
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensora.config.settings import TrainSettings
from opensora.datasets.video import read_image, read_video
from opensora.errors import ConfigError
from opensora.training import tracking
from opensora.training.tracking import Tracker, copy_log, import_wandb

FRAMES = np.linspace(0, 255, 8 * 16 * 24 * 3).reshape(8, 16, 24, 3).astype(np.uint8)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(model={"type": "STDiT3"}, **{"tensorboard": False, **changes})


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class TestLog:
    def test_lines_in_order(self, tmp_path):
        tracker = Tracker(tmp_path, settings())
        lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "bad_step": {"what": "é"}}]
        for line in lines:
            tracker.step(line)
        tracker.close()
        assert log(tmp_path) == lines

    def test_is_strict_json(self, tmp_path):
        Tracker(tmp_path, settings()).step({"step": 1, "grad_norm": float("nan"), "loss": float("inf")})
        assert log(tmp_path) == [{"step": 1, "grad_norm": "nan", "loss": "inf"}]

    def test_other_ranks_write_nothing(self, tmp_path):
        tracker = Tracker(tmp_path, settings(wandb=True, tensorboard=True), is_main=False)
        tracker.step({"step": 1, "loss": 0.5})
        assert tracker.video("x", FRAMES, 24, 1) is None
        tracker.close()
        assert list(tmp_path.iterdir()) == []

    def test_resumed_run_drops_the_steps_that_it_takes_again(self, tmp_path):
        lines = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
        (tmp_path / "log.jsonl").write_text("".join(lines) + '{"step": 6, "lo')
        Tracker(tmp_path, settings(), step=3).step({"step": 4, "again": True})
        assert log(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]

    def test_log_of_another_folder(self, tmp_path):
        (tmp_path / "old.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        copy_log(tmp_path / "old.jsonl", tmp_path / "new.jsonl", 1)
        copy_log(tmp_path / "none.jsonl", tmp_path / "nothing.jsonl", 1)
        assert (tmp_path / "new.jsonl").read_text() == '{"step": 1}\n'
        assert (tmp_path / "old.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
        assert not (tmp_path / "nothing.jsonl").exists()


class TestVideos:
    def test_is_a_file_that_plays(self, tmp_path):
        path = Tracker(tmp_path, settings()).video("a red/../ball, 'moving'", FRAMES, 12, 30)
        assert path == tmp_path / "samples" / "step0000030-a-red-..-ball-moving.mp4"
        frames, fps = read_video(path)
        assert frames.shape == FRAMES.shape and fps == 12
        assert np.abs(frames.astype(int) - FRAMES).mean() < 4

    def test_single_frame_is_an_image(self, tmp_path):
        path = Tracker(tmp_path, settings()).video("ball", FRAMES[:1], 24, 2)
        assert path.name == "step0000002-ball.png" and np.array_equal(read_image(path), FRAMES[0])


class TestTensorboard:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("tensorboard")

    def events(self, folder: Path) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
        return accumulator.Reload()

    def test_curves_texts_and_videos(self, tmp_path):
        from PIL import Image

        tracker = Tracker(tmp_path, settings(tensorboard=True))
        for step in (1, 2, 3):
            tracker.step({"step": step, "loss": 1 / step, "validation/240p-17f-1:1/t0.35": step, "ok": True})
        tracker.video("ball", FRAMES, 10, 3)
        tracker.close()
        events = self.events(tmp_path)
        assert set(events.Tags()["scalars"]) == {"loss", "validation/240p-17f-1:1/t0.35"}
        assert [(one.step, one.value) for one in events.Scalars("loss")] == [
            (s, pytest.approx(1 / s)) for s in (1, 2, 3)
        ]
        assert "ok/text_summary" in events.Tags()["tensors"]
        (image,) = events.Images("samples/ball")
        film = Image.open(BytesIO(image.encoded_image_string))
        assert (image.step, image.width, image.height) == (3, 24, 16)
        assert (film.format, film.n_frames, film.info["duration"]) == ("GIF", len(FRAMES), 100)

    def test_resumed_run_hides_the_steps_that_it_takes_again(self, tmp_path):
        for first, last, value in ((1, 5, 1.0), (4, 6, 2.0)):
            tracker = Tracker(tmp_path, settings(tensorboard=True), step=first - 1)
            for step in range(first, last + 1):
                tracker.step({"step": step, "loss": value})
            tracker.close()
        found = [(one.step, one.value) for one in self.events(tmp_path).Scalars("loss")]
        assert found == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]

    def test_can_be_switched_off(self, tmp_path):
        Tracker(tmp_path, settings(tensorboard=False)).close()
        assert not (tmp_path / "tensorboard").exists()


def test_run_goes_on_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tracker = Tracker(tmp_path, settings(tensorboard=True))
    tracker.step({"step": 1, "loss": 1.0})
    tracker.close()
    assert log(tmp_path) == [{"step": 1, "loss": 1.0}] and not (tmp_path / "tensorboard").exists()


class FakeWandb(types.ModuleType):
    """What the tracker uses of wandb, with a record of the calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starts: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.metrics: list[Any] = []
        self.finished = 0
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.refuses = False

    def init(self, **options: Any) -> FakeWandb:
        if self.refuses:
            raise self.errors.Error("api_key not\nconfigured")
        self.starts.append(options)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def finish(self) -> None:
        self.finished += 1

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def Video(self, path: str, format: str) -> tuple[str, str]:
        return format, path

    def Image(self, path: str) -> tuple[str, str]:
        return "png", path


class TestWandb:
    @pytest.fixture
    def wandb(self, monkeypatch) -> FakeWandb:
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        monkeypatch.setenv("WANDB_MODE", "offline")
        return fake

    def test_curves_and_videos(self, tmp_path, wandb):
        tracker = Tracker(tmp_path, settings(wandb=True))
        tracker.step({"step": 5, "loss": 0.5, "bad_step": {"what": "x"}})
        path = tracker.video("ball", FRAMES, 24, 5)
        image = tracker.video("still", FRAMES[:1], 24, 5)
        tracker.close()
        assert wandb.lines == [
            {"step": 5, "loss": 0.5, "bad_step": '{"what": "x"}'},
            {"step": 5, "samples/ball": ("mp4", str(path))},
            {"step": 5, "samples/still": ("png", str(image))},
        ]
        assert ("*", "step") in wandb.metrics and wandb.finished == 1
        assert wandb.starts[0]["config"]["model"] == {"type": "STDiT3"} and wandb.starts[0]["dir"] == str(tmp_path)

    def test_resumed_run_is_the_same_one(self, tmp_path, wandb):
        for folder in ("a", "a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Tracker(tmp_path / folder, settings(wandb=True)).close()
        ids = [start["id"] for start in wandb.starts]
        assert ids[0] == ids[1] != ids[2] and all(start["resume"] == "allow" for start in wandb.starts)

    @pytest.mark.parametrize(
        ("mode", "offline", "answers", "expected"),
        [
            ("offline", False, True, "offline"), ("disabled", False, True, "disabled"), (None, True, True, "offline"),
            (None, False, False, "offline"), (None, False, True, "online"),
        ],
    )  # fmt: skip
    def test_offline(self, tmp_path, monkeypatch, wandb, mode, offline, answers, expected):
        monkeypatch.delenv("WANDB_MODE")
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setattr(tracking, "_server_answers", lambda: answers)
        Tracker(tmp_path, settings(wandb=True, offline=offline)).close()
        assert wandb.starts[0]["mode"] == expected

    def test_a_server_that_does_not_answer(self, monkeypatch):
        asked = []

        def connect(address: tuple[str, int], timeout: float) -> None:
            asked.append((address, timeout))
            raise OSError("no network")

        monkeypatch.setattr(tracking.socket, "create_connection", connect)
        monkeypatch.setattr(tracking.urllib.request, "getproxies", dict)
        for url in ("https://wandb.example", "http://localhost:8080"):
            monkeypatch.setenv("WANDB_BASE_URL", url)
            assert not tracking._server_answers()
        assert asked == [(("wandb.example", 443), tracking.PATIENCE), (("localhost", 8080), tracking.PATIENCE)]
        monkeypatch.setattr(tracking.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
        assert tracking._server_answers() and len(asked) == 2

    def test_nobody_is_logged_in(self, tmp_path, wandb):
        wandb.refuses = True
        with pytest.raises(ConfigError, match=r"api_key not configured\); run `wandb login`, set WANDB_MODE=offline"):
            Tracker(tmp_path, settings(wandb=True))

    def test_false_means_false(self, tmp_path, wandb):
        Tracker(tmp_path, settings(wandb=False)).step({"step": 1, "loss": 1.0})
        assert wandb.starts == [] and not (tmp_path / "wandb").exists()

    def test_missing_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ConfigError, match=r"pip install wandb`, or remove --wandb"):
            Tracker(tmp_path, settings(wandb=True))

    def test_folder_of_that_name_is_no_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
        with pytest.raises(ConfigError, match="pip install wandb"):
            import_wandb()


def test_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for step in (0, 2):
        tracker = Tracker(tmp_path, settings(wandb=True), step=step)
        tracker.step({"step": step + 1, "loss": 0.5})
        tracker.video("ball", FRAMES, 24, step + 1)
        tracker.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2 and len({path.name for path in runs}) == 1  # one id
    assert all(path.stat().st_size > 0 for path in runs)
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/videos/samples/*.mp4"))
