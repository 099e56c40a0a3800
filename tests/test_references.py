"""References from files: how many frames each has, what is read of them, and what is refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora.datasets.video import write_image, write_video
from opensora.errors import ConfigError, MediaError
from opensora.pipeline import media_reader, references
from opensora.pipeline.references import References, content_hashes, read_reference, read_references

pytestmark = pytest.mark.timeout(60)
SIZE = (16, 24)
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)


def check_references(text: str | None, **options: bool) -> list[int | None]:
    return References(SIZE, **options).check(text)


def test_files(tmp_path):
    picture = write_image(FRAMES[0], tmp_path / "a.png")
    movie = write_video(FRAMES, tmp_path / "b.mp4", fps=8)
    both = f"{picture};{movie}"
    assert check_references(both) == [1, 5]
    shapes = [tuple(one.shape) for one in read_references(both, SIZE)]
    assert shapes == [(3, 1, *SIZE), (3, 5, *SIZE)]
    for nothing in (None, ""):
        assert check_references(nothing) == read_references(nothing, SIZE) == []


def test_a_video_is_read_frame_by_frame_as_if_at_once(tmp_path):
    from opensora.datasets.transforms import resize_crop
    from opensora.datasets.video import read_video

    movie = write_video(FRAMES, tmp_path / "b.mp4", fps=8)
    assert torch.equal(read_reference(str(movie), SIZE), resize_crop(read_video(movie)[0], SIZE))


@pytest.mark.parametrize("text", ["a.png;", ";", ";a.png", "a.png;;b.mp4", " "])
def test_empty_entries(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.mp4"):
        write_image(FRAMES[0], tmp_path / name)
    for function in (check_references, lambda one: read_references(one, SIZE)):
        with pytest.raises(ConfigError, match="empty entry"):
            function(text)


def test_too_many_frames(tmp_path, monkeypatch):
    movie = str(write_video(FRAMES, tmp_path / "b.mp4", fps=8))
    monkeypatch.setattr(media_reader, "MAX_PIXELS", 4 * SIZE[0] * SIZE[1])
    with pytest.raises(MediaError, match="more than 4 frames"):
        read_reference(movie, SIZE)
    monkeypatch.setattr(media_reader, "MAX_FRAMES", 3)
    for function in (check_references, lambda one: read_reference(one, SIZE)):
        with pytest.raises(MediaError, match="more than 3 frames"):
            function(movie)


@pytest.mark.parametrize(
    "part",
    [
        "#hold=1000000000", "#hold=4097", "#first=1000000000000000000", "#last=" + "9" * 5000, "#hold=3#hold=3",
        "#first=2#last=1", "#hold=2" * 2000,
    ],
    ids=lambda part: part[:16],
)  # fmt: skip
def test_parts_without_bound_are_refused_before_anything_is_read(part):
    with pytest.raises(ConfigError, match=r"takes at most 4096 frames|part of a part") as caught:
        check_references(f"nowhere.png{part}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["a.png;" * 10**5 + "a.png", ";" * 1000, ";".join(["a.png"] * 101)], ids=len)
def test_a_prompt_has_a_hundred_references_at_most(text):
    with pytest.raises(ConfigError, match=r"at most 100") as caught:
        check_references(text)
    assert len(str(caught.value)) < 300


def test_a_still_is_held_within_the_pixels_of_a_reference(tmp_path, monkeypatch):
    still = write_image(FRAMES[0], tmp_path / "a.png")
    monkeypatch.setattr(media_reader, "MAX_PIXELS", 4 * SIZE[0] * SIZE[1])
    assert check_references(f"{still}#hold=4") == [4]
    with pytest.raises(MediaError, match=r"#hold=5 is above 4, the most frames of 16x24"):
        check_references(f"{still}#hold=5")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "link", "socket", "nothing", "nul"])
def test_only_regular_files_are_opened(kind, tmp_path):
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))
    elif kind == "nul":
        path = Path("a\0.png")
    told = "no such file" if kind in ("nothing", "nul") else "no such file, but a folder, device or pipe"
    for function in (check_references, content_hashes, lambda one: read_references(one, SIZE)):
        with pytest.raises(MediaError, match=told) as caught:
            function(str(path))
        assert "\n" not in str(caught.value) and "sha" not in str(caught.value)


@pytest.mark.parametrize("part", ["", "#first=2", "#last=3"])
@pytest.mark.parametrize("name", ["a.png", "b.mp4"])
def test_a_reference_is_decoded_once(name, part, tmp_path, monkeypatch):
    path = str(write_image(FRAMES[0], tmp_path / name) if name == "a.png" else write_video(FRAMES, tmp_path / name, 8))
    part = "#hold=5" if name == "a.png" and part else part
    expected, opened = read_reference(f"{path}{part}", SIZE), []
    for function in ("read_image", "iterate_video"):
        real = getattr(media_reader, function)
        count = lambda *args, real=real: opened.append(args) or real(*args)  # noqa: E731
        monkeypatch.setattr(media_reader, function, count)
    held = References(SIZE)
    assert held.check(f"{path}{part};{path}") == [expected.shape[1], 1 if name == "a.png" else 5]
    assert held.counts(f"{path}{part}") == [expected.shape[1]]
    for _ in range(3):
        assert torch.equal(held.read(f"{path}{part}")[0], expected)
    assert len(opened) == 1


def test_what_is_held_has_a_bound(tmp_path, monkeypatch):
    paths = [str(write_image(FRAMES[index], tmp_path / f"{index}.png")) for index in range(4)]
    monkeypatch.setattr(references, "MAX_CACHED_BYTES", 2 * 12 * SIZE[0] * SIZE[1])
    held = References(SIZE)
    for path in paths:
        held.check(path)
    assert list(held._cached) == paths[2:]
    for path in (paths[2], paths[0]):
        assert torch.equal(held.read(path)[0], read_reference(path, SIZE))
    assert list(held._cached) == [paths[2], paths[0]]


@pytest.mark.parametrize(("suffix", "options"), [("gif", {}), ("webp", {"lossless": True}), ("png", {})])
def test_animated_images_are_videos(suffix, options, tmp_path):
    from PIL import Image

    path = str(tmp_path / f"a.{suffix}")
    levels = np.zeros((4, 32, 48, 3), np.uint8)
    levels[np.arange(4), :, np.arange(4) * 12] = 255
    first, *others = [Image.fromarray(one) for one in levels]
    first.save(path, save_all=True, append_images=others, duration=100, **options)
    assert check_references(f"{path};{path}#first=2;{path}#last=3") == [4, 2, 3]
    assert read_reference(path, SIZE).shape == (3, 4, *SIZE)
    with pytest.raises(MediaError, match="has 4 frames where an image is needed"):
        check_references(f"{path}#hold=17")


def test_too_long_and_thin(tmp_path):
    path = str(write_image(np.zeros((1, 4000, 3), np.uint8), tmp_path / "a.png"))
    with pytest.raises(MediaError, match=r"a\.png': an image of 1x4000 pixels is too long and thin"):
        read_reference(path, SIZE)


def test_unknown_transform(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'center'"):
        read_reference("a.png", SIZE, transform="centre")
