"""Command lines of the three versions: their flags, how they change a configuration, and what programs read from it."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from opensora import registry
from opensora.cli.merge import merge
from opensora.config import find_config
from opensora.config.legacy import OF_NO_EFFECT
from opensora.config.settings import InferenceSettings, TrainSettings
from opensora.errors import ConfigError
from opensora.pipeline.prompts import load_prompts
from opensora.pipeline.request import make_requests
from opensora.utils.config_utils import inference_parser, training_parser
from tests.parity.cases import ROOT

NEWEST, OLDER = "v1.2.0", ("v1.1.0", "v1.0.0")
RECORDED = json.loads((ROOT / "data" / "config.json").read_text())
FILES = json.loads((Path(__file__).parent / "data" / "data" / "config_files.json").read_text())
REPOSITORY = Path(__file__).parents[2]
FLAG_SECTIONS = ("flags_inference", "flags_training")
SECTIONS_HERE = {*FLAG_SECTIONS, "merge_cases", "config_keys_read_by_program"}
# What the other sections wait for.
SECTIONS_ELSEWHERE = {
    "experiment_folder": "test_training; 1.0's names with F16S3 are superseded by 1.1's",
    "checkpoint_folder": "test_training; reading older folders comes with resuming from them",
    "training_config_file": "comes with the training issue: a run does not write its configuration yet",
    "known_pretrained_names": "comes with downloading single files by name",
    "sharded_folder_layout": "comes with resuming from older folders",
}
FLAGS = {(section, flag["flag"]): flag for section in FLAG_SECTIONS for flag in RECORDED[NEWEST][section]}
FLAG_NAMES = {flag for _, flag in FLAGS}

PYTHON_TYPES = {
    "int": ("3", 3),
    "str": ("x", "x"),
    "float": ("1.5", 1.5),
    "str2bool": ("yes", True),
    "bool": ("1", True),
}
# What older programs wrote into every configuration. Here the same is the default of the settings.
DEFAULTS_WRITTEN = {
    "loop": 1, "num_sample": 1, "prompt_as_path": False, "reference_path": None, "sample_name": None,
    "multi_resolution": False, "start_from_scratch": False,
}  # fmt: skip
# Older command lines that mean here what they mean in 1.2.
AS_IN_NEWEST = {
    ("v1.1.0", "--num-frames 16"): {"num_frames": "16"},  # durations are texts until they are used
    ("v1.1.0", "--num-frames 2s"): {"num_frames": "2s"},
    ("v1.1.0", "--resolution 480p"): {"resolution": "480p"},
    ("v1.1.0", "--frame-interval 2"): {"frame_interval": 2},
    ("v1.1.0", "--flash-attn false"): {"model.enable_flash_attn": False},
    ("v1.1.0", "--lr 1"): {"lr": 1.0},
    ("v1.0.0", "--num-frames 16"): {"num_frames": "16"},
    ("v1.0.0", "--num-sampling-steps 5"): {"scheduler.num_sampling_steps": 5},  # C6: ignored by 1.0
    ("v1.0.0", "--prompt a"): {"prompt": ["a"]},  # C6: 1.0 took it for --prompt-path
}
# Keys at the top level of 1.0's training files, which go into `dataset` or say nothing that is not the default.
DATA_KEYS = {"data_path", "root", "frame_interval", "use_image_transform"}
MISSPELT_KEYS = {"start_from_scratch "}  # by 1.2's profiling program
DEFAULTS_HERE = {
    ("scripts/train_vae.py", "lr"): 1e-4,  # that of all training; every shipped file sets it
    ("scripts/inference_vae.py", "save_dir"): "./samples",  # that of all inference
}


def cases(*versions: str) -> list[Any]:
    """(version, merge case) of the versions, as parameters."""
    return [
        pytest.param(version, case, id=f"{version}-{' '.join(case['argv'])[:60]}")
        for version in versions
        for case in RECORDED[version]["merge_cases"]
    ]


def kind_of(training: bool) -> type[InferenceSettings] | type[TrainSettings]:
    return TrainSettings if training else InferenceSettings


def parser_of(training: bool) -> argparse.ArgumentParser:
    return training_parser() if training else inference_parser()


def test_every_section_is_covered_somewhere():
    assert set(RECORDED) == {NEWEST, *OLDER}
    for version in RECORDED.values():
        assert set(version) <= SECTIONS_HERE | set(SECTIONS_ELSEWHERE)
        assert version["merge_cases"]
    assert set(RECORDED[NEWEST]) >= set(SECTIONS_ELSEWHERE)


@pytest.mark.parametrize("section", FLAG_SECTIONS)
def test_flags(section: str):
    parser = parser_of(section == "flags_training")
    for flag in RECORDED[NEWEST][section]:
        if flag["positional"]:
            assert vars(parser.parse_args(["a.py"]))[flag["dest"]] == "a.py"
            continue
        assert vars(parser.parse_args(["a.py"]))[flag["dest"]] is None  # unset flags leave the file alone (C2)
        if flag["store_true"]:
            words, expected = [], True
        else:
            word, expected = PYTHON_TYPES[flag["type"]]
            words = [word] * (flag["nargs"] or 1) if flag["nargs"] != "+" else [word, word]
            expected = [expected] * len(words) if flag["nargs"] else expected
        assert vars(parser.parse_args(["a.py", flag["flag"], *words]))[flag["dest"]] == expected
        underscored = f"--{flag['flag'][2:].replace('-', '_')}"
        assert vars(parser.parse_args(["a.py", underscored, *words]))[flag["dest"]] == expected


@pytest.mark.parametrize("section", FLAG_SECTIONS)
@pytest.mark.parametrize("version", OLDER)
def test_flags_of_older_versions_are_those_of_the_newest(version: str, section: str):
    for flag in RECORDED[version][section]:
        newest = FLAGS[section, flag["flag"]]
        differing = {key: flag[key] for key in flag if flag[key] != newest[key]}
        # The seed of the file used to lose against 42 (C6); a number of frames is now also a duration.
        assert differing == {"--seed": {"default": 42}, "--num-frames": {"type": "int"}}.get(flag["flag"], {})


def changed(before: Any, after: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> new value for everything that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, Any] = {}
        for key in after:
            found |= changed(before.get(key, ...), after[key], f"{path}.{key}" if path else key)
        return found
    return {} if before == after else {path: after}


def expected_change(case: dict[str, Any]) -> dict[str, Any]:
    """The recorded change without its known bugs."""
    change = dict(case["changed"])
    assert change.pop("config", case["config"]) == case["config"]
    for stray in ("flash_attn", "layernorm_kernel"):  # C3
        change.pop(stray, None)
    for switch in ("prompt_as_path", "start_from_scratch"):  # C2
        if change.get(switch) is False:
            del change[switch]
    if {"False", "false", "0", "no"} & set(case["argv"]) and "--wandb" in case["argv"]:  # C1
        change.pop("wandb", None)
    return change


def accepted_now(argv: list[str]) -> list[str] | None:
    """The recorded spelling of a command line that used to be refused and works here; None for a wrong one."""
    if argv[-1:] == ["--wandb"]:  # the documents say "add --wandb to the command"
        return [*argv, "True"]
    spelled: list[str] = []
    for word in argv:
        if word.replace("_", "-") in FLAG_NAMES:  # the documents use both spellings
            spelled.append(word.replace("_", "-"))
        elif word.startswith("-") and word[1:2].isdigit() and "," in word:  # C8
            spelled.append(f"{spelled.pop()}={word}")
        else:
            spelled.append(word)
    return spelled if spelled != argv else None


def merged(version: str, case: dict[str, Any], argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the recorded configuration with the flags of `argv`, what they change in it)."""
    config = FILES[version][case["config"]]
    after = merge(config, parser_of(case["training"]).parse_args([case["config"], *argv]))
    return after, changed(config, after)


