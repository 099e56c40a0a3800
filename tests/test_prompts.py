"""Prompts that used to fail or to write outside the folder, and the messages of those that still fail."""

from __future__ import annotations

import logging
import os
import random
import re
import time
from pathlib import Path

import pytest

from opensora.errors import ConfigError
from opensora.models.text_encoder import cleaning
from opensora.pipeline import prompts
from opensora.pipeline.output_names import save_path_name


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


@pytest.mark.parametrize(
    "prompt", ["and/or", "/abs", "../../up", "..", ".", "a\\b", "line\nbreak", "x" * 5000, "猫" * 300]
)
def test_a_prompt_as_path_stays_in_its_folder(prompt: str, tmp_path: Path) -> None:
    path = Path(save_path_name(tmp_path, prompt=prompt, prompt_as_path=True, num_sample=2, k=1) + ".mp4")
    path.touch()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.parent == tmp_path


def test_long_prompts_keep_different_names() -> None:
    first, second = (save_path_name("out", prompt="x" * 300 + end, prompt_as_path=True) for end in "ab")
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


@pytest.mark.parametrize(
    ("tail", "told"),
    [
        ('{"mask_strategy": ["0"]}', r"mask_strategy must be a string; it is \['0'\]"),
        ('{"reference_path": 5}', "reference_path must be a string; it is 5"),
        ('{"mask_strategy": 0}', "mask_strategy must be a string; it is 0"),
        ('{"mask_strategy": null}', "mask_strategy must be a string; it is None"),
        ('{"reference_path": {"a": "b.png"}}', "reference_path must be a string"),
        ('{"reference_path": true, "mask_strategy": "0"}', "reference_path must be a string; it is True"),
        ('{"mask_strategy": "0", "mask_strategy": "1"}', "'mask_strategy' twice"),
        ('{"mask_strategy": NaN}', "NaN, which is not valid JSON"),
        ('{"reference_path": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{"reference_path": 1.' + "9" * 4000 + "}", "a number of 4002 digits"),
        ('{"reference_path": ' + "[" * 9000 + "]" * 9000 + "}", "nested|JSON"),
        ('{"reference_path": ' + "[" * 60 + "]" * 60 + "}", "nested more than 50"),
        ('{"reference_path": ' + "[" * 19000, "nested too deep|not JSON"),
    ],
    ids=lambda value: value[:30],
)
def test_a_json_tail_holds_texts_only(tail: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        prompts.split_json(f"a wave.{tail}")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and ("prompt 'a wave" in message or "twice" in message)


@pytest.mark.parametrize(
    "prompt",
    ["{" * 100_000, "x{" + "[" * 100_000, "a cat " * 4000, '{"a":' * 3_000, "{" * 101 + "}" * 101, "{}" * 2_000],
    ids=lambda value: value[:8],
)
def test_long_prompts_are_refused_before_anything_is_looked_for(prompt: str) -> None:
    begin = time.process_time()
    with pytest.raises(ConfigError, match="at most") as caught:
        prompts.split_json(prompt)
    assert time.process_time() - begin < 0.5
    assert len(str(caught.value)) < 300


def test_a_text_is_cut_off_by_nobody_in_silence() -> None:
    with pytest.raises(ConfigError, match="5,001 characters, and at most 5,000"):
        prompts.prepare("|0|a cat|1|" + "x" * 5001)
    assert len(prompts.prepare("|0|a cat|1|" + "x " * 2500)) > 4990


LONG = {
    "dots": ".", "dashes": "a-", "version": "1.", "domain": "a.co", "file": "!.", "size": "1x", "digits": "1",
    "spaces": " ", "no-break spaces": "\xa0", "letters": "a1", "no end": "1" * 9999 + "_", "mixed": "a1a" + "1" * 19990,
    "at": "a.com@", "quotes": "\"'",
}  # fmt: skip


def test_characters_are_fixed_as_ftfy_does() -> None:
    """Printable ASCII is left alone without ftfy, which takes a quarter of a second to import."""
    import ftfy

    rng = random.Random(0)
    plain = [chr(code) for code in range(32, 127)]
    others = ["&amp;", "&lt", "\x1b[1m", "\x00", "é", "Ã©", "’", "ﬁ", "\\u00e9", "<b>"]
    for parts in (plain, [*plain, *others, "\n", "\r\n", "\t"]):
        for _ in range(2000):
            text = "".join(rng.choices(parts, k=rng.randrange(30)))
            assert cleaning._fix_characters(text) == ftfy.fix_text(text)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", LONG.values(), ids=LONG)
def test_cleaning_takes_time_in_proportion_to_the_text(unit: str) -> None:
    text = (unit * (20_000 // len(unit) + 1))[:20_000]
    begin = time.process_time()
    cleaning.clean(f"a {text} b")
    assert time.process_time() - begin < 1.5


PLAIN = [  # the rules as they read, in any amount of time
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{cleaning._DOMAIN})", lambda text: _addresses(text, 0)),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{cleaning._DOMAIN})", lambda text: _addresses(text, 1)),
    (rf"\S+\.{cleaning._FILE_TYPE}", r"(?<!\S)\S+\."),
    (r"\s+\.\s+", r"(?<!\s)\s+"),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d["),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", r"\b\d+(?:\.\d*)?["),
]
PIECES = [
    *"ab1.-_/@x4é\"'#:,%+ \n\xa0 . . ", "12", "..", "  ", "com", ".com", ".co", ".ru", ".org/", ".net@", "http:",
    "https:/", "http://", "https:x", "www:", "www:/", ".png", ".jpeg", "\u0445", "\u4e2d", "3.5", "1080x1920", "a1b2",
    "a1b2c",
]  # fmt: skip


def _addresses(text: str, which: int) -> str:
    return cleaning._without_addresses(text, cleaning._SCHEMES[which])


@pytest.mark.parametrize(("plain", "fast"), PLAIN, ids=[plain[:20] for plain, _ in PLAIN])
def test_fast_rules_find_what_plain_ones_find(plain: str, fast: object) -> None:
    rng = random.Random(0)
    if isinstance(fast, str):
        [(rule, other)] = [(p, r) for p, r in cleaning._CHARACTERS + cleaning._WORDS_AND_SPACING if p.startswith(fast)]
    for _ in range(1500):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12)))
        if isinstance(fast, str):
            assert re.sub(rule, other, text) == re.sub(plain, other, text), text
        else:
            assert fast(text) == re.sub(plain, "", text), text


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "link to a device", "large", "lines", "nothing"])
def test_a_prompt_file_is_a_regular_file_of_bounded_size(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = tmp_path / "prompts.txt", "is not a regular file"
    monkeypatch.setattr(prompts, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(prompts, "MAX_LINES", 10)
    if kind == "folder":
        path.mkdir()
        told = "regular file|directory"
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        path.write_text("x" * 1001)
        told = "larger than 1,000 bytes"
    elif kind == "lines":
        path.write_text("a\n" * 11)
        told = "has 11 lines; give at most 10"
    else:
        told = "No such file"
    with pytest.raises(ConfigError, match=told) as caught:
        prompts.load_prompts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_lines_end_where_editors_end_them(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\na\u2028dog\x0bruns\rb".encode())
    assert prompts.load_prompts(tmp_path / "prompts.txt") == ["a cat", "a\u2028dog\x0bruns", "b"]


@pytest.mark.parametrize("number", ["1000000000000000000", "9" * 5000, "1000001", "1_0", "x", "1.5", ""])
def test_loop_numbers_have_a_bound(number: str) -> None:
    with pytest.raises(ConfigError, match=r"above 1,000,000|must alternate") as caught:
        prompts.split_segments(f"|0|a|{number}|b")
    assert len(str(caught.value)) < 300
