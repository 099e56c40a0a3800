"""Results and their names: none is replaced unasked, none is lost, each is there with all its parts or not at all."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from opensora.config.settings import InferenceSettings
from opensora.datasets.video import read_image
from opensora.errors import ConfigError, MediaError, WeightsError
from opensora.files import atomic as files
from opensora.files import atomic_create, atomic_write
from opensora.pipeline.output_names import save_path_name
from opensora.pipeline.outputs import Outputs
from opensora.pipeline.recipe import make_recipe, read_recipe
from opensora.pipeline.request import Request
from tests.checkpoints import SAMPLE, run_script, tree

FRAME = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
SETTINGS = InferenceSettings(model={"type": "STDiT3"}, num_frames=1, save_dir="out")
SHA = "0" * 64


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path


def requests(*prompts: str, samples: int = 1) -> list[Request]:
    return [Request(text, (text,), sample, f"out/{text}", 42) for text in prompts for sample in range(samples)]


def recipe(prompt: str) -> dict[str, Any]:
    return make_recipe(prompt, [prompt], 1, 0, settings={}, weights={"model": SHA})


def make(*prompts: str, stops: bool = False, num_frames: int = 1, **settings: Any) -> list[str]:
    """The names under which results of these prompts are written."""
    found = Outputs(replace(SETTINGS, **settings), num_frames, stops)
    placed = found.assign_paths(requests(*prompts, samples=settings.get("num_sample", 1)))
    found.check([one.path for one in placed])
    save = (lambda file, name: file.write_text(name)) if stops else None
    frames = np.repeat(FRAME, num_frames, axis=0)
    return [found.write(one.path, frames, recipe(one.prompt), save).path.name for one in placed]


def names() -> list[str]:
    return sorted(os.listdir("out"))


@pytest.mark.parametrize(
    ("there", "settings", "expected"),
    [
        ([], {}, "sample_0000.png"),
        (["sample_0000.png"], {}, "sample_0001.png"),
        (["sample_0000.mp4"], {}, "sample_0001.png"),
        (["sample_0000.json"], {}, "sample_0001.png"),
        (["sample_0000.draft.safetensors"], {}, "sample_0001.png"),
        (["sample_0000.preview.png"], {}, "sample_0001.png"),
        (["sample_0000-3.png"], {}, "sample_0001.png"),
        (["SAMPLE_0000.PNG"], {}, "sample_0001.png"),
        (["sample_0000"], {}, "sample_0001.png"),
        (["sample_0001.png"], {}, "sample_0000.png"),
        (["sample_0000.png", "sample_0001.png", "sample_0003.png"], {}, "sample_0002.png"),
        (["sample_00000.png", "xsample_0000.png", "sample_0000x.png"], {}, "sample_0000.png"),
        ([f"sample_{n:04d}.png" for n in range(10_001)], {}, "sample_10001.png"),
        (["sample_0000.png"], {"sample_name": "a"}, "a_0000.png"),
        (["a_0000.png"], {"sample_name": "a"}, "a_0001.png"),
        (["Ä_0000.png"], {"sample_name": "a\u0308"}, "a\u0308_0001.png"),
        (["sample_0000.png"], {"num_sample": 2}, "sample_0001-0.png"),
        (["sample_0007.png"], {"start_index": 7}, "sample_0008.png"),
        (["sample_0000.png"], {"start_index": 7}, "sample_0007.png"),
        (["sample_0000.png"], {"overwrite": True}, "sample_0000.png"),
    ],
)
def test_the_next_free_number(there: list[str], settings: dict[str, Any], expected: str) -> None:
    for name in there:
        Path("out", name).write_text("old")
    assert make("a", **settings)[0] == expected
    kept = [name for name in there if not settings.get("overwrite")]
    assert all(Path("out", name).read_text() == "old" for name in kept)


def test_a_run_takes_numbers_that_follow_one_another() -> None:
    assert make("a", "b") == ["sample_0000.png", "sample_0001.png"]
    assert make("c", "d", "e", preview=True) == ["sample_0002.png", "sample_0003.png", "sample_0004.png"]
    Path("out/sample_0006.mp4").touch()
    assert make("f", "g", num_sample=2) == [f"sample_000{n}-{k}.png" for n in (7, 8) for k in (0, 1)]
    assert make("h", stops=True) == ["sample_0005.draft.png"]  # which nobody has taken
    assert Path("out/sample_0005.draft.safetensors").read_text() == "sample_0005"
    assert [read_recipe(f"out/sample_000{n}.png")["prompt"] for n in range(5)] == list("abcde")


@pytest.mark.parametrize("settings", [{}, {"num_sample": 2}, {"preview": True}])
def test_names_taken_meanwhile(settings: dict[str, Any]) -> None:
    """Two runs that began at the same time: samples of a prompt stay together, nothing is replaced."""
    runs = [Outputs(replace(SETTINGS, **settings), 1, False) for _ in range(2)]
    placed = [one.assign_paths(requests("a", "b", samples=settings.get("num_sample", 1))) for one in runs]
    assert placed[0] == placed[1]
    found = [[], []]
    for pair in zip(*placed, strict=True):
        for run, one in enumerate(pair):
            found[run].append(runs[run].write(one.path, FRAME, recipe(f"{run}{one.prompt}")).path.name)
    numbers = [[int(name[7:11]) for name in made] for made in found]
    assert len({*found[0], *found[1]}) == 2 * len(found[0]) and not {*numbers[0]} & {*numbers[1]}
    assert all(sorted(made) == made and len(set(made)) == 2 for made in numbers)
    assert not [name for name in names() if name.startswith(".")]
    for run, made in enumerate(found):
        assert [read_recipe(f"out/{name}")["prompt"][0] for name in made] == [str(run)] * len(made)


def _many(folder: str, prompt: str) -> None:
    os.chdir(folder)
    for number in range(4):
        make(f"{prompt}{number}", preview=True)


def test_six_processes_write_into_one_folder(here: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_many, args=(str(here), prompt)) for prompt in "abcdef"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    found = {read_recipe(f"out/{name}")["prompt"] for name in names() if name.endswith(".json")}
    assert found == {f"{prompt}{number}" for prompt in "abcdef" for number in range(4)}
    assert len(names()) == 3 * 24 and not [name for name in names() if name.startswith(".")]


@pytest.mark.parametrize(
    "prompts",
    [
        ("a red/circle", "a red_circle"), ("a", "a"), ("a", "b", "a"), ("A cat", "a cat"), ("a\\b", "a/b"),
        ("Straße", "STRASSE"), ("caf\u00e9", "cafe\u0301"), ("..", "__"), ("a\nb", "a\tb"),
    ],
)  # fmt: skip
def test_two_results_with_one_name_are_refused(prompts: tuple[str, ...]) -> None:
    found = Outputs(replace(SETTINGS, prompt_as_path=True), 1, False)
    placed = [
        one._replace(path=save_path_name("out", prompt=one.prompt, prompt_as_path=True)) for one in requests(*prompts)
    ]
    with pytest.raises(ConfigError, match=r"would both be written to out/.*; remove one of them, or --prompt-as"):
        found.assign_paths(placed)


def test_a_preview_and_a_result_of_one_name_are_refused() -> None:
    found = Outputs(replace(SETTINGS, prompt_as_path=True, preview=True), 1, False)
    with pytest.raises(ConfigError, match=r"out/a\.preview\.png"):
        found.assign_paths(requests("a", "a.preview"))


@pytest.mark.parametrize("blocked", ["out/a.json", "out/a.png", "out/a.preview.png"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_where_a_part_belongs_is_told_before_the_work(blocked: str, overwrite: bool) -> None:
    Path(blocked).mkdir()
    found = Outputs(replace(SETTINGS, output="out/a.png", preview=True, overwrite=overwrite), 1, False)
    [request] = found.assign_paths(requests("a"))
    with pytest.raises(MediaError, match=f"{blocked}: is not a file"):
        found.check([request.path])


@pytest.mark.parametrize("part", ["out/a.json", "out/a.png", "out/a.preview.png"])
def test_a_named_file_is_replaced_only_if_asked(part: str, caplog: pytest.LogCaptureFixture) -> None:
    Path(part).write_text("old")
    settings = {"output": "out/a.png", "preview": True}
    with pytest.raises(MediaError, match=f"{part}: already exists.*--overwrite"):
        make("x", **settings)
    assert Path(part).read_text() == "old" and names() == [Path(part).name]
    with caplog.at_level(logging.INFO, "opensora"):
        assert make("x", **settings, overwrite=True) == ["a.png"]
    assert f"replaces {part}" in caplog.text and len(names()) == 3


@pytest.mark.parametrize(
    ("output", "num_frames", "problem"),
    [
        ("a.png", 17, "will hold a video of 17 frames; name it a.mp4"), ("a.mp4", 1, "an image; name it a.png"),
        ("a.avi", 2, "name it a.mp4"), ("a", 2, "name it a.mp4"), ("a.mp4.", 2, "name it"), (".mp4", 2, "name it"),
        ("", 1, "name it"), ("out/", 1, "name it out.png"),
    ],
)  # fmt: skip
def test_a_file_of_the_wrong_kind_is_refused(output: str, num_frames: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Outputs(replace(SETTINGS, output=output), num_frames, False)


def test_a_named_file() -> None:
    assert make("x", output="out/A b.PNG", save_dir="elsewhere") == ["A b.PNG"]
    assert names() == ["A b.PNG", "A b.json"] and read_recipe("out/A b.PNG")["prompt"] == "x"
    with pytest.raises(ConfigError, match="names one file, but 2 results are requested"):
        make("x", "y", output="out/b.png")
    with pytest.raises(ConfigError, match="output and prompt_as_path both name"):
        make("x", output="out/b.png", prompt_as_path=True)
    with pytest.raises(ConfigError, match="UTF-8"):
        make("x", output="out/\udcff.png")


def interrupted(work: Any, at: int) -> bool:
    """Whether `work` ended before a KeyboardInterrupt could be raised at the line `at` of opensora/files/atomic.py.

    Lines that put things in order are not interrupted: there is one handling of signals, which waits for them.
    """
    left = at

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != files.__file__ or frame.f_code.co_name == "_cleared":
            return None
        if event == "line" and not clearing(frame):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    def clearing(frame: FrameType | None) -> bool:
        while frame and frame.f_code.co_name != "_clear":
            frame = frame.f_back
        return frame is not None or sys.exc_info()[0] is not None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(before)
    return True


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kind", ["create", "write", "write without old files"])
def test_an_exception_at_any_line_leaves_all_or_nothing(
    kind: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there after it is the old, or the new as a whole; and nothing else."""
    paths = [Path("out/a.png"), Path("out/a.json"), Path("out/a.safetensors")]

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)

    def work() -> None:
        if kind == "create":
            with atomic_create(*paths, others=iter([[path.with_stem("b") for path in paths]])) as (temporaries, _):
                for one in temporaries:
                    one.write_text("new")
        else:
            with atomic_write(*paths) as temporaries:
                for one in temporaries:
                    one.write_text("new")

    old = {path.name: b"old" for path in paths} if kind != "write without old files" else {}
    added = {path.with_stem("b").name: b"new" for path in paths} if kind == "create" else {}
    new = {**old, **added} if kind == "create" else {path.name: b"new" for path in paths}
    seen, at, done = set(), 0, False
    while not done:
        at += 1
        for path in Path("out").iterdir():
            path.unlink()
        for name, content in old.items():
            Path("out", name).write_bytes(content)
        done = interrupted(work, at)
        found = tree(Path("out"))
        assert found in (old, new), f"line {at}"
        seen.add(found == new)
    assert found == new and at > 20 and False in seen


