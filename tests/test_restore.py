"""Checkpoints that are damaged in any way: one line that names the file, and the newest whole one is taken."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from opensora.distributed.process_group import RankLayout
from opensora.errors import WeightsError
from opensora.training.checkpoint import folders, manifest, write
from opensora.training.checkpoint.running_states import read_running_states
from opensora.training.checkpoint.snapshot import take_snapshot
from tests.test_trainer import names, trainer

FILES = ("model/config.json", "model/model.safetensors", "ema.pt", "optimizer/optimizer.pt", "running_states.json",
         "optimizer/manifest.json")  # fmt: skip
OPTIMIZER = "optimizer/optimizer.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with its last two checkpoints."""
    return trainer(tmp_path_factory.mktemp("runs")).run().parent


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """Checkpoints to damage."""
    return shutil.copytree(finished, tmp_path / "gathered", symlinks=True)


def newest(folder: Path) -> Path:
    return folders.checkpoints(folder)[-1]


def refusal(checkpoint: Path, **changes: Any) -> str:
    """The one line that refuses a checkpoint."""
    with pytest.raises(WeightsError) as raised:
        trainer(checkpoint.parents[1] / "new", load=str(checkpoint), **changes)
    message = str(raised.value)
    assert message.count("\n") == 0 and checkpoint.name in message and len(message) < 500, message
    assert not (checkpoint.parents[1] / "new").exists(), "nothing was begun"
    return message


