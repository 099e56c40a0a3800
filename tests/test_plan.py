"""`opensora plan` says what generation then does, refuses what generation refuses, and knows the memory it takes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora.acceleration import chunked_forward, memory_plan
from opensora.acceleration.memory_plan import PLANS
from opensora.checkpoints import builder
from opensora.checkpoints.save import save_pretrained
from opensora.cli import main
from opensora.cli.verbs.generation import request_settings
from opensora.config.settings import InferenceSettings
from opensora.datasets.video import write_image, write_video
from opensora.errors import OpenSoraError
from opensora.models.layers import pieces
from opensora.models.sizes import size_conditioning
from opensora.pipeline import denoise, generation
from opensora.pipeline.job import Job
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.pipeline import VideoPipeline
from opensora.pipeline.plan import make_plan
from opensora.profiling import cost_model, memory_meter, operation_counter, speed_history
from opensora.profiling.cost_model import CostModel
from tests import zoo
from tests.checkpoints import SAMPLE
from tests.full import FULL, count, some
from tests.tiny import make_tiny_stdit3

ROOT = Path(__file__).parents[1]
REQUESTS = count(40, 1000)
CODE = 1000  # what tells the frames of one reference from those of the next
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    write_image(generator.integers(0, 256, (32, 40, 3), dtype=np.uint8), "image.png")
    write_image(generator.integers(0, 256, (4, 1200, 3), dtype=np.uint8), "thin.png")
    for frames in (5, 34):
        clip = generator.integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8)
        write_video(clip, f"clip{frames}.mp4", 24)
    return tmp_path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of every kind that the random requests name."""
    folder = tmp_path_factory.mktemp("parts")
    made = zoo.make_parts(folder)
    (folder / "models").mkdir()
    made["STDiT3"] = make_tiny_stdit3(folder / "models" / "stdit3", model_max_length=40)
    made["STDiT2"] = zoo.stdit2(folder / "models" / "stdit2")
    made["STDiT"] = zoo.stdit(folder / "models" / "stdit.pth")
    made["DiT"] = zoo.dit(folder / "models" / "dit.pt", "text")
    return made


def one_of(rng: random.Random, usual: Any, *others: Any, odds: float = 0.7) -> Any:
    return usual if rng.random() < odds else rng.choice(others)


def strategy(rng: random.Random) -> str:
    groups = []
    for _ in range(rng.randint(1, 3)):
        numbers = [
            one_of(rng, 0, 1, 2), one_of(rng, 0, 1, -1), one_of(rng, 0, -1, 1, -5, 6, 12), one_of(rng, 0, -1, 5, 7, -8),
            one_of(rng, 1, 0, 2, 5, 10), one_of(rng, 0, 0.3, 1, 0.75),
        ]  # fmt: skip
        groups.append(",".join(map(str, numbers[: one_of(rng, 6, *range(1, 6), odds=0.3)])))
    return ";".join(groups)