@pytest.mark.parametrize("part", ["pipeline.output_files.encode_output", "datasets.video.encode_image"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), MediaError("NaN")])
def test_the_old_result_stays_until_all_parts_are_there(
    part: str, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"preview": True, "overwrite": True, "stops": True}
    make("a", **settings)
    before = tree(Path("out"))
    monkeypatch.setattr(f"opensora.{part}", lambda *_: (_ for _ in ()).throw(failure))
    with pytest.raises((MediaError, KeyboardInterrupt)):
        make("b", **settings)
    assert tree(Path("out")) == before and len(before) == 4


ARGV = ("--image-size", "16", "24", "--num-frames", "1", "--num-sampling-steps", "1", "--verbose", "0")


def test_the_script_keeps_its_names_and_says_what_it_replaces(
    hub_cache: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    argv = (SAMPLE, *ARGV, "--save-dir", "out", "--prompt")
    with caplog.at_level(logging.INFO, "opensora"):
        assert run_script(*argv, "a cat") == 0 and "replaces" not in caplog.text
        assert run_script(*argv, "a dog") == 0
    assert caplog.text.count("replaces out/sample_0000.png") == 1
    assert names() == ["sample_0000.json", "sample_0000.png"]
    assert read_recipe("out/sample_0000.png")["prompt"] == "a dog"
    image = read_image("out/sample_0000.png")
    os.unlink("out/sample_0000.json")
    os.mkdir("out/sample_0000.json")
    assert run_script(*argv, "a boat") == 1
    assert "out/sample_0000.json: is not a file" in capsys.readouterr().err
    assert np.array_equal(read_image("out/sample_0000.png"), image)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("I/O error")])
def test_a_draft_that_cannot_be_written_is_named_by_its_result(failure: Exception) -> None:
    def save(file: Path, name: str) -> None:
        raise WeightsError(f"{file}: cannot be written") from failure

    found = Outputs(SETTINGS, 1, True)
    [request] = found.assign_paths(requests("a"))
    with pytest.raises(MediaError, match=r"^out/sample_0000\.draft\.png: cannot be written \((No space|I/O)"):
        found.write(request.path, FRAME, recipe("a"), save)
    assert names() == []
