"""The interface for programs: `opensora.load`, calls of a pipeline, its videos, and the blocks of docs/python.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import opensora
from opensora.checkpoints import read
from opensora.cli import main
from opensora.datasets.video import read_video
from opensora.errors import ArgumentError, Cancelled, ConfigError, MediaError, WeightsError
from opensora.pipeline import batching
from opensora.pipeline.pipeline import Preview, VideoPipeline
from opensora.pipeline.recipe import frames_digest, read_recipe
from opensora.pipeline.video import Video
from tests.checkpoints import SAMPLE
from tests.full import count
from tests.tiny import make_tiny_t5

PROMPTS = ["a red circle moving right", "a blue square growing", "a white triangle standing still", "a cyan circle"]
SMALL = {"num_frames": 5, "height": 16, "width": 24, "num_inference_steps": 2}
DOCUMENT = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def pipe() -> VideoPipeline:
    return opensora.load("embedded", device="cpu", **SMALL)


def test_the_snippet_of_the_readme(here: Path) -> None:
    pipe = opensora.load("embedded", device="cpu", steps=2)
    video = pipe("a red circle moving right on a black background", num_frames=17, seed=3)
    assert video.frames.dtype == np.uint8 and video.frames.shape == (17, 64, 64, 3)
    video.save("out.mp4")
    assert main(["replay", "out.mp4", "--save-dir", "again"]) == 0
    argv = ["a red circle moving right on a black background", "--num-frames", "17", "--seed", "3", "--steps", "2"]
    assert main(["generate", *argv, "--device", "cpu", "-o", "cli.mp4"]) == 0
    made, by_command = (read_recipe(name) for name in ("out.mp4", "cli.mp4"))
    differing = {name for name, value in made["settings"].items() if value != by_command["settings"][name]}
    assert differing == {"output"}
    assert {**made, "settings": None} == {**by_command, "settings": None}


def test_importing_opensora_loads_nothing_heavy() -> None:
    code = (
        "import sys, opensora; assert 'load' in dir(opensora); print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(DOCUMENT.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    with pytest.raises(AttributeError, match="has no attribute 'pipeline_of_dreams'"):
        opensora.pipeline_of_dreams  # noqa: B018


def test_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read_file = read.read_state_dict
    monkeypatch.setattr(
        "opensora.checkpoints.fit.read_state_dict", lambda path: reads.update([str(path)]) or read_file(path)
    )
    pipe = opensora.load("embedded", device="cpu", num_frames=1, height=8, width=8, steps=1)
    assert not reads  # loading locates files and reads none
    for number in range(8):
        pipe(PROMPTS[number % 4], seed=number, num_frames=1 + 4 * (number % 2))
    assert len(reads) == 3 and set(reads.values()) == {1}


@pytest.mark.parametrize("loops", [1, 2])
def test_batches_give_the_bytes_of_single_requests(pipe: VideoPipeline, loops: int) -> None:
    given: dict[str, Any] = {
        "loops": loops,
        "seed": 5,
        "num_frames": 34 if loops > 1 else 5,
        "condition_frame_length": 5,
        "num_inference_steps": 2 // loops,
    }
    texts = [*PROMPTS[:2], PROMPTS[0]] if loops > 1 else [*PROMPTS, PROMPTS[0], "a dog"]
    single = [pipe(text, **given) for text in texts]
    together = pipe(texts, batch_size=len(texts) - 1, **given)
    assert [frames_digest(one.frames) for one in together] == [frames_digest(one.frames) for one in single]
    assert [one.recipe["prompt"] for one in together] == texts


def test_requests_of_one_length_are_denoised_together(pipe: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(batching, "is_batch_invariant", lambda *_: True)
    monkeypatch.setattr(pipe.models, "same_bits", {})  # forget what other tests have seen
    texts = ["a red circle", "a long sentence about a green square", "a red square", "a red circle"]
    pipe(texts, batch_size=3, callback_on_step_end=lambda p, i, t, given: sizes.append(len(given["latents"])))
    assert sizes == [3, 3, 1, 1]


def test_a_batch_with_other_bits_is_not_computed(pipe: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(batching, "is_batch_invariant", lambda *_: False)
    monkeypatch.setattr(pipe.models, "same_bits", {})
    note = lambda p, i, t, given: sizes.append(len(given["latents"]))  # noqa: E731
    pipe(["a red circle"] * 3, batch_size=3, num_inference_steps=1, callback_on_step_end=note)
    assert sizes == [1, 1, 1]


def test_batches_of_the_published_size_of_the_embedded_model() -> None:
    pipe = opensora.load("embedded", device="cpu", num_frames=17, num_inference_steps=1)
    texts = PROMPTS[: count(2, 4)]
    single = [frames_digest(pipe(text).frames) for text in texts]
    assert [frames_digest(one.frames) for one in pipe(texts, batch_size=4)] == single


def test_given_frames_in_a_batch(pipe: VideoPipeline) -> None:
    image = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)
    given = {"image": image, "num_frames": 17}
    single = [pipe(text, **given).frames for text in PROMPTS[:2]]
    together = [one.frames for one in pipe(PROMPTS[:2], batch_size=2, **given)]
    assert all((a == b).all() for a, b in zip(single, together, strict=True))


def test_names_of_diffusers(pipe: VideoPipeline) -> None:
    ours = pipe("a cat", num_sampling_steps=3, cfg_scale=2.0, seed=7, image_size=(16, 32))
    theirs = pipe("a cat", num_inference_steps=3, guidance_scale=2.0, seed=7, height=16, width=32)
    assert (ours.frames == theirs.frames).all()
    same = VideoPipeline.from_pretrained("embedded", device="cpu", torch_dtype=torch.float32, **SMALL)
    assert (same("a cat", seed=7).frames == pipe("a cat", seed=7).frames).all()
    drawn = [pipe("a cat", generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert (drawn[0].frames == drawn[1].frames).all() and drawn[0].recipe["seed"] == drawn[1].recipe["seed"]
    generator = torch.Generator().manual_seed(1)
    first, second = (pipe("a cat", generator=generator).recipe["seed"] for _ in range(2))
    assert first == drawn[0].recipe["seed"] != second
    samples = pipe("a cat", num_videos_per_prompt=2, seed=7)
    assert len(samples) == 2 and (samples[0].frames == pipe("a cat", seed=7).frames).all()


def test_output_types(pipe: VideoPipeline) -> None:
    video = pipe("a cat", seed=1)
    tensors = pipe("a cat", seed=1, output_type="pt")
    images = pipe("a cat", seed=1, output_type="pil")
    latents = pipe("a cat", seed=1, output_type="latent")
    assert (tensors.frames.permute(0, 2, 3, 1).mul(255).round().byte().numpy() == video.frames).all()
    assert all((np.asarray(image) == frame).all() for image, frame in zip(images.frames, video.frames, strict=True))
    assert latents.frames.shape == (8, 2, 2, 3) and latents.frames.dtype == torch.float32
    latents.frames.requires_grad_().square().sum().backward()
    with pytest.raises(MediaError, match="latents cannot be saved"):
        latents.save("x.mp4")
    with pytest.raises(ConfigError, match="output_type 'gif' is not known"):
        pipe("a cat", output_type="gif")


def test_the_callback_sees_every_step_and_may_change_the_latents(pipe: VideoPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def note(pipeline: VideoPipeline, step: int, timestep: float, given: dict[str, torch.Tensor]) -> dict:
        assert pipeline is pipe and given["latents"].shape == (1, 8, 2, 2, 3)
        seen.append((step, timestep))
        return given

    video = pipe("a cat", seed=1, num_inference_steps=4, callback_on_step_end=note)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    times = [time for _, time in seen]
    assert times == sorted(times, reverse=True) and times[0] == 1000
    assert (video.frames == pipe("a cat", seed=1, num_inference_steps=4).frames).all()
    zeros = pipe("a cat", seed=1, callback_on_step_end=lambda p, i, t, given: {"latents": given["latents"] * 0})
    assert not (zeros.frames == pipe("a cat", seed=1).frames).all()


@pytest.mark.parametrize("how", ["method", "attribute", "error"])
def test_a_callback_cancels_within_one_step(pipe: VideoPipeline, how: str) -> None:
    steps = []

    def cancel(pipeline: VideoPipeline, step: int, timestep: float, given: dict) -> None:
        steps.append(step)
        if step == 1:
            if how == "method":
                pipeline.interrupt()
            elif how == "attribute":
                pipeline._interrupt = True
            else:
                raise Cancelled("enough")

    with pytest.raises(Cancelled):
        pipe("a cat", num_inference_steps=20, callback_on_step_end=cancel)
    assert steps == [0, 1]
    assert pipe("a cat").frames.shape == (5, 16, 24, 3)  # the next call is not disturbed


def test_another_thread_interrupts(pipe: VideoPipeline) -> None:
    stepped, steps = threading.Event(), []

    def wait(*_: Any) -> None:
        steps.append(1)
        stepped.set()
        thread.join()

    thread = threading.Thread(target=lambda: stepped.wait() and pipe.interrupt())
    thread.start()
    with pytest.raises(Cancelled):
        pipe("a cat", num_inference_steps=5, callback_on_step_end=wait)
    assert len(steps) == 1


def test_stream_gives_previews_and_then_the_video(pipe: VideoPipeline) -> None:
    events = list(pipe.stream("a cat", seed=1, num_inference_steps=3))
    assert [(one.step, one.num_steps) for one in events[:-1]] == [(1, 3), (2, 3), (3, 3)]
    assert all(isinstance(one, Preview) and one.frames.shape == (5, 16, 24, 3) for one in events[:-1])
    assert isinstance(events[-1], Video)
    assert (events[-1].frames == pipe("a cat", seed=1, num_inference_steps=3).frames).all()
    assert (events[-2].frames == events[-1].frames).all()  # the last step predicts the result
    assert len(list(pipe.stream("a cat", every=3, num_inference_steps=3))) == 2


def test_a_stream_that_is_open_keeps_the_pipeline(pipe: VideoPipeline) -> None:
    stream = pipe.stream("a cat")
    next(stream)
    with pytest.raises(ConfigError, match="finish or close that one first"):
        pipe("a dog")
    stream.close()
    assert pipe("a dog").frames.shape == (5, 16, 24, 3)


def test_two_pipelines_in_two_threads_give_the_bytes_of_one(pipe: VideoPipeline) -> None:
    texts = PROMPTS[:2]
    expected = [frames_digest(pipe(text, seed=2).frames) for text in texts]
    found: dict[int, list[str]] = {}

    def work(number: int) -> None:
        own = opensora.load("embedded", device="cpu", **SMALL)
        found[number] = [frames_digest(own(text, seed=2).frames) for text in texts]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: expected, 1: expected}


def test_calls_of_one_pipeline_from_threads_are_serialised(pipe: VideoPipeline) -> None:
    expected = {text: frames_digest(pipe(text).frames) for text in PROMPTS}
    inside, most, found = [], [], {}

    def note(*_: Any) -> None:
        inside.append(threading.get_ident())
        most.append(len(set(inside)))

    def work(text: str) -> None:
        video = pipe(text, callback_on_step_end=note)
        inside.clear()
        found[text] = frames_digest(video.frames)

    threads = [threading.Thread(target=work, args=(text,)) for text in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_calls_leave_no_trace_in_the_process(pipe: VideoPipeline) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(), np.random.get_state()[1].tolist()
    pipe("a cat")
    after = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(), np.random.get_state()[1].tolist()
    assert (before[0] == after[0]).all() and before[1:] == after[1:]


def test_a_plan_reads_no_weights() -> None:
    pipe = opensora.load("embedded", device="cpu", **SMALL)
    plan = pipe.plan("a cat", num_frames=17)
    assert plan.num_frames == 17 and plan.memory > 2**20 and "17 frames" in str(plan)
    assert pipe.models.model is None


def test_the_memory_of_a_batch_is_planned(pipe: VideoPipeline) -> None:
    large = {"height": 128, "width": 128, "num_frames": 17}
    one, four = (pipe.plan(PROMPTS, batch_size=n, **large).stages[2].cost for n in (1, 4))
    assert 3 * one.peak < four.peak < 5 * one.peak
    assert four.products == pytest.approx(one.products, rel=0.01)


@pytest.mark.parametrize("kind", ["array", "tensor", "pil", "path"])
def test_media_as_arrays_tensors_images_and_paths(pipe: VideoPipeline, here: Path, kind: str) -> None:
    from PIL import Image

    image = np.random.default_rng(1).integers(0, 255, (16, 24, 3), np.uint8)
    Image.fromarray(image).save(here / "image.png")
    given = {
        "array": image, "tensor": torch.from_numpy(image).permute(2, 0, 1), "pil": Image.fromarray(image),
        "path": here / "image.png",
    }[kind]  # fmt: skip
    video = pipe("a cat", image=given, num_frames=17)
    assert (video.frames == pipe("a cat", image=str(here / "image.png"), num_frames=17).frames).all()
    assert not (video.frames == pipe("a cat", num_frames=17).frames).all()
    assert len(video.recipe["references"]) == 1


def test_extend_and_edit_take_the_video_of_another_call(pipe: VideoPipeline) -> None:
    video = pipe("a cat", num_frames=17)
    longer = pipe("a cat", extend=video.frames, num_frames=34)
    assert longer.frames.shape == (34, 16, 24, 3)
    other = pipe("a dog", edit=video.frames, strength=0.5, num_frames=17)
    assert other.frames.shape == (17, 16, 24, 3) and not (other.frames == video.frames).all()


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "new/out.mp4"])
def test_a_video_is_saved_with_its_recipe(pipe: VideoPipeline, here: Path, name: str) -> None:
    video = pipe("a cat", seed=4)
    assert video.save(name) == Path(name)
    assert read_recipe(name)["output"]["sha256"] == frames_digest(video.frames)
    assert main(["replay", name, "--save-dir", "again"]) == 0
    if name.endswith("mp4"):
        assert read_video(name)[0].shape == video.frames.shape


def test_an_image_is_saved_as_png(pipe: VideoPipeline, here: Path) -> None:
    image = pipe("a cat", num_frames=1)
    image.save("cat.png")
    assert main(["replay", "cat.png", "--save-dir", "again"]) == 0
    with pytest.raises(MediaError, match=r"name it cat\.png"):
        image.save("cat.mp4")
    assert sorted(path.name for path in here.glob("cat*")) == ["cat.json", "cat.png"]


def test_a_video_that_cannot_be_written_leaves_nothing(pipe: VideoPipeline, here: Path, monkeypatch) -> None:
    video = pipe("a cat")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opensora.pipeline.output_files.encode_video", full)
    with pytest.raises(MediaError, match="No space left"):
        video.save("out.mp4")
    assert not list(here.glob("out*"))


def test_a_notebook_shows_the_video(pipe: VideoPipeline) -> None:
    shown = pipe("a <cat> & a 'dog'")._repr_html_()
    assert shown.startswith("<video") and "data:video/mp4;base64," in shown and "<cat>" not in shown
    assert "data:image/png;base64," in pipe("a cat", num_frames=1)._repr_html_()
    assert repr(pipe("a cat")) == "Video(5 frames of 16x24 at 8 fps, 'a cat')"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_frame": 3}, "unknown argument 'num_frame'; did you mean 'num_frames'"),
        ({"guidence_scale": 3}, "did you mean 'guidance_scale'"),
        ({"save_dir": "x"}, "unknown argument 'save_dir'"),
        ({"device": "cpu"}, "device is fixed when the models are loaded; give it to opensora.load"),
        ({"height": 16}, "height alone is not a size; give height and width"),
        ({"num_inference_steps": 3, "steps": 4}, "are the same setting"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator exclude each other"),
        ({"generator": 3}, "generator must be a torch.Generator"),
        ({"prompt": []}, "no prompt given"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(pipe: VideoPipeline, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)) as caught:
        pipe(**{"prompt": "a cat", "height": None, **given})
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"num_frames": 0}, ConfigError, "num_frames"),
        ({"num_frames": "three"}, ConfigError, "number of frames 'three'"),
        ({"resolution": "241p", "aspect_ratio": "9:16"}, ConfigError, "241p"),
        ({"guidance_scale": "strong"}, ConfigError, "cfg_scale"),
        ({"num_inference_steps": -1}, ConfigError, "num_sampling_steps"),
        ({"prompt": ""}, ConfigError, "prompt"),
        ({"prompt": 3}, ConfigError, "prompt"),
        ({"prompt": ["a", 3]}, ConfigError, "prompt"),
        ({"image": "nothing.png"}, MediaError, "no such file"),
        ({"image": np.zeros((3, 3))}, MediaError, "image is an array of shape"),
        ({"extend": np.zeros((17, 16, 24, 3), np.uint8), "edit": "x.mp4"}, ConfigError, "cannot be combined"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_values_are_refused_in_one_line(
    pipe: VideoPipeline, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        pipe(**{"prompt": "a cat", **given})
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded(here: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'embedded'"):
        opensora.load("embeded")
    with pytest.raises(WeightsError):
        opensora.load("embedded", ckpt_path=str(here / "nothing"))
    with pytest.raises(ArgumentError, match="unknown argument 'colour'"):
        opensora.load("embedded", colour="red")
    (here / "empty").mkdir()
    with pytest.raises((ConfigError, WeightsError)):
        opensora.load(str(here / "empty"))


def test_a_configuration_and_a_checkpoint_folder(here: Path, hub_cache: Path) -> None:
    from tests.checkpoints import snapshot

    size = {"num_frames": 1, "height": 16, "width": 24, "steps": 1}
    parts = {f"{part}_path": str(snapshot(hub_cache, part)) for part in ("vae", "text_encoder")}
    by_configuration = opensora.load(SAMPLE, device="cpu", ckpt_path=str(snapshot(hub_cache, "model")), **parts)
    by_folder = opensora.load(str(snapshot(hub_cache, "model")), device="cpu", **parts)
    frames = [one("a cat", seed=1, **size).frames for one in (by_configuration, by_folder)]
    assert (frames[0] == frames[1]).all()


def test_a_text_encoder_that_does_not_fit_beside_the_models_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = opensora.load("embedded", device="cpu", **SMALL)
    expected = pipe("a cat").frames
    assert pipe.models.text_encoder is not None
    monkeypatch.setattr("opensora.pipeline.stage_costs.ResourceEstimate.fits", lambda *_: False)
    tight = opensora.load("embedded", device="cpu", **SMALL)
    assert (tight("a cat").frames == expected).all() and tight.models.text_encoder is None
    assert (tight("a cat").frames == expected).all()


def test_models_of_one_size_are_loaded_again_for_another(here: Path) -> None:
    from tests import zoo

    model, vae, text_encoder = zoo.stdit(here / "stdit.pth"), zoo.make_vae(here / "vae"), make_tiny_t5(here / "t5")
    config = {
        "model": {"type": "STDiT", "from_pretrained": str(model), **zoo.SMALL},
        "vae": {"type": "VideoAutoencoderKL", "from_pretrained": str(vae)},
        "text_encoder": {"type": "t5", "from_pretrained": str(text_encoder)},
        "scheduler": {"type": "iddpm", "num_sampling_steps": 2, "cfg_scale": 4.0}, "num_frames": 4,
        "image_size": [16, 16],
    }  # fmt: skip
    (here / "stdit.json").write_text(json.dumps(config))
    pipe = opensora.load("stdit.json", device="cpu")
    first = pipe("a cat")
    assert pipe("a cat", height=16, width=32).frames.shape == (4, 16, 32, 3)
    assert (pipe("a cat").frames == first.frames).all()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S))
def test_blocks_of_the_document(here: Path, block: str) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save("photo.png")
    if "opensora.load(" not in block:
        block = f'pipe = opensora.load("embedded", device="cpu", height=16, width=24, steps=2)\n{block}'
    block = re.sub("64|128", "16", block).replace('device="cpu")', 'device="cpu", height=16, width=24, steps=2)')
    exec(compile(f"import opensora\n{block}", "docs/python.md", "exec"), {})
