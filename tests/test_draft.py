"""`generate --draft` and `opensora continue`: the two together make the very files of a run without a stop."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.checkpoints.read import read_metadata, read_state_dict
from opensora.checkpoints.summary import content_hash
from opensora.cli import main
from opensora.datasets.video import read_image, read_video, write_image, write_video
from opensora.errors import WeightsError
from opensora.pipeline import draft
from opensora.pipeline.noise import noise_generator
from opensora.pipeline.recipe import read_recipe
from opensora.schedulers.common import SamplerState
from opensora.schedulers.dpms import DPM_SOLVER
from opensora.schedulers.iddpm import IDDPM
from opensora.schedulers.iddpm_speed import IDDPM_SPEED
from opensora.schedulers.rf import RFLOW
from tests.checkpoints import SAMPLE, run_script, snapshot, tree, use_cache
from tests.full import count, some

CPU = torch.device("cpu")
SAMPLERS = {
    "rflow": RFLOW(num_sampling_steps=7),
    "rflow-discrete": RFLOW(num_sampling_steps=7, use_discrete_timesteps=True, use_timestep_transform=True),
    "iddpm": IDDPM(num_sampling_steps=7),
    "iddpm-ddim": IDDPM(num_sampling_steps=7, ddim_eta=0.5, tables="float32"),
    "iddpm-speed": IDDPM_SPEED(num_sampling_steps=7),
    **{
        f"dpm-{method}-{order}": DPM_SOLVER(num_sampling_steps=7, order=order, method=method)
        for method in ("multistep", "singlestep")
        for order in (1, 2, 3)
    },
}
EDIT = torch.tensor([[0.0, 0.5, 1.0, 1.0], [0.9, 0.0, 0.3, 0.0]])
SMALL = ("--image-size", "16", "24", "--num-frames", "17", "--num-sampling-steps", "6", "--dtype", "fp32")
SCHEDULER = "scheduler={'type': '%s', 'num_sampling_steps': 6, 'cfg_scale': 4.0%s}"


def model(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor, x_mask: torch.Tensor | None = None) -> torch.Tensor:
    out = 0.3 * x + (y.flatten() * timestep / 1000)[:, None, None, None, None]
    return torch.cat([out, out.sin()] if x_mask is None else [out + 0.1 * ~x_mask[:, None, :, None, None], out], dim=1)


def first_channels(*args: torch.Tensor, **told: torch.Tensor) -> torch.Tensor:
    return model(*args, **told)[:, :3]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("edit", [None, EDIT], ids=["whole", "edited"])
def test_a_sampler_stops_and_goes_on_at_every_step(name: str, edit: torch.Tensor | None) -> None:
    sampler = SAMPLERS[name]
    if edit is not None and not sampler.supports_edit:
        edit = None
    size = {"height": 64, "width": 64, "num_frames": 17}
    cond, null = {"y": torch.tensor([0.5, 0.7])}, {"y": torch.zeros(2)}
    noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    network = model if name.startswith("iddpm") else first_channels

    def steps(source: list[torch.Generator], resume: SamplerState | None = None) -> Iterator[SamplerState]:
        return sampler.steps(network, noise, cond, null, **size, edit=edit, source=source, resume=resume)

    def sources() -> list[torch.Generator]:
        return [noise_generator(1, n) for n in range(2)]

    states, counted = list(steps(sources())), sampler.num_steps
    assert [(state.step, state.num_steps) for state in states] == [(n + 1, counted) for n in range(counted)]
    whole = sampler.sample(network, noise, cond, null, **size, edit=edit, source=sources())
    assert torch.equal(states[-1].x, whole)
    assert counted == (7 if "single" not in name else {"1": 7, "2": 4, "3": 3}[name[-1]])
    for until in range(1, counted):
        source = sources()
        *_, state = islice(steps(source), until)
        assert state.step == until and state.x0.shape == whole.shape and state.x0.isfinite().all()
        assert until < 2 or not torch.equal(state.x0, state.x)
        carry = {name: value.clone() for name, value in state.carry.items()}
        resume = SamplerState(until, counted, state.x.clone(), state.x.clone(), carry)  # as a file has it
        *_, last = steps(source, resume)
        assert torch.equal(last.x, whole)


def test_the_guess_is_what_the_last_step_sees() -> None:
    """Rectified flow towards a point: its straight lines lead there from every step."""
    target, noise = torch.full((1, 3, 1, 2, 2), 2.0), torch.randn(1, 3, 1, 2, 2)

    def straight(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return target - noise

    told = {"y": torch.zeros(1)}
    for state in RFLOW(num_sampling_steps=5).steps(straight, noise, told, guidance_scale=1.0):
        torch.testing.assert_close(state.x0, target)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    write_image(generator.integers(0, 256, (32, 40, 3), dtype=np.uint8), folder / "image.png")
    write_video(generator.integers(0, 256, (17, 16, 24, 3), dtype=np.uint8), folder / "clip.mp4", 24)
    return folder


@pytest.fixture
def here(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(media, tmp_path, dirs_exist_ok=True)
    return tmp_path


def state(name: str = "sample_0000", folder: str = "out") -> str:
    return f"{folder}/{name}.draft.safetensors"


def make(*argv: str) -> None:
    assert run_script(SAMPLE, *SMALL, "--save-dir", "out", *argv) == 0


def check_continued(capsys: pytest.CaptureFixture, *argv: str, stop: tuple[str, ...] = ("--steps-until", "3")) -> Path:
    """Files of a draft that is finished are those of the same command without a stop; gives the first."""
    prompt = () if "--prompt" in argv or "--prompt-path" in argv else ("--prompt", "rain")
    make(*prompt, *argv)
    whole = tree(Path("out"))
    shutil.rmtree("out")
    capsys.readouterr()
    make(*prompt, *argv, *stop)
    printed = capsys.readouterr().out.split("\n")[:-1]
    states = [line for line in printed if line.endswith(".safetensors")]
    assert not whole.keys() & tree(Path("out")).keys()
    assert main(["continue", *states]) == 0
    made = capsys.readouterr().out.split("\n")[:-1]
    assert {name: data for name, data in tree(Path("out")).items() if ".draft." not in name} == whole
    assert all(Path(line).name in whole for line in made) and len(set(made)) >= len(states)
    return Path(made[0])


SCHEDULERS = {
    "rflow": ("rflow", ""),
    "iddpm": ("iddpm", ""),
    "iddpm-speed": ("iddpm-speed", ""),
    "multistep": ("dpm-solver", ", 'order': 3"),
    "singlestep": ("dpm-solver", ", 'method': 'singlestep', 'order': 2"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@some(3)
def test_a_continued_video_is_the_one_without_a_stop(here: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    argv = ("--num-frames", "5", "--cfg-options", SCHEDULER % SCHEDULERS[name])
    check_continued(capsys, *argv, stop=("--steps-until", "2"))


@pytest.mark.parametrize("name", ["rflow", "iddpm"][: count(1, 2)])
def test_kept_and_edited_frames_and_loops(here: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    argv = ("--reference-path", "image.png;clip.mp4", "--mask-strategy", "0;0,1,0,5,5,0.4;1,1,0,5,5,0.7")
    argv += ("--num-frames", "34", "--loop", "3", "--prompt", "|0|rain|1|sun")
    video = check_continued(capsys, *argv, "--cfg-options", SCHEDULER % SCHEDULERS[name])
    assert len(read_video(video)[0]) == 34 * 3 - 2 * 17
    assert len(read_video("out/sample_0000.draft.mp4")[0]) == 34  # the first loop


def test_conditions_in_words(here: Path, capsys: pytest.CaptureFixture) -> None:
    check_continued(
        capsys, "--edit", "clip.mp4", "--strength", "0.8", "--cfg-options", "watermark='x'", stop=("--draft",)
    )


def test_images_of_several_prompts_and_samples(here: Path, capsys: pytest.CaptureFixture) -> None:
    Path("prompts.txt").write_text('one\ntwo\n{"odd": 1}three{"reference_path": "image.png"}\n')
    argv = ("--prompt-path", "prompts.txt", "--num-sample", "2", "--num-frames", "1", "--start-index", "1")
    check_continued(capsys, *argv, "--end-index", "2", "--batch-size", "2", "--preview")


def test_prompts_with_references_of_their_own(here: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ("--prompt", "a", 'b{"reference_path": "clip.mp4", "mask_strategy": "0,0,0,0,5,0.5"}', "c")
    check_continued(capsys, *argv, "--reference-path", "", "", "image.png", "--mask-strategy", "", "", "0")


def test_a_draft_takes_a_third_of_the_steps_and_says_so(
    here: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="opensora"):
        make("--prompt", "rain", "--draft", "--num-sampling-steps", "10", "--preview")
    assert "drafts stop after 3 of 10 steps" in caplog.text
    assert capsys.readouterr().out.split() == [
        "out/sample_0000.draft.mp4", "out/sample_0000.draft.preview.png", "out/sample_0000.draft.safetensors",
    ]  # fmt: skip
    recipe = read_recipe("out/sample_0000.draft.mp4")
    assert recipe["draft"] == {"steps": 3, "of": 10} and recipe["output"]["num_frames"] == 17
    assert main(["replay", "out/sample_0000.draft.mp4", "--save-dir", "again"]) == 0
    assert "identical" in capsys.readouterr().out


def test_a_draft_moves_with_its_folder_and_is_finished_there(here: Path, capsys: pytest.CaptureFixture) -> None:
    make("--prompt", "rain", "--num-frames", "1")
    image = read_image("out/sample_0000.png")
    make("--prompt", "rain", "--num-frames", "1", "--draft")
    Path("elsewhere").mkdir()
    Path(state()).rename("elsewhere/best.safetensors")
    shutil.rmtree("out")
    assert main(["continue", "elsewhere/best.safetensors", "elsewhere/best.safetensors", "--preview"]) == 0
    assert sorted(tree(Path("elsewhere"))) == [
        "best.safetensors", "sample_0000.json", "sample_0000.png", "sample_0000.preview.png",
    ]  # fmt: skip
    assert np.array_equal(read_image("elsewhere/sample_0000.png"), image)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--steps-until", "6"), "a draft after 6 steps is the whole: the sampler takes 6; stop after 1 to 5"),
        (("--draft", "--num-sampling-steps", "1"), "takes 1; take more with --num-sampling-steps"),
        (("--draft", "--steps-until", "2"), "give one of the two"),
        (("--steps-until", "0"), "steps_until must be at least 1"),
        (
            ("--steps-until", "3", "--cfg-options", SCHEDULER % SCHEDULERS["singlestep"]),
            "the sampler takes 3; stop after 1 to 2",
        ),
    ],
)
def test_stops_that_cannot_be(here: Path, capsys: pytest.CaptureFixture, argv: tuple[str, ...], message: str) -> None:
    assert run_script(SAMPLE, *SMALL, "--save-dir", "out", "--prompt", "x", *argv) == 1
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_plan_of_a_draft_counts_its_steps_alone(here: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ("plan", "x", "--model", SAMPLE, *SMALL, "--num-frames", "34", "--loop", "3")
    assert main([*argv, "--draft"]) == 0
    printed = capsys.readouterr().out
    assert "note: stops after 2 of 6 steps of the first clip, to be continued" in printed and ": 34 frames" in printed


@pytest.fixture(scope="module")
def with_draft(media: Path, filled_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the draft of an image, its reference, and the model it was made of."""
    folder = tmp_path_factory.mktemp("draft")
    shutil.copytree(media, folder, dirs_exist_ok=True)
    shutil.copytree(snapshot(filled_cache, "model"), folder / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        use_cache(filled_cache, patch)
        make("--prompt", "a cat", "--num-frames", "1", "--steps-until", "2", "--ckpt-path", "weights",
             "--reference-path", "image.png", "--mask-strategy", "0,0,0,0,1,0.5")  # fmt: skip
    return folder


@pytest.fixture
def drafted(here: Path, with_draft: Path) -> Path:
    """The draft in a copy of its folder, which a test may change."""
    shutil.copytree(with_draft, here, dirs_exist_ok=True)
    return Path(state())


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    before = tree(Path("out"))
    assert main(["continue", *argv]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.splitlines()[-1].startswith("error: ") and tree(Path("out")) == before
    return error.splitlines()[-1]


def change_weights(folder: str) -> None:
    tensors, name = load_file(f"{folder}/model.safetensors"), "final_layer.linear.bias"
    save_file({**tensors, name: tensors[name] + 1}, f"{folder}/model.safetensors")


def test_other_weights_are_refused(drafted: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree("weights", "other")
    change_weights("other")
    assert "was made with other model weights, sha256" in refused(capsys, str(drafted), "--ckpt-path", "other")
    shutil.move("weights", "moved")
    assert main(["continue", str(drafted), "--ckpt-path", "moved"]) == 0
    assert read_recipe("out/sample_0000.png")["settings"]["model"]["from_pretrained"] == "weights"


def test_weights_changed_in_their_place_are_refused(drafted: Path, capsys: pytest.CaptureFixture) -> None:
    change_weights("weights")
    assert "was made with other model weights" in refused(capsys, str(drafted))


def test_a_changed_reference_is_refused(drafted: Path, capsys: pytest.CaptureFixture) -> None:
    write_image(np.zeros((32, 40, 3), np.uint8), "image.png")
    assert "reference 'image.png' is not what it was" in refused(capsys, str(drafted))
    Path("image.png").unlink()
    assert "reference 'image.png'" in refused(capsys, str(drafted))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--cfg-scale", "3"), "scheduler.cfg_scale was 7.0 for the draft and is 3.0 now"),
        (("--num-sampling-steps", "30"), "scheduler.num_sampling_steps was 6 for the draft and is 30 now"),
        (
            ("--cfg-options", "scheduler={'type': 'iddpm'}"),
            "scheduler.type was 'rflow' for the draft and is 'iddpm' now",
        ),
        (("--cfg-options", "scheduler.scale=2.0"), "scheduler.scale was None for the draft and is 2.0 now"),
        (("--image-size", "24", "16"), "image_size was (16, 24) for the draft and is (24, 16) now"),
        (("--num-frames", "17"), "num_frames was"),
        (("--seed", "7"), "seed was 42 for the draft and is 7 now"),
        (("--prompt", "a dog"), "prompt was ['a cat'] for the draft and is ['a dog'] now"),
        (("--dtype", "bf16"), "dtype was 'fp32' for the draft and is 'bf16' now"),
        (("--loop", "2"), "loop was 1 for the draft and is 2 now"),
        (("--draft",), "draft was False for the draft and is True now"),
    ],
)
def test_other_settings_are_refused(
    drafted: Path, capsys: pytest.CaptureFixture, argv: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, str(drafted), *argv)


def test_the_same_settings_may_be_said_again(drafted: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ("--cfg-scale", "7.0", "--image-size", "16", "24", "--prompt", "a cat", "--num-frames", "1")
    assert main(["continue", str(drafted), *argv, "--offline", "--device", "cpu"]) == 0


def test_damaged_drafts_are_refused(drafted: Path, capsys: pytest.CaptureFixture) -> None:
    whole = drafted.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        drafted.write_bytes(whole[:size])
        assert "truncated, damaged" in refused(capsys, str(drafted))
    for place in (len(whole) - 1, len(whole) - 300, whole.index(b"a cat")):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        drafted.write_bytes(bytes(damaged))
        assert "is damaged, or was changed after it was written" in refused(capsys, str(drafted))
    drafted.unlink()
    assert "no such draft" in refused(capsys, str(drafted))
    for other in ("weights/model.safetensors", "image.png"):
        assert other in refused(capsys, other)


def forge(file: Path, change: dict[str, object], **tensors: torch.Tensor) -> None:
    """Changes what a draft says of itself, and seals it again."""
    told, held = json.loads(read_metadata(file)[draft.KEY]), {**read_state_dict(file), **tensors}
    recipe = {**told["recipe"], **change.pop("recipe", {})}
    text = json.dumps({**told, **change, "recipe": recipe})
    save_file(held, file, {draft.KEY: text, draft.DIGEST: draft._digest(text, held)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "a newer program wrote this draft"),
        ({"num_steps": 9}, "was made by 9 steps on latents"),
        ({"recipe": {"encoded_prompts": ["a dog"]}}, "encoded_prompts was ['a dog'] for the draft and is"),
        ({"recipe": {"weights": {"model": "0" * 64}}}, "was made with other model weights, sha256 000000000000; give"),
    ],
)
def test_what_changed_since_is_found(
    drafted: Path, capsys: pytest.CaptureFixture, change: dict[str, object], message: str
) -> None:
    forge(drafted, dict(change))
    assert message in refused(capsys, str(drafted))


def test_latents_of_another_size_are_refused(drafted: Path, capsys: pytest.CaptureFixture) -> None:
    forge(drafted, {}, x=torch.zeros(1, 4, 1, 4, 4))
    assert "was made by 6 steps on latents [4, 1, 4, 4], but its settings now mean" in refused(capsys, str(drafted))


def test_another_version_is_told(drafted: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = {**read_recipe("out/sample_0000.draft.png")["program"], "torch": "1.0"}
    forge(drafted, {"recipe": {"program": program}})
    assert main(["continue", str(drafted)]) == 0
    assert "the rest may not be what it would have been: torch 1.0 then" in caplog.text


def test_two_drafts_of_one_name_are_not_finished_into_one_file(drafted: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copy(drafted, "out/other.safetensors")
    assert "would both become out/sample_0000; move one" in refused(capsys, str(drafted), "out/other.safetensors")


def test_one_bad_draft_of_several_stops_all(drafted: Path, capsys: pytest.CaptureFixture) -> None:
    Path("bad.safetensors").write_bytes(drafted.read_bytes()[:-5])
    assert "bad.safetensors" in refused(capsys, str(drafted), "bad.safetensors")


def test_nothing_is_unpickled_and_a_draft_is_one_whole_file(drafted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_args, **_options: pytest.fail("unpickles"))
    found = draft.load(drafted)
    assert found.state.step == 2 and content_hash({"x": found.state.x})
    monkeypatch.setattr("opensora.checkpoints.save.save_safetensors", lambda *_args, **_options: 1 / 0)
    before = tree(Path("out"))
    with pytest.raises(ZeroDivisionError):
        draft.save(Path("out/new.safetensors"), "new", found.recipe, found.state, found.generator, "cpu")
    assert tree(Path("out")) == before
    monkeypatch.setattr(
        "opensora.checkpoints.save.save_safetensors", lambda *_args, **_options: Path("/missing/x").touch()
    )
    with pytest.raises(WeightsError, match="cannot be written"):
        draft.save(Path("out/new.safetensors"), "new", found.recipe, found.state, found.generator, "cpu")
