"""Step caches: their cost, their error, calibration, and that a recipe repeats them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opensora import cli, registry
from opensora.acceleration.step_cache import cached_sampling, calibration
from opensora.acceleration.step_cache.cached_sampling import Cache
from opensora.acceleration.step_cache.calibration import calibrate, cheapest
from opensora.acceleration.step_cache.profile import Profile, predicted_error
from opensora.acceleration.step_cache.rules import first_input, mag_table, polynomial
from opensora.acceleration.step_cache.table import CacheTable
from opensora.acceleration.step_cache.table_search import SignalFit, candidates
from opensora.config import find_config, read_config
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError
from opensora.pipeline import step_cache
from opensora.pipeline.recipe import read_recipe
from opensora.pipeline.replay import replay
from tests.full import FULL, some
from tests.tiny import TINY_STDIT3

SHAPE, STEPS, SCALE = (1, 4, 2, 4, 4), 12, 3.0
SCHEDULERS: dict[str, dict[str, Any]] = {
    "rflow": {"num_sampling_steps": STEPS, "cfg_scale": SCALE},
    "iddpm": {"num_sampling_steps": STEPS, "cfg_scale": SCALE, "cfg_channel": 3},
    "dpm-solver": {"num_sampling_steps": STEPS, "cfg_scale": SCALE},
    "singlestep": {"num_sampling_steps": STEPS, "cfg_scale": SCALE, "method": "singlestep", "order": 3},
}


def make_scheduler(name: str) -> Any:
    return registry.build({"type": "dpm-solver" if name == "singlestep" else name, **SCHEDULERS[name]})


class Model:
    """A smooth denoiser that pulls towards what it is told; counts its rows, and gives a variance on demand."""

    def __init__(self, variance: bool = False) -> None:
        self.rows, self.variance = 0, variance

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor, **_: Any) -> Tensor:
        self.rows += len(x)
        time = (timestep / 1000)[:, None, None, None, None]
        target = y[:, :, None, None, None] * (1 + 0.3 * torch.sin(3 * time))
        out = target - 0.5 * torch.tanh(x) * (1 + time)
        return torch.cat([out, 0.1 * out], dim=1) if self.variance else out


def told(number: int) -> dict[str, Tensor]:
    return {"y": torch.randn(1, 4, generator=torch.Generator().manual_seed(number))}


def run(
    scheduler: Any, model: Any, number: int, cache: Cache, observe: Any = None, counter: list[int] | None = None
) -> Tensor:
    generator = torch.Generator().manual_seed(100 + number)
    noise = torch.randn(SHAPE, generator=generator)
    null = {"y": torch.zeros(1, 4)}
    return cached_sampling.sample(
        scheduler, model, noise, told(number), null, cache, observe, counter, source=[generator]
    )  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_computing_everything_changes_no_bit(name: str) -> None:
    scheduler, model = make_scheduler(name), Model(variance=name == "iddpm")
    exact = run(scheduler, model, 0, Cache())
    rows, counter = model.rows, []
    assert torch.equal(run(scheduler, model, 0, Cache("table", CacheTable.reuse("2" * STEPS)), counter=counter), exact)
    assert counter == [2] * STEPS
    assert model.rows == 2 * rows


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_model_is_asked_for_what_the_table_says(name: str) -> None:
    scheduler, model = make_scheduler(name), Model(variance=name == "iddpm")
    table = CacheTable.reuse("210" * (STEPS // 3))
    run(scheduler, model, 0, Cache("table", table))
    assert model.rows == table.cost == STEPS


def test_branches_that_differ_in_shape() -> None:
    scheduler, model = make_scheduler("rflow"), Model()
    noise, counter = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), []
    cond, null = {"y": torch.ones(1, 4), "extra": torch.ones(2)}, {"y": torch.zeros(1, 4), "extra": torch.ones(3)}
    exact = scheduler.sample(model, noise, cond, null)
    cache = Cache("table", CacheTable.reuse("2" * STEPS))
    assert torch.equal(cached_sampling.sample(scheduler, model, noise, cond, null, cache, counter=counter), exact)
    made = cached_sampling.sample(
        scheduler, model, noise, cond, null, Cache("table", CacheTable.reuse("2" + "10" * 5 + "1"))
    )
    assert 0 < calibration.relative_error(made, exact) < 0.3


def test_without_guidance_there_is_one_branch() -> None:
    scheduler, model = registry.build({"type": "rflow", "num_sampling_steps": STEPS, "cfg_scale": 1.0}), Model()
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    exact = cached_sampling.sample(scheduler, model, noise, told(0), None, Cache())
    assert model.rows == STEPS
    cache = Cache("table", CacheTable.reuse("1100" * (STEPS // 4)))
    made = cached_sampling.sample(scheduler, model, noise, told(0), None, cache)
    assert model.rows == STEPS + STEPS // 2
    assert 0 < calibration.relative_error(made, exact) < 0.3


def test_other_given_frames_are_computed_anew() -> None:
    scheduler, model = make_scheduler("rflow"), Model()
    noise, source = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), lambda: torch.zeros(SHAPE)
    edit, null, counter = torch.tensor([[0.5, 1.0]]), {"y": torch.zeros(1, 4)}, []
    cache = Cache("table", CacheTable.reuse("2" + "0" * (STEPS - 1)))
    cached_sampling.sample(scheduler, model, noise, told(0), null, cache, counter=counter, edit=edit, source=source)
    joins = STEPS // 2  # the time at which the frame is generated, too
    assert counter == [2] + [0] * (joins - 1) + [2] + [0] * (STEPS - joins - 1)


def test_guidance_in_a_part_of_the_run() -> None:
    scheduler, model, counter = make_scheduler("rflow"), Model(), []
    made = run(scheduler, model, 0, Cache(interval=(0.25, 0.75)), counter=counter)
    assert counter == [1] * 3 + [2] * 6 + [1] * 3
    plain = registry.build({"type": "rflow", "num_sampling_steps": STEPS, "cfg_scale": 1.0})
    assert not torch.equal(made, run(scheduler, model, 0, Cache()))
    nearly_none = run(scheduler, model, 0, Cache(interval=(0.99, 1.0)))
    assert torch.equal(nearly_none, run(plain, model, 0, Cache()))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_effects_say_what_a_prediction_does(name: str) -> None:
    """Against runs of the whole sampler in which one prediction is changed."""
    scheduler = make_scheduler(name)
    effects = cached_sampling.effects(scheduler, 4, {})
    assert len(effects) == STEPS == scheduler.num_evaluations

    def sampled(changed: int | None) -> Tensor:
        index = itertools.count()

        def fixed(x: Tensor, timestep: Tensor) -> Tensor:
            value = torch.full_like(x, 1.5 if next(index) == changed else 0.5)
            return torch.cat([value, torch.zeros_like(x)], dim=1) if name == "iddpm" else value

        source = [torch.Generator().manual_seed(1)]
        return scheduler.sample(fixed, torch.zeros(1, 4, 1, 1, 1), {}, None, guidance_scale=1.0, source=source)

    for changed in (0, STEPS // 2, STEPS - 1):
        moved = (sampled(changed) - sampled(None)).flatten()[0].item()
        assert moved == pytest.approx(effects[changed], rel=1e-3, abs=1e-5)


def profile_of(signal: Tensor) -> Profile:
    """A profile of one signal [N, D] without guidance."""
    count = len(signal)
    gram = np.zeros((2 * count, 2 * count))
    gram[:count, :count] = (signal.double() @ signal.double().T).numpy()
    return Profile(gram, np.full(count, 1 / count), np.zeros(count, bool))


def test_the_best_choice_is_the_best_of_all_choices() -> None:
    count = 8
    profile = profile_of(torch.randn(count, 20, generator=torch.Generator().manual_seed(3)).cumsum(0))
    signal = SignalFit(profile, "text")

    def cost(positions: tuple[int, ...]) -> float:
        ends, total = [*positions[1:], count], 0.0
        for place, (latest, end) in enumerate(zip(positions, ends, strict=True)):
            before = positions[place - 1] if place else None
            left = np.zeros(count)
            for k in range(latest + 1, end):
                weights = signal.fit(latest, before, k)
                left[k] -= profile.effects[k]
                left[latest] += profile.effects[k] * weights[0]
                if before is not None:
                    left[before] += profile.effects[k] * weights[1]
            total += left @ profile.gram[:count, :count] @ left
        return total

    best = {len(found): cost(tuple(found)) for found in signal.best(list(range(count)))}
    assert sorted(best) == list(range(1, count + 1))
    for number in range(1, count + 1):
        every = ((0, *rest) for rest in itertools.combinations(range(1, count), number - 1))
        assert best[number] == pytest.approx(min(map(cost, every)), rel=1e-6, abs=1e-12)


def test_a_linear_signal_is_extrapolated_without_error() -> None:
    line = torch.arange(9.0)[:, None] * torch.tensor([[1.0, -2.0, 0.5]]) + torch.tensor([[3.0, 1.0, 2.0]])
    signal = SignalFit(profile_of(line), "text")
    positions = [0, 1, 5]
    weights = signal.weights(positions)
    table = CacheTable("110001000", weights, weights)
    assert predicted_error(profile_of(line), table) < 1e-3
    assert weights[2] == pytest.approx((2, -1), abs=1e-3)
    assert predicted_error(profile_of(line), CacheTable.reuse("110001000")) > 0.1


def test_predicted_errors_are_those_of_a_model_that_ignores_the_past() -> None:
    scheduler = make_scheduler("rflow")

    def model(x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        time = (timestep / 1000)[:, None, None, None, None]
        return (y[:, :, None, None, None] * torch.sin(4 * time)).expand_as(x) + time**2

    effects = cached_sampling.effects(scheduler, 4, {})
    profile = calibration.record(
        lambda n, cache, observe: run(scheduler, model, n, cache, observe), effects, SCALE, 0
    ).profile
    tables = candidates(profile)
    assert len(tables) > 4
    exact = run(scheduler, model, 0, Cache())
    for table in tables:
        error = calibration.relative_error(run(scheduler, model, 0, Cache("table", table)), exact)
        assert error == pytest.approx(predicted_error(profile, table), rel=1e-2, abs=1e-5)
    errors = [predicted_error(profile, table) for table in tables]
    assert errors == sorted(errors, reverse=True)
    assert [table.cost for table in tables] == sorted(table.cost for table in tables)


@pytest.mark.parametrize("name", ["rflow", "iddpm", "dpm-solver"])
@pytest.mark.parametrize("interval", [None, (0.2, 0.7)], ids=["", "interval"])
@some(3)
def test_calibration_keeps_to_the_error_on_other_prompts(name: str, interval: Any) -> None:
    scheduler, model = make_scheduler(name), Model(variance=name == "iddpm")
    effects = cached_sampling.effects(scheduler, 4, {})

    def sample(number: int, cache: Cache, observe: Any = None) -> Tensor:
        return run(scheduler, model, number, cache, observe)

    most = 0.05
    found = calibrate(sample, effects, SCALE, 6, most, interval)
    assert found.table is not None and max(found.errors) <= most
    whole = []
    run(scheduler, model, 0, Cache(interval=interval), counter=whole)
    assert found.table.cost < 0.75 * sum(whole)
    cache, exact = Cache("table", found.table, interval=interval), Cache(interval=interval)
    errors = [calibration.relative_error(sample(n, cache), sample(n, exact)) for n in range(50, 70)]
    assert max(errors) <= most


def test_nothing_is_skipped_if_no_error_is_allowed() -> None:
    assert cheapest([CacheTable.reuse("20"), CacheTable.reuse("21")], lambda table: [0.1], 0.05).table is None
    found = cheapest([CacheTable.reuse("20"), CacheTable.reuse("21")], lambda table: [0.1 / table.cost**2], 0.05)
    assert found.table == CacheTable.reuse("21")


def test_the_promise_holds_for_prompts_that_are_harder_than_those_tried() -> None:
    assert calibration.expected_max([0.01] * 6) == pytest.approx(calibration.LEAST_MARGIN * 0.01)
    assert calibration.expected_max([0.001, 0.01, 0.1]) > 1


@pytest.mark.parametrize("push", [0.0, 3.0], ids=["steady", "growing"])
def test_errors_that_grow_are_found_and_kept_out(push: float) -> None:
    """A model that drives apart, early in a run, what differs: errors that are made before arrive larger."""
    scheduler = make_scheduler("rflow")

    def model(x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        time = (timestep / 1000)[:, None, None, None, None]
        told = (y.roll(k, dims=1)[:, :, None, None, None] * torch.sin((3 + 2 * k) * time) for k in range(4))
        return sum(told) + push * (time > 0.5) * x

    def sample(number: int, cache: Cache, observe: Any = None) -> Tensor:
        return run(scheduler, model, number, cache, observe)

    effects = cached_sampling.effects(scheduler, 4, {})
    recordings = [calibration.record(sample, effects, SCALE, number) for number in range(2)]
    gains = calibration.find_gains(sample, recordings)
    profile = calibration.mean_profile(recordings)
    assert gains == pytest.approx(np.ones(STEPS), abs=1e-2) if push == 0 else gains[2] > 1.5 * gains[-1]
    both = (candidates(one) for one in (profile, profile._replace(gains=gains)))
    blind, wary = (np.mean([table.branches.find("0") for table in tables]) for tables in both)
    assert wary == pytest.approx(blind, abs=0.1) if push == 0 else wary > blind + 0.5


def test_published_rules() -> None:
    table = mag_table(30)
    assert table.branches[:6] == "2" * 6
    assert 30 < table.cost < 60
    assert mag_table(30, 0.12).cost < table.cost < mag_table(30, 0.005).cost
    assert mag_table(30, 0.0, [0.9] * 29).cost == 60 and mag_table(30, 0.0, [1.0] * 29).cost == 36
    assert "0000" not in mag_table(60, 10.0).branches
    assert len(mag_table(100).branches) == 100
    assert polynomial((2.0, 0.0, 1.0), 3.0) == 19


def test_tea_follows_the_input_of_the_first_attention() -> None:
    from opensora.models.stdit.stdit3 import STDiT3

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = STDiT3(**TINY_STDIT3).eval().requires_grad_(False)
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    x, time = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 500.0])
    size = {"height": torch.tensor([32.0]), "width": torch.tensor([32.0]), "fps": torch.tensor([24.0])}
    seen: list[Tensor] = []
    hook = model.spatial_blocks[0].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    y = torch.randn(2, 1, 5, 32)
    model(x, time, y, **size)
    hook.remove()
    found = first_input(model, x, time, model.static_inputs(x.shape, y=y, **size))
    assert torch.allclose(found.flatten(0, 1), seen[0], atol=1e-5)

    scheduler = make_scheduler("rflow")
    noise, cond = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), {"y": torch.ones(1, 1, 5, 32)}
    costs = []
    for threshold in (0.0, 0.1, 0.3, 100.0):
        counter: list[int] = []
        cache = Cache("tea", threshold=threshold)
        cached_sampling.sample(
            scheduler, model, noise, {**cond, **size}, {"y": model.null_caption(cond["y"])}, cache, counter=counter
        )
        assert counter[0] == counter[-1] == 2 and set(counter) <= {0, 2}
        costs.append(sum(counter))
    assert costs[0] == 2 * STEPS and costs == sorted(costs, reverse=True) and costs[-1] == 4
    with pytest.raises(ConfigError, match="STDiT3"):
        run(scheduler, Model(), 0, Cache("tea"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"halves": "2"}, "not a calibration table"),
        ({"halves": "02", "text": [[1, 0]] * 2, "guidance": [[1, 0]] * 2}, "begin"),
        ({"halves": "20", "text": [[1, 0]], "guidance": [[1, 0]] * 2}, "one entry"),
        ({"halves": "2x", "text": [[1, 0]] * 2, "guidance": [[1, 0]] * 2}, "begin"),
        ({"halves": "20", "text": [[1, 0], ["a", 0]], "guidance": [[1, 0]] * 2}, "not a calibration table"),
        ({"halves": "20", "text": [[1, 0], [float("nan"), 0]], "guidance": [[1, 0]] * 2}, "finite"),
    ],
)
def test_tables_that_are_none_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheTable.from_dict(table)


def test_a_table_is_what_it_was_written_as() -> None:
    table = CacheTable("210", ((1.0, 0.0), (0.5, 0.25), (2.0, -1.0)), ((1.0, 0.0),) * 3)
    assert CacheTable.from_dict(table.to_dict()) == table
    with pytest.raises(ConfigError, match="3 evaluations, but the sampler makes 12"):
        run(make_scheduler("rflow"), Model(), 0, Cache("table", table))


def settings_with(**more: Any) -> InferenceSettings:
    file = find_config("embedded")
    return InferenceSettings.from_config({**read_config(file), "prompt": ["a red circle"], **more}, file.name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cache": "teaa"}, "cache 'teaa' is not known"),
        ({"cache": "auto", "max_error": -1.0}, "max_error"),
        ({"cache": "auto", "draft": True}, "draft"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"cache": "auto", "cache_prompts": ["one"]}, "cache_prompts"),
    ],
)
def test_settings_that_make_no_sense_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_with(**more)


def test_a_table_has_to_be_given() -> None:
    with pytest.raises(ConfigError, match="cache_table"):
        step_cache.from_settings(settings_with(cache="table"))


SMALL = ["--image-size", "16", "24", "--num-frames", "5", "--verbose", "0"]


def test_calibrated_generation_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Calibrates once, says how far it is from the uncached run, and a recipe needs no calibration."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv = ["generate", "a red circle", *SMALL, "--num-sampling-steps", "6", "--cache", "auto", "--max-error", "0.2"]
    argv += ["--cache-prompts", "a blue square", "a green circle", "a red triangle"]
    caplog.set_level("INFO", "opensora")
    assert cli.main([*argv, "--save-dir", str(tmp_path / "one"), "--cache-psnr"]) == 0
    assert "calibrating" in caplog.text and "dB" in caplog.text
    caplog.clear()
    assert cli.main([*argv, "--save-dir", str(tmp_path / "two")]) == 0
    assert "calibrating" not in caplog.text
    first, second = (read_recipe(tmp_path / name / "sample_0000.mp4") for name in ("one", "two"))
    assert first["output"]["sha256"] == second["output"]["sha256"]
    assert first["settings"]["cache"] == "table"
    halves = first["settings"]["cache_table"]["halves"]
    assert len(halves) == 6 and sum(map(int, halves)) < 12
    monkeypatch.setattr("opensora.acceleration.step_cache.calibration.calibrate", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert replay(tmp_path / "one" / "sample_0000.mp4", tmp_path / "again").identical
    exact = tmp_path / "exact"
    assert cli.main(["generate", "a red circle", *SMALL, "--num-sampling-steps", "6", "--save-dir", str(exact)]) == 0
    assert read_recipe(exact / "sample_0000.mp4")["output"]["sha256"] != first["output"]["sha256"]


@pytest.mark.parametrize("flags", [("--cache", "tea"), ("--cache", "mag"), ("--guidance-interval", "0.2", "0.8")])
@some(2)
def test_other_approximations_repeat(flags: tuple[str, ...], tmp_path: Path) -> None:
    argv = ["generate", "a red circle", *SMALL, "--num-sampling-steps", "4", *flags]
    assert cli.main([*argv, "--save-dir", str(tmp_path / "one")]) == 0
    assert replay(tmp_path / "one" / "sample_0000.mp4", tmp_path / "again").identical


@pytest.mark.skipif(not FULL, reason="a program of the measurements: set OPENSORA_FULL=1")
def test_the_benchmark_compares_all_methods(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from benchmarks import caching as benchmark

    argv = ["--num-prompts", "1", "--calibration-prompts", "2", "--steps", "4", "--save-dir", str(tmp_path)]
    assert benchmark.main(argv) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "caching.json").read_text())["methods"]}
    assert rows["none"]["halves"] == 8 and rows["none"]["error_most"] == 0
    assert rows["half the steps"]["times_fewer"] == 2 and rows["half the steps"]["psnr_mean"] < 60
    assert any(name.startswith("auto") for name in rows)
    assert (tmp_path / "caching.png").stat().st_size > 1000
    assert "meets the bars" in capsys.readouterr().out


def test_psnr() -> None:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    assert step_cache.psnr(frames, frames) == float("inf")
    assert step_cache.psnr(frames + 255, frames) == 0
    assert step_cache.psnr(frames + 10, frames) == pytest.approx(28.13, abs=0.01)