def random_request(rng: random.Random, parts: dict[str, Path]) -> InferenceSettings:
    """A request that makes sense more often than not."""
    model, vae = one_of(rng, "STDiT3", "STDiT2", "STDiT", "DiT"), one_of(rng, "OpenSoraVAE_V1_2", "VideoAutoencoderKL")
    small = zoo.SMALL if model != "STDiT3" else {}
    section: dict[str, Any] = dict(type=model, from_pretrained=str(parts[model]), **small)
    if model == "DiT":
        section["condition"] = "text"
    config: dict[str, Any] = dict(
        model=section,
        vae=dict(type=vae, from_pretrained=str(parts[vae])),
        text_encoder=dict(type="clip" if model == "DiT" else "t5"),
        scheduler=dict(type=one_of(rng, "rflow", "iddpm", "dpm-solver"), num_sampling_steps=2, cfg_scale=4.0),
        num_frames=one_of(rng, 34, 1, 5, 16, 17, 20, 51),
        image_size=(one_of(rng, 16, 8, 20, 32), one_of(rng, 24, 9, 16)),
        loop=one_of(rng, 1, 2, 3),
        condition_frame_length=one_of(rng, 5, 0, 1, 3, 10),
        condition_frame_edit=one_of(rng, 0.0, 0.2, 1.0, 0.9),
        align=one_of(rng, None, 5, 3),
        multi_resolution=one_of(rng, None, "STDiT2", "PixArtMS", odds=0.8),
        prompt=[one_of(rng, "a cat", "|0|rain|1|sun", "a very " + "long " * 60 + "text", odds=0.8)],
        save_dir="out",
        verbose=0,
    )
    config["text_encoder"]["from_pretrained"] = str(parts[config["text_encoder"]["type"]])
    if rng.random() < 0.6:
        media = ("image.png", "clip34.mp4", "clip5.mp4")
        config["reference_path"] = [";".join(rng.choices(media, k=rng.randint(1, 2)))]
        if rng.random() < 0.03:
            config["reference_path"] = ["thin.png"]
        config["mask_strategy"] = [strategy(rng)]
    elif rng.random() < 0.1:
        config["image"] = "image.png"
    return InferenceSettings.from_config(config, "test")


class StandIn:
    """An autoencoder that only counts: latents say which call and which frame they come from."""

    def __init__(self, vae: Any) -> None:
        self.vae, self.calls = vae, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vae, name)

    def encoded(self, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        x = torch.cat(list(pieces), dim=2)
        frames, *sides = self.vae.get_latent_size(x.shape[2:])
        return (CODE * self.calls + torch.arange(frames))[None, None, :, None, None].expand(1, 4, -1, *sides)

    def decoded(self, z: torch.Tensor, num_frames: int) -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 3, num_frames, *(8 * side for side in z.shape[3:]))