@pytest.mark.parametrize(("version", "case"), cases(NEWEST))
def test_merge(version: str, case: dict[str, Any]):
    assert set(case) <= {"config", "training", "argv", "changed", "error", "exit_code"}
    if case.get("error") == "FileNotFoundError":
        with pytest.raises(ConfigError, match="does not exist"):
            find_config(case["config"])
        return
    same_as = accepted_now(case["argv"])
    if "error" not in case:
        assert merged(version, case, case["argv"])[1] == expected_change(case)
    elif same_as:
        change = merged(version, case, case["argv"])[1]
        assert change == merged(version, case, same_as)[1] != {}
    else:
        with pytest.raises((SystemExit, ConfigError)) as failure:
            merged(version, case, case["argv"])
        assert ("exit_code" in case) == (failure.type is SystemExit)


@pytest.mark.parametrize(("version", "case"), cases(*OLDER))
def test_merge_of_older_versions(version: str, case: dict[str, Any]):
    config, change = merged(version, case, case["argv"])
    settings = kind_of(case["training"]).from_config(config, case["config"])
    command = (version, " ".join(case["argv"]))
    if command in AS_IN_NEWEST:
        assert change == AS_IN_NEWEST[command]
        return
    expected = expected_change(case)
    written = {name for name, value in DEFAULTS_WRITTEN.items() if expected.get(name, ...) is value}
    assert all(getattr(settings, name) in (DEFAULTS_WRITTEN[name], None) for name in written if hasattr(settings, name))
    expected = {name: value for name, value in expected.items() if name not in written}
    prompts = expected.pop("prompt", None)  # the ones to use, read from the file and sliced
    if isinstance(prompts, list):
        assert [request.prompt for request in make_requests(settings)] == prompts
        assert change.pop("prompt")[settings.start_index : settings.end_index] == prompts
    elif prompts:
        assert len(load_prompts(REPOSITORY / settings.prompt_path)) == prompts["<list of lines from prompt_path>"]
    assert change == expected