class TestHashes:
    @pytest.mark.parametrize("where", [0.0, 0.13, 0.5, 0.77, 0.999])
    @pytest.mark.parametrize("file", FILES)
    def test_one_flipped_byte_is_named(self, folder: Path, file: str, where: float) -> None:
        path = newest(folder) / file
        content = bytearray(path.read_bytes())
        content[int(where * len(content))] ^= 1
        path.write_bytes(content)
        message = refusal(newest(folder))
        assert str(path) in message or (file.endswith("manifest.json") and "damaged" in message)

    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("damage", ["empty", "half", "zeros", "gone"])
    def test_a_power_loss(self, folder: Path, file: str, damage: str) -> None:
        path = newest(folder) / file
        size = path.stat().st_size
        kept = {"empty": b"", "half": path.read_bytes()[: size // 2], "zeros": bytes(size), "gone": None}[damage]
        path.unlink() if kept is None else path.write_bytes(kept)
        if file.endswith("manifest.json") and damage == "gone":  # as earlier versions wrote them
            assert trainer(folder.parent / "new", load=str(newest(folder))).step == 10
        else:
            refusal(newest(folder))

    @pytest.mark.parametrize("file", FILES[:5])
    def test_the_newest_whole_one_is_taken(self, folder: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
        (newest(folder) / file).write_bytes(b"x" * 300)
        run = trainer(folder.parent / "new", load=str(folder), max_steps=9)
        assert run.step == 8 and run.folder == folder.parent / "new" / "000-Linear-1"
        (line,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
        assert str(newest(folder) / file) in line and line.endswith("resuming from epoch1-global_step8")
        run.run()
        assert names(folder) == ["epoch1-global_step8", "epoch2-global_step10"]

    def test_none_is_whole(self, folder: Path) -> None:
        for checkpoint in folders.checkpoints(folder):
            (checkpoint / "ema.pt").write_bytes(b"")
        with pytest.raises(WeightsError, match=r"step10/ema.pt: has changed .*nor can 1 older"):
            trainer(folder.parent / "new", load=str(folder))

    def test_an_export_takes_no_damaged_file(self, folder: Path) -> None:
        (newest(folder) / "ema.pt").write_bytes(b"x")
        with pytest.raises(WeightsError, match=r"ema.pt: has changed"):
            folders.find_checkpoint(folder)

    def test_files_that_are_added_do_not_matter(self, folder: Path) -> None:
        (newest(folder) / "sampler").write_text("of the original")
        assert trainer(folder.parent / "new", load=str(newest(folder))).step == 10


def without_hashes(folder: Path) -> Path:
    """The newest checkpoint as an earlier version wrote it."""
    (newest(folder) / manifest.FILE).unlink()
    return newest(folder)


def test_older_formats_load(folder: Path) -> None:
    checkpoint = without_hashes(folder)
    path = checkpoint / "running_states.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name != "samples"}
    path.write_text(json.dumps({**kept, "of another version": [1]}))
    run = trainer(folder.parent / "new", load=str(checkpoint))
    assert run.step == 10 and run.train_step.samples == 10


WRONG_STATES: dict[str, Any] = {
    "a list": [], "null": None, "a text": "x", "a number": 7, "empty": {}, "no step": {"epoch": 0},
    "a text for a number": {"epoch": "0", "step": 0, "global_step": 2},
    "negative": {"epoch": 0, "step": -1, "global_step": 2},
    "a fraction": {"epoch": 0, "step": 0.5, "global_step": 2},
    "true": {"epoch": True, "step": 0, "global_step": 2},
    "a huge epoch": {"epoch": 10**18, "step": 0, "global_step": 2},
    "a huge index": {"epoch": 0, "step": 0, "global_step": 2, "index": 10**18},
    "losses of texts": {"epoch": 0, "step": 0, "global_step": 2, "losses": ["x"]},
    "a fingerprint of numbers": {"epoch": 0, "step": 0, "global_step": 2, "fingerprint": {"lr": 1}},
    "a fingerprint that is a list": {"epoch": 0, "step": 0, "global_step": 2, "fingerprint": []},
    "a guard without norms": {"epoch": 0, "step": 0, "global_step": 2, "guard": {"in_a_row": 0}},
    "a guard of texts": {"epoch": 0, "step": 0, "global_step": 2,
                         "guard": {"norms": ["x"], "in_a_row": 0, "overflows": 0}},
}  # fmt: skip


@pytest.mark.parametrize("value", WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_position_of_wrong_types(folder: Path, value: Any) -> None:
    checkpoint = without_hashes(folder)
    (checkpoint / "running_states.json").write_text(json.dumps(value))
    assert "running_states.json" in refusal(checkpoint)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 10**5, '{"epoch": NaN, "step": 0, "global_step": 1}', "1" * 5000, "\x00" * 50, "\ud800", "null"],
    ids=["empty", "cut", "deep", "nan", "digits", "zeros", "surrogate", "null"],
)
def test_a_position_that_is_no_json(folder: Path, text: str) -> None:
    checkpoint = without_hashes(folder)
    (checkpoint / "running_states.json").write_bytes(text.encode(errors="surrogatepass"))
    assert "running_states.json" in refusal(checkpoint)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def changed(saved: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The state of an optimizer with other moments of its first parameter."""
    moments = {**saved["optimizer"]["state"][0], key: value}
    return {**saved, "optimizer": {**saved["optimizer"], "state": {**saved["optimizer"]["state"], 0: moments}}}


WRONG_OPTIMIZERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda saved: [],
    "a tensor": lambda saved: torch.zeros(2),
    "nothing": lambda saved: {},
    "without groups": lambda saved: {**saved, "optimizer": {"state": {}}},
    "groups of texts": lambda saved: {**saved, "optimizer": {"state": {}, "param_groups": ["x"]}},
    "parameters of texts": lambda saved: {**saved, "optimizer": {"state": {}, "param_groups": [{"params": ["x"]}]}},
    "a nest": lambda saved: {"optimizer": nested(200), "scaler": {}},
    "more parameters": lambda saved: {**saved, "optimizer": {"state": {}, "param_groups": [{"params": [0, 1, 2]}]}},
    "moments of another": lambda saved: {**saved, "optimizer": {**saved["optimizer"], "state": {"x": {}, 9: {}}}},
    "moments of texts": lambda saved: changed(saved, "exp_avg", "x"),
    "moments of other shapes": lambda saved: changed(changed(saved, "exp_avg", torch.ones(3)), "exp_avg_sq",
                                                     torch.ones(3)),
    "two shapes": lambda saved: changed(saved, "exp_avg", torch.ones(3)),
    "nan": lambda saved: changed(saved, "exp_avg", torch.full((4, 4), float("nan"))),
    "infinite": lambda saved: changed(saved, "exp_avg_sq", torch.full((4, 4), float("inf"))),
    "more than it holds": lambda saved: changed(saved, "exp_avg", torch.zeros(1).expand(10**6, 10**6)),
    "sparse": lambda saved: changed(saved, "exp_avg", torch.zeros(4, 4).to_sparse()),
    "a scaler of texts": lambda saved: {**saved, "scaler": {"scale": "x"}},
    "a scaler of nothing": lambda saved: {**saved, "scaler": {"scale": 0.0, "growth_factor": 2.0,
                                          "backoff_factor": 0.5, "growth_interval": 1, "_growth_tracker": 0}},
}  # fmt: skip


@pytest.mark.parametrize("spoil", WRONG_OPTIMIZERS.values(), ids=WRONG_OPTIMIZERS)
def test_an_optimizer_of_something_else(folder: Path, spoil: Callable[[dict[str, Any]], Any]) -> None:
    checkpoint = without_hashes(folder)
    torch.save(spoil(torch.load(checkpoint / OPTIMIZER, weights_only=True)), checkpoint / OPTIMIZER)
    refusal(checkpoint)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"not a pickle", b"\x80\x02]q\x00h\x00a."])
def test_an_optimizer_that_is_no_pickle(folder: Path, content: bytes) -> None:
    checkpoint = without_hashes(folder)
    (checkpoint / OPTIMIZER).write_bytes(content)
    assert "optimizer.pt" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["tuple_hash_bomb.pt", "selfref.pt", "lfs.safetensors"])
def test_a_hostile_optimizer(folder: Path, name: str) -> None:
    checkpoint = without_hashes(folder)
    shutil.copyfile(Path(__file__).parent / "cases/checkpoints" / name, checkpoint / OPTIMIZER)
    began = time.process_time()
    assert "optimizer.pt" in refusal(checkpoint)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["model", "ema"])
def test_weights_that_are_not_finite(folder: Path, part: str, value: float) -> None:
    from safetensors.torch import save_file

    checkpoint, weights = without_hashes(folder), {"weight": torch.full((4, 4), value), "bias": torch.zeros(4)}
    if part == "model":
        save_file(weights, checkpoint / "model/model.safetensors")
    else:
        torch.save(weights, checkpoint / "ema.pt")
    assert "weight is not finite" in refusal(checkpoint) and read_running_states(checkpoint).global_step == 10


def test_another_model_is_no_damage(folder: Path) -> None:
    """Nothing of the run is changed by what does not fit."""
    from opensora.training.ema import EMA

    checkpoint, other = newest(folder), nn.Linear(5, 5)
    optimizer, scaler = torch.optim.AdamW(other.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    position = {"epoch": 0, "step": 0, "global_step": 1}
    snapshot = take_snapshot(other, EMA(other, 0.9), optimizer, scaler, RankLayout())
    made = write.write_checkpoint(folder.parent, snapshot, {}, position, keep=1)
    assert "its model does not fit Linear: 2 tensors, such as bias" in refusal(made)
    assert checkpoint.is_dir()


def test_settings_of_the_optimizer_are_those_of_the_run(folder: Path) -> None:
    """Those that were accepted as changes count, not those of the checkpoint."""
    run = trainer(folder.parent / "new", load=str(newest(folder)), weight_decay=0.5, adam_betas=(0.8, 0.9))
    assert run.optimization.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert run.optimization.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
