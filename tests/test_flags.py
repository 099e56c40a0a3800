"""Flags mean what they say: exact names, published spellings, what people type, and what is asked back."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from opensora import cli
from opensora.cli.flags import GROUPS, add_flags, flags_of, group_of, option_of
from opensora.cli.parser import PUBLISHED, Parser
from opensora.cli.verbs import VERBS, make_parser
from opensora.config.settings import InferenceSettings, TrainSettings, setting
from opensora.utils.config_utils import inference_parser, parse_inference_args, training_parser
from scripts.misc import eval_conditioning, reproduce_embedded

ROOT = Path(__file__).parents[1]
SAMPLE = "opensora-v1-2/inference/sample"
# Every flag that the five documents of the original publish, for inference and training, and the old spellings.
INFERENCE = [
    "--aspect-ratio", "--batch-size", "--cfg-scale", "--ckpt-path", "--condition-frame-length", "--end-index",
    "--fps", "--image-size", "--loop", "--mask-strategy", "--num-frames",
    "--num-sample", "--num-sampling-steps", "--prompt", "--prompt-as-path", "--prompt-path",
    "--reference-path", "--resolution", "--sample-name", "--save-dir", "--seed", "--start-index", "--cfg",
]  # fmt: skip
TRAINING = ["--batch-size", "--ckpt-path", "--data-path", "--load", "--seed", "--wandb"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[InferenceSettings]:
    """The settings of what `opensora generate` is asked for, which makes nothing."""
    seen: list[InferenceSettings] = []
    monkeypatch.setattr("opensora.cli.verbs.generation.generate", lambda settings: seen.append(settings) or 0)
    return seen


def refused(capsys: pytest.CaptureFixture, *argv: str, code: int = 2) -> str:
    """The one line that a command line is refused with."""
    try:
        assert cli.main(argv) == code
    except SystemExit as end:
        assert end.code == code
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    return error


def taken(parser: argparse.ArgumentParser, flag: str, words: list[str]) -> dict[str, Any]:
    return vars(parser.parse_args(["a.py", flag, *words]))


@pytest.mark.parametrize("spelt", [str, lambda flag: "--" + flag[2:].replace("-", "_")], ids=["dashes", "underscores"])
@pytest.mark.parametrize(
    ("parser", "flag"), [(0, one) for one in INFERENCE] + [(1, one) for one in TRAINING], ids=lambda x: str(x)
)
def test_published_spellings_work(parser: int, flag: str, spelt: Any) -> None:
    made, exact = (inference_parser, training_parser)[parser](), PUBLISHED.get(flag, flag)
    [action] = [one for one in made._actions if exact in one.option_strings]
    count = action.nargs if isinstance(action.nargs, int) else 1
    words = [] if action.const is True and action.nargs == 0 else ["3"] * count
    words = ["True"] if flag == "--wandb" else words
    assert taken(made, spelt(flag), words) == taken(made, exact, words) != vars(made.parse_args(["a.py"]))


@pytest.mark.parametrize("flag", sorted({*INFERENCE, *PUBLISHED} - {"--batch-size"}))
def test_generate_knows_the_spellings_of_the_documents(made: list, flag: str) -> None:
    values = {"--image-size": ["64", "64"], "--prompt-as-path": [], "--aspect-ratio": ["1:1"]}
    assert cli.main(["generate", "a b", "--model", SAMPLE, flag.replace("-", "_").replace("__", "--", 1),
                     *values.get(flag, ["1"])]) == 0  # fmt: skip
    assert len(made) == 1


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("--widht", "--width"), ("--heigth", "--height"), ("--num-frame", "--num-frames"), ("--promt", "--prompt"),
        ("--seeds", "--seed"), ("--cfg-scal", "--cfg-scale"), ("--guidance-scal", "--guidance-scale"),
        ("--num_inference_step", "--num-inference-steps"), ("--ckpt", "--ckpt-path"), ("--sav-dir", "--save-dir"),
        ("--step", "--steps"), ("--imagesize", "--image-size"), ("--resoluton=240p", "--resolution"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["generate", "plan"])
def test_an_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture, verb: str, wrong: str, meant: str) -> None:
    line = refused(capsys, verb, "a cat", wrong, *([] if "=" in wrong else ["3"]))
    assert f"unknown flag {wrong.partition('=')[0]}; did you mean '{meant}'?" in line


@pytest.mark.parametrize("flag", ["--outputs", "--data-path", "--lr", "--load", "--wandb", "--epochs", "--ckpt-every"])
def test_generate_takes_no_flag_of_training(capsys: pytest.CaptureFixture, flag: str) -> None:
    assert f"unknown flag {flag}" in refused(capsys, "generate", "a cat", flag, "1")


@pytest.mark.parametrize("flag", ["--prompt", "--num-sampling-steps", "--steps", "--save-dir", "--loop", "--width"])
@pytest.mark.parametrize("verb", ["train", "train-vae"])
def test_training_takes_no_flag_of_inference(capsys: pytest.CaptureFixture, verb: str, flag: str) -> None:
    assert f"unknown flag {flag}" in refused(capsys, verb, "embedded/train/stdit3", flag, "1")


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["--steps", "10"], {"num_sampling_steps": 10}),
        (["--num-inference-steps", "11"], {"num_sampling_steps": 11}),
        (["--num_inference_steps=12"], {"num_sampling_steps": 12}),
        (["--guidance-scale", "3.5"], {"cfg_scale": 3.5}),
        (["--guidance_scale", "4"], {"cfg_scale": 4.0}),
        (["--cfg", "5"], {"cfg_scale": 5.0}),
        (["--width", "640", "--height", "480"], {"image_size": (480, 640)}),
        (["--height=48", "--width=64"], {"image_size": (48, 64)}),
        (["--size", "640x480"], {"image_size": (480, 640)}),
        (["--size", "854X480"], {"image_size": (480, 854)}),
        (["--loops", "2"], {"loop": 2}),
    ],
)
def test_what_people_type(made: list[InferenceSettings], argv: list[str], changes: dict[str, Any]) -> None:
    assert cli.main(["generate", "a cat", *argv]) == 0
    [settings] = made
    assert {name: getattr(settings, name, settings.scheduler.get(name)) for name in changes} == changes
    assert settings.steps_until is None and settings.outputs is None
    parsed = parse_inference_args(["embedded", "--prompt", "a cat", *argv])
    assert (parsed.image_size, parsed.scheduler, parsed.loop) == (
        settings.image_size,
        settings.scheduler,
        settings.loop,
    )


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--width", "640"], "--width is half a size; give --height as well, or --size WxH"),
        (["--height", "480"], "--height is half a size; give --width as well"),
        (["--size", "640"], "--size is '640'; write width x height"),
        (["--size", "640x"], "write width x height"),
        (["--size", "640x480x3"], "write width x height"),
        (["--size", "-64x64"], "write width x height"),
        (["--size", "9" * 5000 + "x1"], "write width x height"),
        (["--size", "64x64", "--image-size", "64", "64"], "--size sets the size, and so does another flag"),
        (["--size", "64x64", "--width", "64", "--height", "64"], "--size sets the size, and so does another"),
        (["--width", "64", "--height", "64", "--image-size", "64", "64"], "--width sets the size, and so does"),
    ],
)
def test_a_size_is_said_once_and_whole(capsys: pytest.CaptureFixture, argv: list[str], problem: str) -> None:
    assert problem in refused(capsys, "generate", "a cat", *argv, code=1)


@pytest.mark.parametrize(
    "words", ["a red circle moving right", "two cats", "sunset 4k", "a red circle on 3 boxes", "привет мир"]
)
@pytest.mark.parametrize("flag", [[], ["--prompt"]], ids=["by place", "by flag"])
@pytest.mark.parametrize("verb", ["generate", "plan", "benchmark"])
def test_a_prompt_without_its_quotes_is_asked_back(
    capsys: pytest.CaptureFixture, made: list, verb: str, flag: list[str], words: str
) -> None:
    line = refused(capsys, verb, *flag, *words.split(), code=1)
    assert f'type "{words}"' in line and f"{len(words.split())} prompts of one word each" in line
    assert made == []


@pytest.mark.parametrize(
    ("argv", "prompts"),
    [
        (["a cat", "a dog"], ["a cat", "a dog"]),
        (["cat", "a dog"], ["cat", "a dog"]),
        (["cat"], ["cat"]),
        (["--prompt", "cat", "--prompt", "dog"], ["cat", "dog"]),
        (["a cat", "--prompt", "a dog", "a cow", "--prompt", "pig"], ["a cat", "a dog", "a cow", "pig"]),
        (["207", "360"], ["207", "360"]),  # numbers of classes
        (["--prompt", "0", "7"], ["0", "7"]),
    ],
)
def test_several_prompts_stay_possible(made: list[InferenceSettings], argv: list[str], prompts: list[str]) -> None:
    assert cli.main(["generate", *argv]) == 0 and made[0].prompt == prompts


@pytest.mark.parametrize(
    ("argv", "name", "values"),
    [
        (["--lora", "a", "--lora", "b:0.5"], "lora", ["a", "b:0.5"]),
        (["--lora", "a", "b", "--seed", "3", "--lora=c"], "lora", ["a", "b", "c"]),
        (["--lora", "a"], "lora", ["a"]),
        (["--prompt", "a cat", "--prompt", "a dog"], "prompt", ["a cat", "a dog"]),
        (["--image-size", "64", "64", "--image-size", "48", "80"], "image_size", (48, 80)),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--cfg-options", "loop=2", "--cfg-options", "fps=8"], "loop", 2),
        (["--cfg-options", "loop=2", "--cfg-options", "fps=8"], "fps", 8),
    ],
)
def test_a_repeated_flag_of_several_values_adds(argv: list[str], name: str, values: Any) -> None:
    prompt = [] if "--prompt" in argv else ["--prompt", "a cat"]
    assert getattr(parse_inference_args(["embedded", *prompt, *argv]), name) == values


def test_a_repeated_flag_replaces_its_default_once() -> None:
    default = ["auto"]
    parser = Parser()
    parser.group("devices").add_argument("--devices", nargs="+", default=default)
    for argv, found in (
        ([], ["auto"]),
        (["--devices", "cpu"], ["cpu"]),
        (["--devices", "a", "--devices", "b"], ["a", "b"]),
    ):
        assert parser.parse_args(argv).devices == found
    assert default == ["auto"]


def test_flags_of_the_evaluation_and_of_the_stages_may_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    jobs = eval_conditioning._parser().parse_args
    assert jobs(["--jobs", "text", "--jobs", "edit", "loop"]).jobs == ["text", "edit", "loop"]
    assert jobs([]).jobs == tuple(eval_conditioning.JOBS)
    monkeypatch.setattr(reproduce_embedded, "run", lambda command: 0)
    assert reproduce_embedded.main(["--outputs", str(tmp_path), "--stages", "vae_2d", "--stages", "text_encoder"]) == 0
    assert capsys.readouterr().out == "text_encoder: running\nvae_2d: running\n"


def test_programs_of_the_documents_take_single_words_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_inference_args([SAMPLE, "--prompt", "a", "cat"]).prompt == ["a", "cat"]
    assert "2 prompts of one word each make 2 results; quote" in caplog.text


@pytest.mark.parametrize("argv", [["--seed", "-1"], ["--seed=-1"], ["--cfg-options", "seed=-1"]])
def test_a_seed_is_drawn_said_and_kept(made: list, caplog: pytest.LogCaptureFixture, argv: list[str]) -> None:
    with caplog.at_level("INFO", "opensora"):
        for _ in range(2):
            assert cli.main(["generate", "a cat", *argv]) == 0
    seeds = [settings.seed for settings in made]
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**31 for seed in seeds)
    assert [f"seed {seed} was drawn" in caplog.text for seed in seeds] == [True, True]


def test_ranks_would_draw_other_seeds(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "would differ between ranks" in refused(capsys, "generate", "a cat", "--seed", "-1", code=1)


@pytest.mark.parametrize("number", [2, 4, 64])
def test_a_batch_size_says_that_it_changes_nothing(made: list, caplog: pytest.LogCaptureFixture, number: int) -> None:
    assert cli.main(["generate", "a cat", "--batch-size", str(number)]) == 0
    assert not caplog.text
    assert "denoised together" in _help("--help-all")


def _help(flag: str = "--help", verb: str = "generate") -> str:
    parser = make_parser()._subparsers._group_actions[0].choices[verb].complete()
    return parser.format_help(everything=flag == "--help-all")


def _options(text: str) -> list[str]:
    """The flags that a help lists, one for each entry."""
    return re.findall(r"^  (?:-\w(?: \w+)?, )?(--[\w-]+)", text, re.MULTILINE)


def test_every_flag_of_generate_is_in_one_group() -> None:
    names = [name for group in GROUPS.values() for name in group if name is not ...]
    assert len(names) == len(set(names))
    for flag in flags_of(InferenceSettings):
        assert flag.name in names, f"{flag.name} belongs to no group of --help"
    text = _help("--help-all")
    titles = [line[:-1] for line in text.splitlines() if re.fullmatch(r"[a-z ]+:", line)]
    assert titles == ["options", *GROUPS]
    listed = _options(text)
    assert len(listed) == len(set(listed)) > 60
    positions = {title: text.index(f"\n{title}:") for title in GROUPS}
    for title, group in GROUPS.items():
        for name in group:
            if name is not ... and option_of(name) in listed:
                place = re.search(rf"^  .*{option_of(name)}(?![\w-])", text, re.MULTILINE).start()
                assert max((at, one) for one, at in positions.items() if at < place)[1] == title, name


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"models", "inspect"}))
def test_every_help_names_its_default(verb: str) -> None:
    text = _help("--help-all", verb)
    entries = re.split(r"^  (?=-)", text, flags=re.MULTILINE)[1:]
    for entry in entries:
        words = " ".join(entry.split("\n\n")[0].split())
        if (
            not words.startswith(("-h", "--help-all"))
            and "{safetensors" not in words
            and "--config CONFIG" not in words
        ):
            assert "[" in words and words.endswith("]"), words


def test_help_shows_the_common_flags_and_their_values(capsys: pytest.CaptureFixture) -> None:
    short, everything = _options(_help()), _options(_help("--help-all"))
    assert set(short) < set(everything) and len(short) < 45
    assert {"--guidance-interval", "--cache", "--linear"} <= set(everything) - set(short)
    text = _help()
    assert "--image-size H W" in text and "IMAGE_SIZE" not in text and "random seed [42]" in " ".join(text.split())
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "--help-all"])
    assert end.value.code == 0 and "--guidance-interval FROM TO" in capsys.readouterr().out


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"models", "doctor", "serve"}))
def test_a_verb_alone_says_what_to_type(capsys: pytest.CaptureFixture, verb: str) -> None:
    line = refused(capsys, verb, code=1 if verb in ("generate", "plan", "benchmark") else 2)
    assert f"type: {VERBS[verb].example}" in line


@pytest.mark.parametrize("example", [verb.example for verb in VERBS.values()])
def test_what_is_told_to_be_typed_is_understood(example: str) -> None:
    assert make_parser().parse_args(shlex.split(example)[1:]).run


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["-o", "out/a.mp4"], "output", "out/a.mp4"),
        (["-oa.png"], "output", "a.png"),
        (["--output", "a.mp4"], "output", "a.mp4"),
        (["--negative-prompt", "blurred, dark"], "negative_prompt", "blurred, dark"),
        (["--negative_prompt=dark"], "negative_prompt", "dark"),
        (["--overwrite"], "overwrite", True),
    ],
)
def test_flags_come_with_their_fields(argv: list[str], name: str, value: Any) -> None:
    """As soon as settings have them."""
    fields = [("output", "str | None", setting(None, "x")), ("negative_prompt", "str | None", setting(None, "x"))]
    fields += [("overwrite", "bool", setting(False, "x", nargs=0))]
    known = {field.name for field in dataclasses.fields(InferenceSettings)}
    fields = [field for field in fields if field[0] not in known]
    kind = dataclasses.make_dataclass("Later", fields, bases=(InferenceSettings,), frozen=True, kw_only=True)
    parser = Parser()
    add_flags(parser, kind, scripts=False)
    assert vars(parser.parse_args(argv))[name] == value and group_of(name)


def test_settings_of_training_have_their_own_flags() -> None:
    names = {flag.name for flag in flags_of(TrainSettings)}
    assert {"lr", "load", "outputs"} <= names and not names & {"prompt", "save_dir", "num_sampling_steps"}