def test_no_listed_command_is_gone():
    recorded = {
        (version, " ".join(case["argv"])): case for version in OLDER for case in RECORDED[version]["merge_cases"]
    }
    for command, change in AS_IN_NEWEST.items():
        assert "error" in recorded[command] or expected_change(recorded[command]) != change


@pytest.mark.parametrize(
    ("version", "program"),
    [(version, program) for version in RECORDED for program in RECORDED[version]["config_keys_read_by_program"]],
)
def test_keys_that_programs_read(version: str, program: str):
    """All are settings, with the recorded default."""
    read = RECORDED[version]["config_keys_read_by_program"][program]
    settings = {field.name: field.default for field in fields(kind_of("inference" not in program))}
    names = {*read["optional_with_default"], *read["read_without_default"]}
    unknown = names - settings.keys() - OF_NO_EFFECT.keys() - MISSPELT_KEYS
    assert unknown == (DATA_KEYS if (version, program) == ("v1.0.0", "scripts/train.py") else set())
    for name, default in read["optional_with_default"].items():
        if name not in settings or default == "<computed>":
            continue
        if isinstance(default, dict):
            assert settings[name] in default["several_defaults_in_use"]
        else:
            assert settings[name] == DEFAULTS_HERE.get((program, name), default)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"model": {"type": "STDiT3", "enable_flashattn": True}},
            {"model": {"type": "STDiT3", "enable_flash_attn": True}},
        ),
        ({"scheduler": {"type": "dmp-solver"}}, {"scheduler": {"type": "dpm-solver"}}),
        ({"multi_resolution": True}, {"multi_resolution": "PixArtMS"}),
        ({"multi_resolution": False}, {}),
        ({"num_frames": "51"}, {"num_frames": 51}),
        ({"reference_path": ["a.png", None]}, {"reference_path": ["a.png", ""]}),
        ({"mask_strategy": [None, "0"]}, {"mask_strategy": ["", "0"]}),
    ],
    ids=str,
)
def test_old_spelling_of_inference(old: dict[str, Any], new: dict[str, Any]):
    rest = {"model": {"type": "STDiT3"}, "num_frames": 16}
    settings = [InferenceSettings.from_config({**rest, **config}, "a.py") for config in (old, new)]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("part", ["", "quarter_", "image_"])
@pytest.mark.parametrize("place", ["random", "head", "tail", "head_tail"])
def test_old_spelling_of_mask_ratios(part: str, place: str):
    """`mask_head` is a name of 1.1's and 1.2's files for 1.0's model that neither version's training accepts."""
    old = {"mask_no": 0.5, f"mask_{part}{place}": 0.5}
    settings = TrainSettings.from_config({"model": {"type": "STDiT3"}, "mask_ratios": old}, "a.py")
    new = "random" if part + place == "random" else f"{part or 'quarter_'}{place}"
    assert settings.mask_ratios == {"identity": 0.5, new: 0.5}


def test_data_settings_of_1_0_go_into_the_data_set():
    config = FILES["v1.0.0"]["configs/opensora/train/64x512x512.py"]
    settings = TrainSettings.from_config(config, "a.py")
    assert settings.dataset == {
        "type": "VideoTextDataset",
        "data_path": "CSV_PATH",
        "num_frames": 64,
        "frame_interval": 2,
        "image_size": (512, 512),
    }


def test_force_huggingface_is_no_argument_of_a_model():
    section = {"type": "STDiT3-XL/2", "force_huggingface": True, "enable_flash_attn": True, "qk_norm": True}
    assert registry.arguments(section) == {"qk_norm": True}


def test_prompt_file_of_the_command_line_wins_over_prompts_of_the_file():
    name = "configs/pixart/inference/1x512x512.py"
    for version in FILES:
        config = merge(FILES[version][name], inference_parser().parse_args([name, "--prompt_path", "p.txt"]))
        settings = InferenceSettings.from_config(config, name)
        assert (settings.prompt, settings.prompt_path) == (None, "p.txt")
