"""Devices by name: those of PyTorch, those that a package brings, and what is said where one is missing."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark_open_sora
import demo_open_sora
from opensora.acceleration import device as devices
from opensora.acceleration import streams
from opensora.acceleration.device import PACKAGES, pick_device
from opensora.config.settings import TrainSettings
from opensora.errors import ConfigError
from opensora.pipeline import benchmark
from opensora.training.trainer import Trainer
from tests.ranks import apart

ROOT = Path(__file__).parents[1]
HOST = torch.device("cpu")


def simulate(here: Path, there: Path) -> dict[str, int]:
    """Runs programs on the host and on a made-up "gcu", in a process of its own; what was asked of the device."""
    os.chdir(ROOT)
    import tests.fake_torch_gcu as fake

    sys.modules["torch_gcu"] = fake

    class Event:
        def __init__(self, device: str) -> None:
            assert device == "gcu"

        def record(self) -> None:
            fake.CALLS["events"] += 1

    torch.Event = Event
    # A trial for a large device takes a host too long.
    benchmark.peak_flops = lambda device, dtype: 1e12
    run_programs(here, "cpu")
    assert "placed" not in fake.CALLS
    run_programs(there, "gcu")
    return dict(fake.CALLS)


def run_programs(folder: Path, device: str) -> None:
    """Generation, the benchmark on the made-up device, and training."""
    argv = ["--device", device, "--image-size", "16", "24", "--num-frames", "5", "--num-sampling-steps", "2"]
    argv += ["--dtype", "fp32", "--verbose", "0", "--save-dir", str(folder), "--prompt", "a red circle"]
    assert demo_open_sora.main(argv) == 0
    if device == "gcu":
        report = ["--warmup-count", "0", "--eval-count", "1", "--benchmark-save-path", f"{folder}/report.json"]
        assert benchmark_open_sora.main([*argv, *report]) == 0
    torch.manual_seed(0)
    there = pick_device(device)
    model = torch.nn.Linear(4, 4).to(there)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        return model(torch.randn(2, 4, generator=generator).to(there)).square().mean()

    how = dict(dtype="fp32", max_steps=4, log_every=3, outputs=str(folder), tensorboard=False)
    trainer = Trainer(TrainSettings(model={"type": "Linear"}, **how), model, loss, there, 8)
    trainer.run()
    assert trainer.optimization.deferred_check == (device == "gcu")
    torch.save(model.weight.detach(), folder / "weight.pt")


def test_the_host_is_always_there() -> None:
    assert pick_device("cpu") == HOST
    assert pick_device().type in PACKAGES


@pytest.mark.parametrize("name", ["npu", "gcu:0"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"torch_{name[:3]}", None)
    with pytest.raises(ConfigError, match=f"needs the package torch_{name[:3]}; install .* or use --device cpu"):
        pick_device(name)


def test_a_package_that_is_broken_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "torch_npu.py").write_text("raise OSError('libascend.so: cannot open shared object file')")
    with pytest.raises(ConfigError, match=r"torch_npu is installed but cannot be used \(libascend.so"):
        pick_device("npu")
    (tmp_path / "torch_gcu.py").write_text("import a_package_that_nobody_has")
    with pytest.raises(ConfigError, match="torch_gcu needs 'a_package_that_nobody_has', which is not installed"):
        pick_device("gcu")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_what_this_pytorch_lacks_is_said(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}' cannot be used here.*built for {name}, its driver"):
        pick_device(name)


def test_unknown_names_are_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"not known; did you mean 'cuda'\? choose one of cpu, cuda, "):
        pick_device("cudda")


def test_the_host_has_accounts() -> None:
    devices.synchronize(HOST)
    devices.reset_peak_memory(HOST)
    assert devices.peak_memory(HOST) > 50 * 2**20
    assert "threads" in devices.device_name(HOST)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], Path, Path]:
    """What was asked of a made-up "gcu" while the programs ran on it, their outputs, and those on the host."""
    here, there = (tmp_path_factory.mktemp(device) for device in ("cpu", "gcu"))
    return apart(simulate, here, there), there, here


def test_a_backend_from_outside_runs_everything(simulated: tuple[dict[str, int], Path, Path]) -> None:
    calls, there, here = simulated
    assert calls["placed"] > 20
    assert calls["synchronize"] > 0 and calls["max_memory_allocated"] > 0
    from opensora.datasets.video import read_video

    ours, theirs = (read_video(folder / "sample_0000.mp4")[0].astype(int) for folder in (here, there))
    assert ours.shape == theirs.shape == (5, 16, 24, 3)
    assert abs(ours - theirs).max() <= 3  # other formulations of the same


def test_training_on_it_waits_for_no_step(simulated: tuple[dict[str, int], Path, Path]) -> None:
    calls, there, here = simulated
    assert calls["events"] > 0
    assert torch.equal(*(torch.load(folder / "weight.pt") for folder in (there, here)))


def test_its_report_names_it(simulated: tuple[dict[str, int], Path, Path]) -> None:
    report = json.loads((simulated[1] / "report.json").read_text())
    assert report["device"] == "gcu" and report["device_name"] == "made-up GCU"
    assert report["peak_memory_bytes"] == 12 * 2**20


def test_programs_at_the_root_name_no_device() -> None:
    """What test_layering holds for the package."""
    for file in ("benchmark_open_sora.py", "demo_open_sora.py"):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not texts & set(PACKAGES)


class TwoDevices:
    """The module of a kind of device of which a machine has two."""

    def __init__(self) -> None:
        self.current = 0

    def device_count(self) -> int:
        return 2

    def set_device(self, number: int) -> None:
        self.current = number


def test_each_rank_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    there, kind = TwoDevices(), torch.device("meta")
    monkeypatch.setattr(torch, "get_device_module", lambda device: there)
    devices.set_device(kind, 1)
    assert there.current == 1
    with pytest.raises(ConfigError, match="rank 2 of this machine has no device; start 2 with --nproc_per_node 2"):
        devices.set_device(kind, 2)
    devices.set_device(kind, 2, share=True)
    assert there.current == 0
    with pytest.raises(ConfigError, match=r"'meta:0' is one device, .* several processes; use 'meta'"):
        devices.set_device(torch.device("meta:0"), 1)
    devices.set_device(HOST, 3)


def test_a_host_does_one_thing_after_another() -> None:
    assert not streams.is_asynchronous(HOST)
    assert streams.read_async(torch.tensor([1.0, 2.0]))() == [1.0, 2.0]
    batch = {"video": torch.zeros(2), "names": ["a"]}
    assert streams.pin_memory_for(HOST)(batch) is batch
    assert devices.fastest_adamw(HOST) == {"fused": True, "foreach": False}


def test_a_device_without_fused_steps_takes_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    def adam(parameters: Any, fused: bool) -> None:
        raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")

    monkeypatch.setattr(torch.optim, "AdamW", adam)
    assert devices.fastest_adamw.__wrapped__(HOST) == {"fused": False, "foreach": True}
