"""Prompts that used to fail or to write outside the folder, and the messages of those that still fail."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from opensora import prompts
from opensora.errors import ConfigError


@pytest.mark.parametrize(
    ("prompt", "text", "info"),
    [
        ('a {b} {"reference_path": "x.png"}', "a {b} ", {"reference_path": "x.png"}),
        ('p.{"reference_path": "x{1}.png"}', "p.", {"reference_path": "x{1}.png"}),
        ('p.{"reference_path": "x{.png"}', "p.", {"reference_path": "x{.png"}),
        ('p {"mask_strategy": "0"} tail', "p  tail", {"mask_strategy": "0"}),
        ('{"mask_strategy": "0"} {"mask_strategy": "1"}', '{"mask_strategy": "0"} ', {"mask_strategy": "1"}),
        ("no braces }", "no braces }", {}),
    ],
)
def test_the_last_json_object_counts(prompt: str, text: str, info: dict[str, str]) -> None:
    assert prompts.split_json(prompt) == (text, info)


@pytest.mark.parametrize(
    "prompt", ["p {", "p {x}", "p {'a': {}}", 'p { {"mask_strategy": "0"}', 'p {"mask_strategy": 0']
)
def test_broken_json_is_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match="not JSON"):
        prompts.split_json(prompt)


def test_unknown_json_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'refrence_path'.*did you mean 'reference_path'"):
        prompts.split_json('p {"refrence_path": "x.png"}')


def test_extract_json_leaves_its_arguments_alone() -> None:
    texts, references = ['p {"reference_path": "x.png"}'], [""]
    assert prompts.extract_json(texts, references, ["0"]) == (["p "], ["x.png"], ["0"])
    assert (texts, references) == (['p {"reference_path": "x.png"}'], [""])


@pytest.mark.parametrize(
    "prompt", ["and/or", "/abs", "../../up", "..", ".", "a\\b", "line\nbreak", "x" * 5000, "猫" * 300]
)
def test_a_prompt_as_path_stays_in_its_folder(prompt: str, tmp_path: Path) -> None:
    path = Path(prompts.save_path_name(tmp_path, prompt=prompt, prompt_as_path=True, num_sample=2, k=1) + ".mp4")
    path.touch()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.parent == tmp_path


def test_long_prompts_keep_different_names() -> None:
    first, second = (prompts.save_path_name("out", prompt="x" * 300 + end, prompt_as_path=True) for end in "ab")
    assert first != second


def test_a_prompt_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        prompts.load_prompts(tmp_path / "missing.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match="UTF-8"):
        prompts.load_prompts(tmp_path / "binary")


def test_segments_that_do_not_alternate() -> None:
    with pytest.raises(ConfigError, match="alternate"):
        prompts.split_segments("|0|a|b")


def test_falling_loop_numbers_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prompts.split_segments("|0|a|2|b")
        assert not caplog.records
        prompts.split_segments("|0|a|3|b|1|c")
    assert "do not rise" in caplog.text


def test_each_text_is_refined_scored_then_cleaned() -> None:
    final = prompts.prepare("|0|A Cat|2|A Dog", aes=6.5, refine=lambda text: f"{text} (Big)")
    assert final == "|0|a cat big aesthetic score: 6.5.|2|a dog big aesthetic score: 6.5."