def run(settings: InferenceSettings, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple], int]:
    """What each clip was given, as (edit, source) of its latent frames, and the frames of the result."""
    pipeline, seen = VideoPipeline(settings), []

    def fill(self: LoadedModels, part: str, built: Any, linear: str = "exact") -> Any:
        if part == "vae":
            return StandIn(built)
        built.forward = lambda x, *_, **__: torch.zeros(len(x), built.out_channels, *x.shape[2:])
        built.null_caption = lambda y: y
        built.prepare = lambda shape, **conditioning: conditioning
        return built

    def texts(models: LoadedModels, job: Job, wanted: list[str]) -> dict[str, torch.Tensor]:
        return {text: torch.zeros(1, 1, 4, models.build(job.size).text_encoder.output_dim) for text in wanted}

    original = denoise.cached_sampling.steps

    def steps(scheduler: Any, model: Any, latents: torch.Tensor, *args: Any, **options: Any) -> Any:
        codes = latents[0, 0, :, 0, 0].round().long().tolist()
        sources = [(code // CODE - 1, code % CODE) if code >= CODE // 2 else None for code in codes]
        seen.append((tuple(options["edit"][0].tolist()), tuple(sources)))
        return original(scheduler, model, latents, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LoadedModels, "_load_weights", fill)
        patch.setattr(generation, "encode_texts", texts)
        patch.setattr(denoise.cached_sampling, "steps", steps)
        (output,) = pipeline.generate()
    return seen, len(output.frames)


@pytest.mark.timeout(1200)
def test_what_is_planned_is_done_and_what_is_refused_is_refused_at_once(
    parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, accepted, refusals, kinds = random.Random(0), 0, set(), set()
    monkeypatch.setattr(builder, "build_text_encoder", cached(builder.build_text_encoder))
    monkeypatch.setattr(builder, "build_model", cached_autoencoders(builder.build_model))
    monkeypatch.setattr("opensora.checkpoints.builder.load_weights", None)
    for number in range(REQUESTS):
        settings = random_request(rng, parts)
        try:
            plan = make_plan(settings)
        except OpenSoraError as error:
            with pytest.raises(type(error)) as raised:
                list(VideoPipeline(settings).generate())
            assert str(raised.value) == str(error)
            refusals.add(str(error)[:12])
            continue
        accepted += 1
        seen, num_frames = run(settings, monkeypatch)
        (clips,) = plan.timelines
        expected = [(tuple(torch.tensor(clip.edit).tolist()), clip.sources) for clip in clips]
        assert seen == expected, (number, settings)
        assert num_frames == plan.num_frames
        kinds |= {(edit == 0, edit < 1, source is None) for one in seen for edit, source in zip(*one, strict=True)}
    assert REQUESTS / 4 < accepted < REQUESTS and len(refusals) > count(4, 8), (accepted, refusals)
    assert {(True, True, False), (False, True, False), (False, False, True)} <= kinds  # kept, edited, generated


def cached(build: Any) -> Any:
    """Building a text encoder once for each path: its tokenizer takes longest of all."""

    @cache
    def built(kind: str, length: int | None, path: Path, dtype: torch.dtype) -> Any:
        section = {"type": kind} | ({"model_max_length": length} if length else {})
        return build(section, path, dtype)

    return lambda section, path, dtype: built(section["type"], section.get("model_max_length"), path, dtype)


def cached_autoencoders(build: Any) -> Any:
    """Building an autoencoder once for each path."""

    @cache
    def built(kind: str, path: Path) -> Any:
        return build({"type": kind}, path)

    def either(section: dict[str, Any], path: Path, *more: Any) -> Any:
        return built(section["type"], path) if not more else build(section, path, *more)

    return either


def settings_for(parts: dict[str, Path], **changes: Any) -> InferenceSettings:
    config: dict[str, Any] = dict(
        model=dict(type="STDiT3", from_pretrained=str(parts["STDiT3"])),
        vae=dict(type="OpenSoraVAE_V1_2", from_pretrained=str(parts["OpenSoraVAE_V1_2"])),
        text_encoder=dict(type="t5", from_pretrained=str(parts["t5"])),
        scheduler=dict(type="rflow", num_sampling_steps=2, cfg_scale=4.0),
        num_frames=34, image_size=(16, 24), align=5, prompt=["a cat"], save_dir="out", verbose=0,
    )  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            config[section][key] = value
        else:
            config[section] = value
    return InferenceSettings.from_config(config, "test")


def test_the_text_says_where_references_land(parts: dict[str, Path]) -> None:
    given = dict(reference_path=["image.png;clip34.mp4"], mask_strategy=["0;0,1,4,-3,9,0.4"])
    plan = make_plan(settings_for(parts, loop=2, image_size=(20, 24), **given))
    text = str(plan)
    for line in (
        "out/sample_0000: 51 frames at 24 fps, 16x24, from 'a cat'",
        "  2 clips of 34 frames, each taking over 17 from the one before",
        "    0 kept: 0 of image.png",
        "    1-4 generated",
        "    5-9 edited from 0.4 on: 5-9 of clip34.mp4",
        "    0-4 kept: 5-9 of clip 0",
        "    5-9 generated",
        "legal lengths near 34: 1, 17, 34, 51, 68, 85",
        "note: 20x24 becomes 16x24: sides are rounded down to multiples of 8",
        "note: mask_strategy '0,1,4,-3,9,0.4': target start 7 becomes 5, a multiple of 5",
        "note: mask_strategy '0,1,4,-3,9,0.4': reference start 4 becomes 5, a multiple of 5",
        "note: mask_strategy '0,1,4,-3,9,0.4': of 9 latent frames 5 fit",
    ):
        assert line in text.splitlines(), line
    assert "peak " in text and text.count("GiB") >= 8


# What used to come to light only after minutes of work, or as a traceback: changes -> what is said.
LATE: list[tuple[dict[str, Any], str]] = [
    (dict(prompt=["a very " + "long " * 60 + "text"]), "tokens, but the model takes 40"),
    (dict(prompt=["|0|rain|1|" + "long " * 60], loop=2), "tokens, but the model takes 40"),
    (dict(scheduler__type="iddpm", model__pred_sigma=False), "learn_sigma needs 8 channels"),
    (dict(multi_resolution="PixArtMS"), "STDiT3 needs fps, height, width"),
    (dict(reference_path=["thin.png"], mask_strategy=["0"], image_size=(64, 64)), "thin.png"),
    (dict(loop=2, reference_path=["clip34.mp4"], mask_strategy=["1,-1,7"], num_frames=17, condition_frame_length=5,
          vae__type="VideoAutoencoderPipeline"), "give --num-frames 34"),
    (dict(loop=2, reference_path=["clip34.mp4;image.png"], mask_strategy=["1,2,12"]), "is outside its 10"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "problem"), LATE)
def test_both_refuse_before_any_weight_is_read(
    parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], problem: str
) -> None:
    monkeypatch.setattr("opensora.checkpoints.builder.load_weights", None)
    settings = settings_for(parts, **changes)
    for job in (make_plan, lambda one: list(VideoPipeline(one).generate())):
        with pytest.raises(OpenSoraError, match=problem):
            job(settings)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(loop=2, reference_path=["image.png"], mask_strategy=["0"]),
        dict(loop=2, reference_path=["clip34.mp4"], mask_strategy=["1,-1,0,5,5,0.3"]),
        dict(scheduler__type="iddpm", reference_path=["clip5.mp4"], mask_strategy=["0,0,0,5,2"]),
        dict(scheduler__type="dpm-solver", num_frames=1),
    ],
)
@some(2)
def test_a_plan_comes_true_with_weights(parts: dict[str, Path], changes: dict[str, Any]) -> None:
    settings = settings_for(parts, **changes)
    plan = make_plan(settings)
    (output,) = VideoPipeline(settings).generate()
    assert len(output.frames) == plan.num_frames


