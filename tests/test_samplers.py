"""How IDDPM, IDDPM with SpeeD's training, and DPM-Solver++ behave."""

from __future__ import annotations

import math

import pytest
import torch

from opensora import registry
from opensora.errors import ConfigError
from opensora.pipeline.noise import initial_noise, noise_generator
from opensora.schedulers.diffusion import linear_betas, space_timesteps
from opensora.schedulers.dpms import DPM_SOLVER, schedule_at
from opensora.schedulers.guidance import GuidedDenoiser
from opensora.schedulers.iddpm import IDDPM
from opensora.schedulers.iddpm_speed import IDDPM_SPEED
from opensora.schedulers.rf import RFLOW
from tests.full import some

SHAPE = (4, 3, 2, 2)  # C, T, H, W
FEW = {"num_sampling_steps": 6, "cfg_scale": 3.0}
SCHEDULERS = {"rflow": RFLOW, "iddpm": IDDPM, "iddpm-speed": IDDPM_SPEED, "dpm-solver": DPM_SOLVER}
EDIT = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0], [0.9, 1.0, 0.2]])


class Model:
    """Elementwise, so that a sample's bits cannot depend on its batch; keeps what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, timestep, y, x_mask=None):
        self.calls.append({"x": x, "timestep": timestep, "x_mask": x_mask})
        out = 0.3 * x + (y.flatten() * timestep / 1000)[:, None, None, None, None]
        if x_mask is not None:
            out = out + 0.1 * ~x_mask[:, None, :, None, None]
        return torch.cat([out, out.sin()], dim=1)


def noise(*samples: int) -> torch.Tensor:
    return torch.stack([initial_noise(0, sample, 0, SHAPE) for sample in samples])


def text(*values: float) -> dict[str, torch.Tensor]:
    return {"y": torch.tensor(values)[:, None, None, None]}


def generators(*samples: int) -> list[torch.Generator]:
    return [noise_generator(0, sample) for sample in samples]


def run(scheduler, samples=(0, 1, 2), model=None, **given) -> torch.Tensor:
    cond, null = text(*(0.5 + sample for sample in samples)), text(*[0.1] * len(samples))
    given = {"source": generators(*samples), **given}
    return scheduler.sample(model or Model(), noise(*samples), cond, null, **given)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("edit", [None, EDIT], ids=["whole", "edited"])
def test_a_sample_does_not_depend_on_its_batch(name, edit):
    scheduler = SCHEDULERS[name](**FEW)
    if edit is not None and not scheduler.supports_edit:
        return
    together = run(scheduler, edit=edit)
    assert together.shape == (3, *SHAPE) and together.dtype == torch.float32 and together.isfinite().all()
    for sample in range(3):
        alone = run(scheduler, (sample,), edit=None if edit is None else edit[sample : sample + 1])
        assert torch.equal(alone[0], together[sample])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_and_flags(name):
    scheduler = SCHEDULERS[name](**FEW)
    assert scheduler.num_steps == scheduler.num_evaluations == 6 and scheduler.num_branches == 2
    assert not torch.equal(run(scheduler), run(scheduler, guidance_scale=1.0))
    assert scheduler.draws_noise == name.startswith("iddpm")
    assert scheduler.supports_edit == (name != "dpm-solver")
    assert isinstance(registry.build({"type": name, **FEW}), SCHEDULERS[name])


@pytest.mark.parametrize(
    "scheduler",
    [
        RFLOW(num_sampling_steps=6), RFLOW(num_sampling_steps=6, use_timestep_transform=True, s_churn=2.0),
        IDDPM(num_sampling_steps=6, cfg_channel=3), DPM_SOLVER(num_sampling_steps=6),
        *(DPM_SOLVER(num_sampling_steps=7, method="singlestep", order=order) for order in (1, 2, 3)),
    ],
    ids=repr,
)  # fmt: skip
def test_timesteps_are_those_of_the_first_evaluations(scheduler):
    model, size, found = Model(), {"height": 240, "width": 426, "num_frames": 17}, []
    done = 0
    for _ in scheduler.steps(model, noise(0), text(1.0), guidance_scale=1.0, source=generators(0), **size):
        found.append(model.calls[done]["timestep"][0].item())
        done = len(model.calls)
    assert len(found) == scheduler.num_steps
    assert scheduler.timesteps(**size) == pytest.approx(found)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_edit_of_ones_is_no_edit(name):
    scheduler, model = SCHEDULERS[name](**FEW), Model()
    assert torch.equal(run(scheduler, edit=torch.ones(3, 3), model=model), run(scheduler))
    assert all(call["x_mask"] is None for call in model.calls)


def test_a_kept_frame_is_left_alone_until_the_last_step():
    model = Model()
    out = run(IDDPM(**FEW), model=model, edit=EDIT)
    for call in model.calls[:-1]:
        assert torch.equal(call["x"][0, :, 0], noise(0)[0, :, 0])
    assert not torch.equal(model.calls[-1]["x"][0, :, 0], noise(0)[0, :, 0])
    torch.testing.assert_close(out[0, :, 0], noise(0)[0, :, 0], rtol=0, atol=0.1)
    started = [int(call["x_mask"][0, 1]) for call in model.calls]
    assert started == [0, 0, 0, 1, 1, 1]  # edit 0.5: noised at step 3 of 5..0, and told as active from step 2 on


def test_dpm_solver_refuses_an_edit():
    with pytest.raises(ConfigError, match="dpm-solver cannot keep or edit frames"):
        run(DPM_SOLVER(**FEW), edit=EDIT)


def test_iddpm_needs_a_source():
    with pytest.raises(ValueError, match="one generator per sample as source"):
        run(IDDPM(**FEW), source=None)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        run(IDDPM(**FEW), source=generators(0, 1))


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        (IDDPM, {"num_sampling_steps": 0}, "num_sampling_steps is 0"),
        (IDDPM, {"num_sampling_steps": 1001}, "takes 1001 of 1000 timesteps"),
        (IDDPM, {"num_sampling_steps": 20, "timestep_respacing": "ddim20"}, "exclude each other; give one"),
        (IDDPM, {"timestep_respacing": "ddim999"}, "no integer stride takes 999 of 1000"),
        (IDDPM, {"timestep_respacing": "dim20"}, "'dim20' is not a number, '10,15,20' or 'ddim20'"),
        (IDDPM, {"noise_schedule": "linaer"}, "did you mean 'linear'"),
        (IDDPM, {"tables": "float16"}, "choose float64 or float32"),
        (IDDPM, {"cfg_channel": 0}, "cfg_channel is 0"),
        (IDDPM, {"ddim_eta": 1.5}, "between 0 and 1"),
        (IDDPM_SPEED, {"noise_schedule": "cosine"}, "choose linear or squaredcos_cap_v2"),
        (DPM_SOLVER, {"order": 4}, "must be 1, 2 or 3"),
        (DPM_SOLVER, {"num_sampling_steps": 0}, "num_sampling_steps is 0"),
        (DPM_SOLVER, {"method": "multi-step"}, "did you mean 'multistep'"),
        (DPM_SOLVER, {"skip_type": "logsnr"}, "did you mean 'logSNR'"),
    ],
)
def test_bad_settings_are_refused(scheduler, settings, message):
    with pytest.raises(ConfigError, match=message):
        scheduler(**settings)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'num_sampling_steps'"):
        registry.build({"type": "iddpm", "num_sampling_step": 20})


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="cfg_channel is 5, but latents have 4"):
        run(IDDPM(**FEW, cfg_channel=5))
    with pytest.raises(ValueError, match="learn_sigma needs 8 channels from the model; it gave 4"):
        run(IDDPM(**FEW), model=lambda x, timestep, y: x)
    assert run(IDDPM(**FEW, learn_sigma=False), model=lambda x, timestep, y: x).isfinite().all()


def test_guidance_of_some_channels_keeps_the_others_with_the_prompt():
    x, t, (cond, null) = noise(0, 1), torch.tensor([500.0, 500.0]), (text(1.0, 2.0), text(0.0, 0.0))
    with_text, without = Model()(x, t, **cond), Model()(x, t, **null)
    out = GuidedDenoiser(Model(), cond, null, 3.0, channels=2)(x, t)
    torch.testing.assert_close(out[:, :2], (without + 3 * (with_text - without))[:, :2])
    assert torch.equal(out[:, 2:], with_text[:, 2:])


def test_float64_tables_differ_from_float32_ones_near_the_data_only():
    exact, rounded = IDDPM(num_sampling_steps=100).process, IDDPM(num_sampling_steps=100, tables="float32").process
    assert (exact.betas.dtype, rounded.betas.dtype) == (torch.float64, torch.float32)
    apart = {
        name: (getattr(rounded, name) / getattr(exact, name) - 1).abs()
        for name in ("sqrt_one_minus_alphas_cumprod", "posterior_mean_coef1", "alphas_cumprod")
    }
    noise_level, coefficient, signal = apart.values()
    assert 5e-5 < noise_level[0] < 1e-4 and noise_level[2:].max() < 1e-6
    assert 1e-4 < coefficient[0] < 2e-4 and coefficient[2:].max() < 1e-6
    assert signal.max() < 1e-6


def perfect(target: float):
    """A model that knows the data, which is `target` everywhere, and has nothing to say about the variance."""
    alphas_cumprod = (1 - linear_betas()).cumprod(0)

    def model(x, timestep):
        now = alphas_cumprod[timestep.round().long()][:, None, None, None, None]
        eps = ((x - now.sqrt() * target) / (1 - now).sqrt()).float()
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)

    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"num_sampling_steps": 1},
        {"num_sampling_steps": 20},
        {"timestep_respacing": "ddim20"},
        {"num_sampling_steps": 20, "ddim_eta": 0.0},
        {"num_sampling_steps": 20, "ddim_eta": 1.0},
        {"num_sampling_steps": 20, "learn_sigma": False},
        {"num_sampling_steps": 20, "learn_sigma": False, "sigma_small": True},
    ],
)
def test_iddpm_finds_known_data(settings):
    out = IDDPM(**settings, cfg_scale=1.0).sample(perfect(0.5), noise(0, 1), {}, source=generators(0, 1))
    torch.testing.assert_close(out, torch.full_like(out, 0.5), rtol=0, atol=1e-5)


def test_a_fixed_variance_is_beta_or_that_of_the_posterior():
    x, t = noise(0, 1), torch.tensor([0, 600])
    large, small = (IDDPM(learn_sigma=False, sigma_small=small) for small in (False, True))
    (_, beta), posterior = large.process.betas[t].log().tolist(), large.process.posterior_variance[[1, 600]].log()
    assert small.predict(x, x, t).log_variance.flatten().tolist() == pytest.approx(posterior.tolist())
    assert large.predict(x, x, t).log_variance.flatten().tolist() == pytest.approx([posterior[0].item(), beta])


def test_ddim_without_noise_does_not_depend_on_it():
    quiet, noisy = (IDDPM(**FEW, ddim_eta=eta) for eta in (0.0, 1.0))
    others = {"source": generators(7, 8, 9)}
    assert torch.equal(run(quiet), run(quiet, **others))
    assert not torch.equal(run(noisy), run(noisy, **others))


def gaussian_data(mean: float, deviation: float):
    """The ideal model of normal data, and where the ODE takes `x` from time 1 to 1/1000 with it."""

    def scales(timestep):
        (time,) = set(((timestep + 1) / 1000).tolist())
        path = schedule_at([time])
        return path.alpha[0], path.sigma[0]

    def model(x, timestep):
        alpha, sigma = scales(timestep)
        return sigma * (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)

    def solution(x):
        (first, last), (start, end) = (schedule_at([1.0, 0.001])[i] for i in (1, 2))
        ratio = math.hypot(last * deviation, end) / math.hypot(first * deviation, start)
        return last * mean + ratio * (x - first * mean)

    return model, solution


@pytest.mark.parametrize("skip_type", ["time_uniform", "logSNR", "time_quadratic"])
@pytest.mark.parametrize("method", ["multistep", "singlestep"])
@some(3)
def test_dpm_solver_converges_faster_with_higher_order(method, skip_type):
    model, solution = gaussian_data(0.3, 0.5)

    def error(order: int, num_steps: int) -> float:
        out = DPM_SOLVER(num_steps, 1.0, order, skip_type, method).sample(model, noise(0), {})
        return (out - solution(noise(0))).abs().max().item()

    assert 3 < error(1, 24) / error(1, 96) < 5  # four times the steps, a quarter of the error
    for order in (2, 3):
        assert error(order, 24) / error(order, 96) > 8
        assert error(order, 96) < error(1, 96) / 1.5


def test_respacing_to_every_timestep_and_to_one():
    assert space_timesteps(1000, "1000") == list(range(1000)) and space_timesteps(1000, [1]) == [0]
    assert len(IDDPM(timestep_respacing="").process) == len(IDDPM().process) == 1000


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.variance = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x, timestep, x_mask=None):
        return torch.cat([self.mean + 0.1 * x, self.variance + 0.1 * x], dim=1)


@pytest.mark.parametrize("scheduler", [IDDPM(), IDDPM_SPEED()], ids=["iddpm", "iddpm-speed"])
def test_training_draws_are_repeatable(scheduler):
    def loss(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        sizes = {"height": 256, "width": 256, "num_frames": 16}
        return scheduler.training_loss(Linear(), noise(0, 1, 2), {}, **sizes, generator=generator)

    assert loss(0).shape == (3,) and torch.equal(loss(0), loss(0)) and not torch.equal(loss(0), loss(1))
    drawn = scheduler.draw_steps(2001, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert drawn.shape == (2001,) and drawn.min() >= 0 and drawn.max() < 1000 and drawn.dtype == torch.int64


def test_the_bound_teaches_the_variance_alone_unless_it_is_all_there_is():
    for use_kl in (False, True):
        model = Linear()
        given = {"noise": noise(3, 4), "timestep": torch.tensor([0, 600])}
        terms = IDDPM(use_kl=use_kl).training_terms(model, noise(0, 1), {}, **given)
        part = terms["loss"] if use_kl else terms["vb"]
        mean, variance = torch.autograd.grad(part.sum(), [model.mean, model.variance], allow_unused=True)
        assert variance.abs() > 0
        assert bool(mean) is use_kl if mean is not None else not use_kl


def test_predict_xstart_is_trained_on_the_data():
    def model(x, timestep):
        return torch.cat([noise(0, 1), torch.zeros_like(x)], dim=1)

    terms = IDDPM(predict_xstart=True).training_terms(model, noise(0, 1), {}, generator=torch.Generator())
    assert terms["mse"].tolist() == [0, 0]


def test_a_sample_without_any_unmasked_frame_has_loss_zero():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    given = {"noise": noise(3, 4), "timestep": torch.tensor([10, 600]), "mask": mask}
    loss = IDDPM().training_loss(Linear(), noise(0, 1), {}, **given)
    assert loss[0] > 0 and loss[1] == 0


def test_speed_draws_steps_where_the_noise_still_rises_five_times_as_often():
    speed = IDDPM_SPEED()
    assert speed.probabilities.sum() == pytest.approx(1)
    assert speed.probabilities[300] / speed.probabilities[900] == pytest.approx(5)
    assert speed.paired(torch.tensor([10, 950]), 4).tolist() == [10, 950, 690, 250]
