"""Command lines of v1.2.0: its flags, and how they change a configuration."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from opensora.config import find_config
from opensora.errors import ConfigError
from opensora.utils.config_utils import inference_parser, merge, training_parser
from tests.parity.cases import ROOT

RECORDED = json.loads((ROOT / "data" / "config.json").read_text())
FILES = json.loads((Path(__file__).parent / "data" / "data" / "config_files.json").read_text())
SECTIONS_HERE = {"flags_inference", "flags_training", "merge_cases"}
SECTIONS_OF_TRAINING = {
    "experiment_folder",
    "training_config_file",
    "checkpoint_folder",
    "known_pretrained_names",
    "config_keys_read_by_program",
    "sharded_folder_layout",
}
FLAG_NAMES = {flag["flag"] for section in ("flags_inference", "flags_training") for flag in RECORDED["v1.2.0"][section]}
VERSIONS_LATER = {"v1.1.0", "v1.0.0"}

PYTHON_TYPES = {
    "int": ("3", 3),
    "str": ("x", "x"),
    "float": ("1.5", 1.5),
    "str2bool": ("yes", True),
    "bool": ("1", True),
}


def test_every_section_is_covered_somewhere():
    assert set(RECORDED) - VERSIONS_LATER == {"v1.2.0"}
    assert set(RECORDED["v1.2.0"]) <= SECTIONS_HERE | SECTIONS_OF_TRAINING
    assert RECORDED["v1.2.0"]["merge_cases"]


def parser_of(training: bool) -> argparse.ArgumentParser:
    return training_parser() if training else inference_parser()


@pytest.mark.parametrize("section", ["flags_inference", "flags_training"])
def test_flags(section: str):
    parser = parser_of(section == "flags_training")
    for flag in RECORDED["v1.2.0"].get(section, []):
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
    assert change.pop("config") == case["config"]
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


@pytest.mark.parametrize("case", RECORDED["v1.2.0"]["merge_cases"], ids=lambda case: " ".join(case["argv"])[:60])
def test_merge(case: dict[str, Any]):
    assert set(case) <= {"config", "training", "argv", "changed", "error", "exit_code"}
    if case.get("error") == "FileNotFoundError":
        with pytest.raises(ConfigError, match="does not exist"):
            find_config(case["config"])
        return
    config = FILES["v1.2.0"][case["config"]]
    parser = parser_of(case["training"])

    def change(argv: list[str]) -> dict[str, Any]:
        return changed(config, merge(config, parser.parse_args([case["config"], *argv])))

    same_as = accepted_now(case["argv"])
    if "error" not in case:
        assert change(case["argv"]) == expected_change(case)
    elif same_as:
        assert change(case["argv"]) == change(same_as) != {}
    else:
        with pytest.raises((SystemExit, ConfigError)) as failure:
            change(case["argv"])
        assert ("exit_code" in case) == (failure.type is SystemExit)