def test_weights_that_are_not_here(capsys: pytest.CaptureFixture, hub_cache: Path, monkeypatch: pytest.MonkeyPatch):
    argv = ["plan", "x", "--model", SAMPLE, "--image-size", "32", "48", "--num-frames", "17"]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("opensora.checkpoints.hub._unreachable", lambda repo: pytest.fail("the hub was asked"))
    assert main([*argv, "--ckpt-path", "org/not-here"]) == 0
    printed = capsys.readouterr().out
    assert "note: model: 'org/not-here' would be downloaded" in printed and "4.50 GiB" in printed
    for wrong in (("--ckpt-path", "org/not-here", "--offline"), ("--ckpt-path", "no/such/folder")):
        assert main([*argv, *wrong]) == 1
        assert "error: model: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dit/inference/16x256x256", "latte/inference/16x256x256"])
def test_a_clip_text_encoder_that_is_not_here(name: str, capsys: pytest.CaptureFixture, hub_cache: Path) -> None:
    """Its prompts have one feature each."""
    argv = ["plan", "x", "--model", name, "--ckpt-path", "org/not-here", "--num-frames", "2"]
    assert main([*argv, "--image-size", "32", "48"]) == 0
    assert "note: text_encoder: 'openai/clip-vit-base-patch32' would be downloaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "room", "part"), [((256, 256), 0.92, "--num-frames"), ((512, 512), 0.62, "--image-size")]
)
@some(1)
def test_the_nearest_setting_that_fits(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], room: float, part: str
) -> None:
    frames = 68 if part == "--num-frames" else 17
    embedded = Path(builder.__file__).parents[2] / "configs/embedded/inference/sample.py"
    argv = ["x", "--image-size", *map(str, size), "--num-frames", str(frames), "--memory", "low"]
    plan = make_plan(settings_of_command(embedded, argv))
    needed = plan.memory - plan.base
    monkeypatch.setattr(memory_meter, "available_memory", lambda device: int(room * needed))
    assert not plan.fits and "it does not fit; this does: " in str(plan)
    found = plan.cheaper()
    assert found.startswith(part)
    again = make_plan(settings_of_command(embedded, [*argv, *found.split()]))
    assert again.memory - again.base <= room * needed


