from __future__ import annotations

import pytest
import torch

from opensora.errors import ConfigError
from opensora.pipeline.noise import initial_noise, noise_generator
from opensora.schedulers.guidance import GuidedDenoiser
from opensora.schedulers.rf import RFLOW, add_noise, churned, sampling_times, timestep_transform

SHAPE = (4, 5, 2, 3)  # C, T, H, W
SIZE = {"height": 240, "width": 426, "num_frames": 51}


class Recorder:
    """Predicts `y` [B, 1, L, D] averaged to one number per sample, in 2C channels, and keeps its arguments."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, timestep, **arguments):
        self.calls.append({"x": x, "timestep": timestep, **arguments})
        value = arguments["y"].float().mean(dim=(1, 2, 3))
        return value[:, None, None, None, None].expand(len(x), 2 * x.shape[1], *x.shape[2:])


def noise(batch: int = 2) -> torch.Tensor:
    return torch.stack([initial_noise(0, index, 0, SHAPE) for index in range(batch)])


def text(*values: float, length: int = 3) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, length, 2)


def generators(*samples: int) -> list[torch.Generator]:
    return [noise_generator(0, sample) for sample in samples]


def test_guidance_runs_one_batch_of_cond_and_uncond():
    model = Recorder()
    cond = {"y": text(1.0, 2.0), "mask": torch.ones(2, 3), "fps": None}
    out = GuidedDenoiser(model, cond, {"y": text(10.0, 20.0)}, 3.0)(noise(), torch.tensor([5.0, 6.0]))
    assert out.shape == (2, *SHAPE)
    assert out[:, 0, 0, 0, 0].tolist() == [10 + 3 * (1 - 10), 20 + 3 * (2 - 20)]
    (call,) = model.calls
    assert call["y"][:, 0, 0, 0].tolist() == [1, 2, 10, 20]
    assert call["timestep"].tolist() == [5, 6, 5, 6]
    assert call["mask"].shape == (4, 3) and call["fps"] is None


def test_one_row_serves_both_branches():
    model, fps = Recorder(), torch.tensor([24.0])
    cond = {"y": text(1.0, 2.0), "fps": fps, "mask": torch.ones(2, 3)}
    RFLOW(num_sampling_steps=3, cfg_scale=2.0).sample(model, noise(), cond, {"y": text(3.0, 4.0)})
    for call, time in zip(model.calls, (1000, 2000 / 3, 1000 / 3), strict=True):
        assert call["timestep"].tolist() == pytest.approx([time])
        assert call["fps"] is fps and call["mask"].shape == (4, 3)


def test_guidance_runs_two_batches_where_texts_differ_in_length():
    one, two = Recorder(), Recorder()
    x, timestep = noise(), torch.tensor([5.0, 6.0])
    together = GuidedDenoiser(one, {"y": text(1.0, 2.0)}, {"y": text(3.0, 3.0)}, 7.0)(x, timestep)
    apart = GuidedDenoiser(two, {"y": text(1.0, 2.0)}, {"y": text(3.0, 3.0, length=8)}, 7.0)(x, timestep)
    assert (len(one.calls), len(two.calls)) == (1, 2)
    torch.testing.assert_close(together, apart)


def test_scale_one_runs_one_branch():
    model = Recorder()
    RFLOW(num_sampling_steps=4, cfg_scale=1.0).sample(model, noise(), {"y": text(1.0, 2.0)})
    assert [len(call["x"]) for call in model.calls] == [2] * 4


def test_guidance_without_null_is_refused():
    with pytest.raises(ValueError, match="unconditional"):
        RFLOW().sample(Recorder(), noise(), {"y": text(1.0, 2.0)})


def test_no_mask_and_no_draw_without_edit():
    def refuse():
        raise AssertionError("noise was drawn")

    plain, ones = Recorder(), Recorder()
    flow, cond = RFLOW(num_sampling_steps=3, cfg_scale=1.0), {"y": text(1.0, 2.0)}
    expected = flow.sample(plain, noise(), cond, source=refuse)
    out = flow.sample(ones, noise(), cond, edit=torch.ones(2, SHAPE[1]), source=refuse)
    assert torch.equal(out, expected)
    assert all("x_mask" not in call for call in plain.calls + ones.calls)


@pytest.mark.parametrize("transform", [False, True])
def test_constant_velocity_integrates_exactly(transform):
    z, target = noise(), torch.full((2, *SHAPE), 0.5)
    flow = RFLOW(num_sampling_steps=7, cfg_scale=1.0, use_timestep_transform=transform)
    out = flow.sample(lambda x, timestep: target - z, z, {}, **SIZE)
    torch.testing.assert_close(out, target)


def test_straight_line_to_the_data_ends_on_the_data():
    data = torch.full((2, *SHAPE), -1.5)

    def model(x, timestep):
        return (data - x) / (timestep / 1000)[:, None, None, None, None]

    torch.testing.assert_close(RFLOW(num_sampling_steps=9, cfg_scale=1.0).sample(model, noise(), {}), data)


def test_kept_frames_come_back_unchanged_and_edited_ones_start_late():
    z, model = noise(1), Recorder()
    edit = torch.tensor([[0.0, 0.5, 1.0, 1.0, 1.0]])
    flow = RFLOW(num_sampling_steps=4, cfg_scale=1.0)
    out = flow.sample(model, z, {"y": text(1.0)}, edit=edit, source=generators(0))
    assert torch.equal(out[:, :, 0], z[:, :, 0])
    assert [call["x_mask"][0, :3].tolist() for call in model.calls] == [
        [False, False, True],
        [False, False, True],
        [False, True, True],
        [False, True, True],
    ]
    drawn = [torch.randn(SHAPE, generator=source) for source in generators(0) for _ in range(3)][2]
    torch.testing.assert_close(model.calls[2]["x"][0, :, 1], 0.5 * z[0, :, 1] + 0.5 * drawn[:, 1])


def test_one_generator_per_sample_makes_results_independent_of_the_batch():
    edit = torch.tensor([[0.3, 0.5, 1.0, 1.0, 1.0], [0.0, 1.0, 0.7, 1.0, 1.0]])
    flow, cond, z = RFLOW(cfg_scale=1.0), text(1.0, 2.0), noise()
    both = flow.sample(Recorder(), z, {"y": cond}, edit=edit, source=generators(0, 1))
    second = flow.sample(Recorder(), z[1:], {"y": cond[1:]}, edit=edit[1:], source=generators(1))
    assert torch.equal(both[1:], second)


def test_edit_needs_a_fitting_source():
    flow, edit = RFLOW(cfg_scale=1.0), torch.zeros(2, SHAPE[1])
    with pytest.raises(ValueError, match="generator per sample"):
        flow.sample(Recorder(), noise(), {"y": text(1.0, 2.0)}, edit=edit)
    with pytest.raises(ValueError, match="one per sample"):
        flow.sample(Recorder(), noise(), {"y": text(1.0, 2.0)}, edit=edit, source=generators(0))


def test_a_loop_sees_every_step_and_can_stop_sampling():
    model, flow = Recorder(), RFLOW(num_sampling_steps=3, cfg_scale=1.0)
    states = list(flow.steps(model, noise(), {"y": text(1.0, 2.0)}))
    assert [(state.step, state.num_steps) for state in states] == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(states[-1].x, flow.sample(Recorder(), noise(), {"y": text(1.0, 2.0)}))
    model.calls.clear()
    for _ in flow.steps(model, noise(), {"y": text(1.0, 2.0)}):
        break
    assert len(model.calls) == 1


def test_latents_stay_float32_for_a_bf16_model():
    def model(x, timestep):
        assert x.dtype == torch.float32
        return x.bfloat16()

    assert RFLOW(cfg_scale=1.0).sample(model, noise().bfloat16(), {}).dtype == torch.float32


def test_sampling_times_fall_from_one_to_zero():
    assert sampling_times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert (1000 * sampling_times(7, discrete=True)).round().tolist() == [1000, 857, 714, 571, 429, 286, 143, 0]


@pytest.mark.parametrize("num_frames", [2, 8, 16])
def test_short_videos_count_as_one_chunk(num_frames):
    times = sampling_times(10)
    short = timestep_transform(times, 360, 640, num_frames)
    assert torch.equal(short, timestep_transform(times, 360, 640, 17))
    assert short[0] == 1 and short[-1] == 0 and (short.diff() < 0).all()


def test_transform_needs_the_video_size():
    with pytest.raises(ValueError, match="num_frames"):
        RFLOW(use_timestep_transform=True, cfg_scale=1.0).sample(Recorder(), noise(), {"y": text(1.0, 2.0)})


def test_perfect_prediction_has_no_loss_and_masked_frames_do_not_count():
    x, eps = noise(), torch.randn(2, *SHAPE)
    mask = torch.ones(2, SHAPE[1], dtype=torch.bool)
    mask[:, 0] = False
    mask[1] = False

    def model(x_time, timestep, x_mask):
        assert torch.equal(x_time[:, :, 0], x[:, :, 0])
        velocity = x - eps
        velocity[:, :, 0] += 100
        return torch.cat([velocity, torch.full_like(velocity, 7)], dim=1)

    assert RFLOW().training_loss(model, x, {}, noise=eps, mask=mask).tolist() == [0, 0]


def test_training_draws_are_repeatable_and_in_range():
    def loss(seed, **settings):
        model = Recorder()
        generator = torch.Generator().manual_seed(seed)
        out = RFLOW(**settings).training_loss(model, noise(64), {"y": text(*[0.0] * 64)}, generator=generator, **SIZE)
        return out, model.calls[0]["timestep"]

    for settings in ({}, {"sample_method": "logit-normal"}, {"use_timestep_transform": True}):
        first, timestep = loss(1, **settings)
        assert torch.equal(first, loss(1, **settings)[0]) and not torch.equal(first, loss(2, **settings)[0])
        assert first.shape == (64,) and timestep.min() >= 0 and timestep.max() <= 1000
    _, whole = loss(1, use_discrete_timesteps=True)
    torch.testing.assert_close(whole, whole.round())


def test_loss_reaches_the_parameters():
    scale = torch.nn.Parameter(torch.tensor(0.3))
    RFLOW().training_loss(lambda x, timestep: scale * x, noise(), {}).mean().backward()
    assert scale.grad.abs() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_method": "logitnormal"}, "'logitnormal' is not known; choose uniform or logit-normal"),
        ({"sample_method": "logit-normal", "use_discrete_timesteps": True}, "continuous"),
        ({"num_sampling_steps": 0}, "num_sampling_steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RFLOW(**settings)


class TestChurn:
    """Stochastic sampling: EDM's churn (Karras et al. 2022, algorithm 2)."""

    @pytest.mark.parametrize("time", [0.02, 0.5, 0.97])
    def test_noise_fits_the_new_time(self, time):
        shape = (1, 1, 1, 400, 400)
        eps, more = (torch.randn(shape, generator=source) for source in generators(0, 1))
        x, later = churned(
            add_noise(torch.full(shape, 3.0), eps, torch.tensor([time])), torch.tensor([time]), 0.3, more
        )
        sigma, before = (later / (1 - later)).item(), time / (1 - time)
        assert sigma == pytest.approx(1.3 * before, rel=1e-4)
        assert x.mean().item() == pytest.approx(3 * (1 - later.item()), abs=0.01)
        assert x.std().item() == pytest.approx(later.item(), rel=0.01)

    def test_pure_noise_stays_as_it_is(self):
        x, later = churned(noise(), torch.ones(2), 0.4, torch.full((2, *SHAPE), 7.0))
        assert torch.equal(x, noise()) and torch.equal(later, torch.ones(2))

    def test_none_is_the_deterministic_sampler(self):
        cond = {"y": text(1.0, 2.0)}
        plain = RFLOW(cfg_scale=1.0).sample(Recorder(), noise(), cond)
        assert torch.equal(RFLOW(cfg_scale=1.0, s_churn=0.0).sample(Recorder(), noise(), cond), plain)
        drawn = RFLOW(cfg_scale=1.0, s_churn=3.0).sample(Recorder(), noise(), cond, source=generators(0, 1))
        assert not torch.allclose(drawn, plain)

    @pytest.mark.parametrize("edit", [None, torch.tensor([[0.0, 0.5, 1.0, 1.0, 1.0]] * 2)], ids=["whole", "edited"])
    def test_a_resumed_run_and_a_smaller_batch_are_the_same(self, edit):
        flow, cond = RFLOW(num_sampling_steps=6, cfg_scale=1.0, s_churn=2.0), {"y": text(1.0, 2.0)}
        sources = generators(0, 1)
        states = flow.steps(Recorder(), noise(), cond, edit=edit, source=sources)
        stopped = [next(states) for _ in range(3)][-1]
        resumed = flow.sample(Recorder(), noise(), cond, edit=edit, source=sources, resume=stopped)
        whole = flow.sample(Recorder(), noise(), cond, edit=edit, source=generators(0, 1))
        assert torch.equal(resumed, whole)
        second = {"y": cond["y"][1:]}
        alone = flow.sample(
            Recorder(), noise()[1:], second, edit=None if edit is None else edit[1:], source=generators(1)
        )
        assert torch.equal(alone[0], whole[1])

    def test_kept_frames_stay_clean(self):
        z, model = noise(), Recorder()
        edit = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]] * 2)
        flow = RFLOW(num_sampling_steps=4, cfg_scale=1.0, s_churn=4.0)
        out = flow.sample(model, z, {"y": text(1.0, 2.0)}, edit=edit, source=generators(0, 1))
        assert torch.equal(out[:, :, 0], z[:, :, 0])
        assert all(torch.equal(call["x"][:, :, 0], z[:, :, 0]) for call in model.calls)

    def test_growth_in_a_step_is_bounded_as_in_edm(self):
        assert RFLOW(num_sampling_steps=30, s_churn=3.0).gamma == pytest.approx(0.1)
        assert RFLOW(num_sampling_steps=30, s_churn=1e6).gamma == pytest.approx(2**0.5 - 1)

    def test_it_needs_a_source(self):
        with pytest.raises(ValueError, match="one generator per sample as source"):
            RFLOW(cfg_scale=1.0, s_churn=1.0).sample(Recorder(), noise(), {"y": text(1.0, 2.0)})
