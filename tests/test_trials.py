"""Choices of speed are tried on the machine at hand: where they lose, one line says so, and they are followed."""

from __future__ import annotations

import logging

import pytest
import torch

from opensora.acceleration import trial
from opensora.acceleration.precision import inference_dtype
from opensora.cli.merge import settings_of
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.pipeline import step_cache
from opensora.pipeline.loaded_models import LoadedModels
from opensora.utils.config_utils import inference_parser

CPU = torch.device("cpu")


def settings(*argv: str) -> InferenceSettings:
    return settings_of(InferenceSettings, inference_parser().parse_args(["embedded", "--prompt", "a cat", *argv]))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the trials take, one after the other; nothing is computed."""
    taken: list[float] = []
    monkeypatch.setattr(trial, "seconds", lambda work, device: taken.pop(0))
    monkeypatch.setattr(step_cache, "use_attention", lambda name, device: None)
    monkeypatch.setattr(step_cache.quantization, "check", lambda *_: None)
    monkeypatch.setattr("opensora.acceleration.precision.multiplies_bf16", lambda: True)
    return taken


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--linear", "int8"), "--linear int8 takes {} times as long as exact layers here"),
        (("--linear", "fp8"), "--linear fp8 takes {} times as long as exact layers here"),
        (("--cpu-dtype", "bf16"), "--cpu-dtype bf16 takes {} times as long as fp32 here"),
        (("--attention", "FA3"), "--attention FA3 takes {} times as long as PyTorch's own attention here"),
    ],
)
@pytest.mark.parametrize(("ratio", "told"), [(6.5, True), (1.2, True), (1.0, False), (0.3, False)])
def test_what_loses_is_told_in_one_line(
    clock: list[float], caplog: pytest.LogCaptureFixture, argv: tuple[str, ...], words: str, ratio: float, told: bool
) -> None:
    clock += [1.0, ratio] if "--attention" in argv else [ratio, 1.0]  # attention is switched between its trials
    asked = settings(*argv)
    with caplog.at_level(logging.WARNING, "opensora"):
        step_cache.warn_slow_options(asked, CPU, inference_dtype(CPU, asked.dtype, asked.cpu_dtype))
    assert [record.getMessage() for record in caplog.records] == (
        [f"{words.format(ratio)}, by a moment's trial; remove it to be faster"] if told else []
    )
    assert not clock


def test_nothing_is_tried_that_was_not_asked_for(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    step_cache.warn_slow_options(settings(), CPU, torch.float32)
    step_cache.warn_slow_options(
        settings("--dtype", "bf16"), torch.device("meta"), torch.bfloat16
    )  # as an accelerator computes
    assert not caplog.records


def test_a_choice_is_tried_by_real_work_and_followed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert 0.01 < trial.linear("int8", CPU, torch.float32) < 1000
    assert trial.products(torch.float64, torch.float32, CPU) > 0
    before = torch.get_rng_state()
    monkeypatch.setattr(trial, "linear", lambda *_: 7.0)
    models = LoadedModels(settings("--linear", "int8"))
    assert models.settings.linear == "int8" and "takes 7.0 times as long" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_device_cannot_do_stays_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such product")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    with pytest.raises(ConfigError, match="cannot multiply in int8"):
        step_cache.warn_slow_options(settings("--linear", "int8"), CPU, torch.float32)