def test_nothing_is_tried_where_the_weights_alone_do_not_fit(
    parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(settings_for(parts))
    assert plan.base < plan.least <= plan.memory
    monkeypatch.setattr("opensora.pipeline.plan.plan_job", lambda *_: pytest.fail("tried"))
    monkeypatch.setattr(memory_meter, "available_memory", lambda device: plan.least - plan.base - 1)
    assert plan.cheaper() is None and "nothing smaller was found" in str(plan)


class CountedInFull(operation_counter.CountedModel):
    """Runs every operation of every call, with PyTorch's own rules for the meta device."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.counter, self.model = operation_counter.OperationCounter(device), model

    def count(self, call: Any) -> operation_counter.Cost:
        with pytest.MonkeyPatch.context() as patch:
            for loop in (chunked_forward, pieces):  # piece by piece, instead of one for all
                patch.setattr(loop, "has_torch_function", lambda _: False)
            patch.setattr(operation_counter, "run_on_meta", lambda func, args, kwargs, _: func(*args, **kwargs))
            return super().count(call)


def counted_in_full(stage: str, dtype: torch.dtype, *args: Any, **options: Any) -> operation_counter.Cost:
    """What a CostModel counts for a stage, by running every operation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_model, "CountedModel", CountedInFull)
        return getattr(CostModel(dtype, CPU), stage)(*args, **options)


DTYPES = (torch.bfloat16, torch.float32) if FULL else (torch.bfloat16,)
STEPS = [
    (kind, plan, given, latent)
    for number, (kind, plan, given, latent) in enumerate(
        product(
            ("STDiT3", "STDiT2", "STDiT", "PixArtMS", "PixArt", "DiT", "Latte"),
            PLANS,
            (False, True),
            ((5, 32, 32), (1, 32, 32), (15, 18, 46)),
        )
    )
    if FULL or number % 9 == 0
]


@pytest.mark.parametrize(("kind", "plan", "given", "latent"), STEPS)
def test_a_step_costs_what_a_full_trace_counts(
    kind: str, plan: Any, given: bool, latent: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one kind are traced once, whatever the model, the memory plan and the size; and so are their chunks."""
    monkeypatch.setattr(memory_plan, "CHUNK_TOKENS", 300)
    given, latent = given and kind in ("STDiT2", "STDiT3"), (1, *latent[1:]) if kind.startswith("PixArt") else latent
    section = {"type": kind, "depth": 2} | ({"condition": "text"} if kind in ("DiT", "Latte") else {})
    model = builder.build_model(section, None, None, {"input_size": latent})
    sizes = {} if kind in ("STDiT", "PixArt", "DiT", "Latte") else conditioning(kind, latent)
    tokens = 1 if kind in ("DiT", "Latte") else 40
    for dtype in DTYPES:
        costs, options = CostModel(dtype, CPU), dict(frames_given=given, plan=plan)
        for batch in (2, 1, 2)[plan.sequential_cfg :]:
            quick = costs.step(model, latent, sizes, tokens, batch, **options)
        assert quick == counted_in_full("step", dtype, model, latent, sizes, tokens, batch, **options)


def conditioning(kind: str, latent: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    pixels = (8 * latent[1], 8 * latent[2])
    return size_conditioning("PixArtMS" if kind == "PixArtMS" else "STDiT2", 1, pixels, latent[0], 24.0)


STAGES = [("decoding", True), ("encoding", 7)] + ([("decoding", False), ("encoding", None)] if FULL else [])


@pytest.mark.parametrize(
    ("kind", "size"),
    [("OpenSoraVAE_V1_2", (20, 32, 48)), ("VideoAutoencoderKL", (9, 64, 96)), ("VideoAutoencoderKL", (17, 256, 256)),
     ("VideoAutoencoderKLTemporalDecoder", (9, 64, 96)), ("OpenSoraVAE_V1_2", (40, 256, 256))][:None if FULL else 2],
)  # fmt: skip
def test_an_autoencoder_costs_what_a_full_trace_counts(kind: str, size: tuple[int, int, int]) -> None:
    vae = builder.build_model({"type": kind, "micro_batch_size": 8}, None)
    for dtype in DTYPES:
        costs = CostModel(dtype, CPU)
        costs.decoding(vae, (size[0] - 1, *size[1:]))  # other pieces, some of them of the same shape
        for stage, option in STAGES:
            assert getattr(costs, stage)(vae, size, option) == counted_in_full(stage, dtype, vae, size, option)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the operations that are traced."""
    traced: Counter[str] = Counter()

    def run(func: Any, *inputs: Any) -> Any:
        traced["operations"] += 1
        return run_on_meta(func, *inputs)

    run_on_meta = operation_counter.run_on_meta
    monkeypatch.setattr(operation_counter, "run_on_meta", run)
    return traced


def test_few_operations_are_traced(traced: Counter[str]) -> None:
    """So that a plan of the largest request takes a second: of 408 frames each batch, of 56 blocks each kind once."""
    vae, model = (builder.build_model({"type": name}, None) for name in ("OpenSoraVAE_V1_2", "STDiT3-XL/2"))
    costs, latent = CostModel(torch.bfloat16, CPU), (120, 90, 160)
    costs.decoding(vae, (408, 720, 1280), streamed=True)
    assert traced.pop("operations") < 1500
    for _ in range(3):  # the second time nothing is new
        costs.step(model, latent, conditioning("STDiT3", latent), 300, 1, plan=PLANS[-1])
    assert traced["operations"] < 500


@pytest.mark.parametrize(("config", "name"), [("opensora-v1-1", "STDiT2-XL/2"), ("opensora-v1-2", "STDiT3-3B/2")])
def test_a_request_that_does_not_fit_is_planned_at_once(
    config: str, name: str, traced: Counter[str], hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shape is traced once, in whichever memory plan or smaller request it comes."""
    argv = ["x", "--model", f"{config}/inference/sample", "--num-frames", "408", "--image-size", "720", "1280"]
    for part in ("--ckpt-path", "--vae-path", "--text-encoder-path"):
        argv += [part, "org/not-here"]
    monkeypatch.setattr(memory_meter, "available_memory", lambda device: 20 * 2**30)
    plan = make_plan(request_settings([*argv, "--loop", "3", "--cfg-options", f"model.type={name}"]))
    assert "it does not fit; this does" in str(plan)
    assert traced["operations"] < 6000


def settings_of_command(config: Path, argv: list[str]) -> InferenceSettings:
    return request_settings(["--model", str(config), *argv])


COST = operation_counter.Cost(products=1e12, moved=1e9, calls=10, peak=5)  # 10.2 seconds at the nominal pace


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> float:
    """A machine that is three times as slow as the nominal pace in a trial, and never faster than its nominal peak."""
    monkeypatch.setattr(speed_history, "_trial", lambda device, dtype: 3.0)
    monkeypatch.setattr(speed_history, "known_peak", lambda device, dtype: operation_counter.PRODUCTS)
    return 3 * COST.nominal_seconds


@pytest.mark.parametrize(
    ("taken", "least", "most", "runs"),
    [
        ((40.0, 80.0, 400.0), 40, 80, 3),  # the fastest, and the middle one
        ((70.0,), 70, 70, 1),
        ((6120.0, 40.0, 5000.0), 40, 40, 1),  # runs on a busy machine say nothing
        ((6120.0, 3600.0), 30.6, 122.4, 0),  # neither do they alone: as without a run
        ((5.0, 9.9), 30.6, 122.4, 0),  # too short to tell
        ((11.0,) * 10 + (40.0,) * 8, 40, 40, 8),  # the last runs count
    ],
)
def test_the_pace_of_earlier_runs_counts(steady: float, taken: tuple[float, ...], least: float, most: float, runs: int):
    for one in taken:
        speed_history.remember(CPU, "sampling", COST, one)
    found = speed_history.span(COST, CPU, "sampling")
    if runs:
        assert found.least == pytest.approx(least, rel=0.01) and found.most == pytest.approx(most, rel=0.01)
        assert found.source.startswith(f"{runs} earlier run")
    assert speed_history.seconds(COST, CPU, "sampling") == found.least >= COST.products / operation_counter.PRODUCTS
    assert speed_history.span(COST, CPU, "decoding").source == "a moment's trial"
    assert speed_history.seconds(COST, CPU, "sampling", torch.bfloat16) == pytest.approx(
        steady, rel=0.01
    )  # of its own kind


def test_cards_have_paces_of_their_own(steady: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards in one machine, and one of the same name with more memory."""
    cards = {0: ("NVIDIA H100", 80), 1: ("NVIDIA GeForce RTX 4090", 24), 2: ("NVIDIA H100", 96)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cards[device.index][0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, cards[device.index][1] * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    devices = [torch.device("cuda", index) for index in cards]
    assert speed_history.device_key(devices[0], torch.float32) == "NVIDIA H100, 80 GiB"
    for device, taken in zip(devices, (20.0, 40.0, 30.0), strict=True):
        speed_history.remember(device, "sampling", COST, taken, torch.bfloat16)
    found = [speed_history.seconds(COST, device, "sampling", torch.bfloat16) for device in devices]
    assert found == pytest.approx([20.0, 40.0, 30.0], rel=0.01)
    assert speed_history.span(COST, devices[0], "sampling").source == "a moment's trial"  # in float32


@pytest.mark.parametrize("share", [2, 3, 30])
def test_nothing_is_faster_than_the_peak(steady: float, monkeypatch: pytest.MonkeyPatch, share: int) -> None:
    monkeypatch.setattr(speed_history, "known_peak", lambda device, dtype: operation_counter.PRODUCTS / share)
    speed_history.remember(CPU, "sampling", COST, 12.0)
    found = speed_history.span(COST, CPU, "sampling")
    assert found.least == found.most == pytest.approx(10 * share, rel=0.01)


@pytest.mark.parametrize(
    "cost",
    [
        operation_counter.Cost(products=1e6),  # milliseconds of work: something else took the time
        operation_counter.Cost(convolutions=1e9, moved=1e6),
        operation_counter.Cost(products=1e12, calls=10**6),  # most of it was calls
    ],
)
def test_what_was_too_short_to_time_is_not_remembered(steady: float, cost: operation_counter.Cost) -> None:
    speed_history.remember(CPU, "sampling", cost, 12.0)
    assert speed_history.span(COST, CPU, "sampling").source == "a moment's trial"


@pytest.mark.parametrize(
    "text",
    [
        "{broken", "[]", "[1]", '{"device": 1}', "[" * 10**5, '[{"device": "cpu-1", "stage": "sampling", "pace": 600}]',
        '[{"device": "cpu-1", "stage": "sampling", "pace": "x", "seconds": 20}]',
        '[{"device": "cpu-1", "stage": "sampling", "pace": -1, "seconds": 20}]',
    ],
    ids=range(8),
)  # fmt: skip
def test_a_record_of_runs_that_says_nothing(steady: float, text: str) -> None:
    file = Path(os.environ["XDG_CACHE_HOME"], "opensora", "paces.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    assert speed_history.seconds(COST, CPU, "sampling") == pytest.approx(steady, rel=0.01)
    speed_history.remember(CPU, "sampling", COST, 40.0)
    assert speed_history.seconds(COST, CPU, "sampling") == pytest.approx(40, rel=0.01)


def test_counting_is_exact_where_it_can_be() -> None:
    layer = torch.nn.Linear(8, 16, device="meta")
    x = torch.empty(4, 8, device="meta")
    cost = operation_counter.CountedModel(layer, CPU).count(lambda layer: layer(x).relu())
    assert cost.products == 2 * 4 * 8 * 16
    assert cost.peak == 4 * 2 * 4 * 16  # the input of the layer is gone when the last result is made
    assert cost.times(3)[:1] == (3 * cost.products,) and cost.times(3).peak == cost.peak
    assert cost.then(cost.times(2))._replace(calls=0) == cost.times(3)._replace(calls=0)


def test_memory_grows_with_the_length_to_its_end(parts: dict[str, Path]) -> None:
    """Work in one part of the decoder peaks for short clips, what is held of the result for long ones."""
    path = parts["OpenSoraVAE_V1_2"]
    vae = builder.build_model({"type": "OpenSoraVAE_V1_2", "from_pretrained": str(path)}, path)
    costs = [CostModel(torch.float32, CPU).decoding(vae, (17 * count, 32, 48)) for count in (1, 2, 6)]
    assert costs[2].convolutions == pytest.approx(6 * costs[0].convolutions, rel=0.05)
    assert costs[2].peak - costs[1].peak > 4 * 17 * 4 * 3 * 32 * 48  # 4 chunks of frames in float32 at the least


# ---- memory, against what a process of its own takes at its peak


PEAK = (
    "import sys\nfrom pathlib import Path\nfrom opensora.cli import main\n"
    "assert main(['generate', *sys.argv[1:]]) == 0\n"
    "status = Path('/proc/self/status').read_text().splitlines()\n"
    "print('PEAK', next(line.split()[1] for line in status if line.startswith('VmHWM')))\n"
)
FIGURE = (
    "import sys\nfrom opensora.cli.verbs.generation import request_settings\n"
    "from opensora.pipeline.plan import make_plan\n"
    "print('PEAK', make_plan(request_settings(sys.argv[1:])).memory // 1024)\n"
)
ONE_STEP = ("--num-sampling-steps", "1", "--verbose", "0")


def peak(code: str, *argv: object) -> float:
    """Bytes that a program prints for a request."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, "a red circle", *ONE_STEP, *map(str, argv)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.split("PEAK ")[1].split()[0])


on_linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists() or not os.environ.get("OPENSORA_MEASURE"),
    reason="a measurement: set OPENSORA_MEASURE; the peak is read from /proc",
)


@on_linux
@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--num-frames", 34, "--image-size", 192, 192),
        ("--num-frames", 1, "--image-size", 512, 512),
        ("--num-frames", 17, "--image-size", 320, 320),
    ],
)
def test_memory_of_the_embedded_model(argv: tuple) -> None:
    assert peak(FIGURE, *argv) == pytest.approx(peak(PEAK, *argv), rel=0.15)


@on_linux
@pytest.mark.skipif(not FULL, reason="takes 10 GB of disk and minutes: set OPENSORA_FULL=1")
@pytest.mark.parametrize(
    ("kind", "dtype", "config", "size"),
    [
        ("STDiT3-XL/2", torch.float32, "configs/opensora-v1-2/inference/sample.py", (17, 144, 256)),
        ("STDiT-XL/2", torch.bfloat16, "configs/opensora/inference/16x256x256.py", (16, 128, 128)),
    ],
)
def test_memory_of_large_models(
    here: Path, parts: dict[str, Path], kind: str, dtype: torch.dtype, config: str, size: tuple[int, ...]
) -> None:
    vae = "OpenSoraVAE_V1_2" if kind.startswith("STDiT3") else "VideoAutoencoderKL"
    section = {"type": kind, "caption_channels": 32, "input_size": (size[0], size[1] // 8, size[2] // 8)}
    with torch.device("meta"):
        model = builder.registry.build(section)
    state = {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in model.state_dict().items()}
    save_pretrained(state, here / "weights", {"model_type": kind, **model.config}, 2**40)
    del state
    argv = [
        "--model",
        ROOT / config,
        "--num-frames",
        size[0],
        "--image-size",
        *size[1:],
        "--ckpt-path",
        here / "weights",
    ]
    argv += ["--vae-path", parts[vae], "--text-encoder-path", parts["t5"], "--cfg-options", "vae.subfolder=None"]
    assert peak(FIGURE, *argv) == pytest.approx(peak(PEAK, *argv), rel=0.15)
