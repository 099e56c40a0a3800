"""References given as arrays, tensors and PIL images: as the file with the same pixels, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.cli import main
from opensora.datasets.transforms import resize_crop
from opensora.datasets.video import write_image
from opensora.errors import MediaError
from opensora.pipeline import in_memory_media, media_reader
from opensora.pipeline.in_memory_media import InMemoryMedia, media_sources
from opensora.pipeline.references import References, read_reference
from tests.checkpoints import SAMPLE, run_script

SIZE = (16, 24)
VIDEO = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)
IMAGE = VIDEO[0]
CHANNELS_FIRST = torch.from_numpy(VIDEO).permute(3, 0, 1, 2)

SAME_VIDEO = {
    "uint8 array": VIDEO,
    "float array": VIDEO.astype(np.float64) / 255,
    "float32 array": VIDEO.astype(np.float32) / 255,
    "turned array": np.ascontiguousarray(VIDEO.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "uint8 tensor": CHANNELS_FIRST,
    "float tensor": CHANNELS_FIRST.float() / 127.5 - 1,
    "PIL images": [Image.fromarray(one) for one in VIDEO],
    "arrays": list(VIDEO),
}
SAME_IMAGE = {
    "uint8 array": IMAGE,
    "video of one frame": VIDEO[:1],
    "float array": IMAGE.astype(np.float32) / 255,
    "uint8 tensor": CHANNELS_FIRST[:, 0],
    "float tensor": CHANNELS_FIRST[:, 0].double() / 127.5 - 1,
    "PIL image": Image.fromarray(IMAGE),
    "PIL image with transparency": Image.fromarray(np.dstack([IMAGE, np.full(IMAGE.shape[:2], 9, np.uint8)])),
    "list of one": [IMAGE],
}


@pytest.mark.parametrize("kind", SAME_VIDEO)
def test_every_form_of_a_video_is_the_same_reference(kind: str) -> None:
    media = InMemoryMedia.from_pixels(SAME_VIDEO[kind])
    assert media.name == InMemoryMedia(VIDEO).name
    held = References(SIZE, media=[media])
    assert held.check(f"{media.name};{media.name}#first=2;{media.name}#last=3") == [5, 2, 3]
    assert torch.equal(held.read(media.name)[0], resize_crop(VIDEO, SIZE))
    assert held.hashes(f"{media.name}#first=2") == {media.name: media.sha256}


@pytest.mark.parametrize("kind", SAME_IMAGE)
def test_every_form_of_an_image_is_read_like_its_file(kind: str, tmp_path: Path) -> None:
    path = str(write_image(IMAGE, tmp_path / "a.png"))
    media = InMemoryMedia.from_pixels(SAME_IMAGE[kind])
    held = References(SIZE, media=[media])
    assert held.check(f"{media.name}#hold=17") == [17]
    assert torch.equal(held.read(media.name)[0], read_reference(path, SIZE))


def test_a_turned_photo_is_read_like_its_file(tmp_path: Path) -> None:
    path, exif = str(tmp_path / "a.jpg"), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(IMAGE).save(path, exif=exif)
    media = InMemoryMedia.from_pixels(Image.open(path))
    assert torch.equal(References(SIZE, media=[media]).read(media.name)[0], read_reference(path, SIZE))


def test_the_name_depends_on_pixels_and_shape() -> None:
    black = np.zeros((1, 8, 6, 3), np.uint8)
    others = (black.reshape(1, 6, 8, 3), black.reshape(2, 4, 6, 3), black + 1)
    assert len({InMemoryMedia(one).name for one in (black, *others)}) == 4


def test_the_pixels_are_a_copy() -> None:
    for pixels in (IMAGE.copy(), torch.from_numpy(IMAGE.copy()).permute(2, 0, 1)):
        media = InMemoryMedia.from_pixels(pixels)
        pixels[0] = 0
        assert np.array_equal(media.frames[0], IMAGE)


REFUSED: dict[str, tuple[Any, str]] = {
    "type": (3, "is of type int; give a path, a NumPy array"),
    "bytes": (b"pixels", "is of type bytes; give a path, a NumPy array"),
    "mapping": ({"a": IMAGE}, "is of type dict"),
    "grey": (IMAGE[..., 0], r"is an array of shape \[32, 48\]; give \[H, W, 3\]"),
    "transparency": (np.zeros((8, 8, 4), np.uint8), r"shape \[8, 8, 4\]"),
    "batch": (VIDEO[None], r"shape \[1, 5, 32, 48, 3\]"),
    "channels first": (VIDEO.transpose(0, 3, 1, 2), r"shape \[5, 3, 32, 48\]; give \[H, W, 3\] or \[T, H, W, 3\]"),
    "no frames": (VIDEO[:0], r"shape \[0, 32, 48, 3\]"),
    "integers": (IMAGE.astype(np.int64), "is an array of int64; give uint8"),
    "float levels of bytes": (IMAGE.astype(np.float32), r"has levels from 0 to 255; scale float levels to \[0, 1\]"),
    "signed array": (IMAGE / 127.5 - 1, r"has levels from -1 to 1; scale float levels to \[0, 1\]"),
    "NaN": (np.full((8, 8, 3), np.nan), "has levels from nan"),
    "NaN in a tensor": (torch.full((3, 8, 8), torch.nan), "has levels from nan"),
    "tensor of levels": (CHANNELS_FIRST.float(), r"has levels from 0 to 255; scale float levels to \[-1, 1\]"),
    "tensor of integers": (CHANNELS_FIRST.int(), r"is a tensor of torch\.int32; give uint8"),
    "channels last": (torch.from_numpy(VIDEO), r"is a tensor of shape \[5, 32, 48, 3\]; give \[3, H, W\]"),
    "empty list": ([], "is an empty list"),
    "sizes": ([IMAGE, IMAGE[:8]], "is a list of images of 2 shapes"),
    "list of videos": ([VIDEO, VIDEO], "give single images of one size"),
    "list of numbers": ([1, 2], r"image\[0\] is of type int"),
    "side": (np.zeros((1, 8193, 3), np.uint8), "1x8193 pixels, over the limit of 8192 a side"),
    "frames": (np.zeros((4097, 1, 1, 3), np.uint8), "holds 4097 frames, over the limit of 4096"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_media_is_refused(kind: str) -> None:
    pixels, problem = REFUSED[kind]
    with pytest.raises(MediaError, match=problem) as caught:
        media_sources(image=pixels)
    assert str(caught.value).startswith("image") and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_bounds_of_all_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_memory_media, "MAX_PIXELS", VIDEO[..., 0].size - 1)
    with pytest.raises(MediaError, match=r"reference: holds 5 frames of 32x48, 7,680 pixels in all, over the limit"):
        InMemoryMedia.from_pixels(VIDEO)
    media = InMemoryMedia(VIDEO)
    monkeypatch.setattr(media_reader, "MAX_PIXELS", 4 * SIZE[0] * SIZE[1])
    with pytest.raises(MediaError, match="holds more than 4 frames, the limit"):
        References(SIZE, media=[media]).check(media.name)


def test_too_long_and_thin() -> None:
    media = InMemoryMedia.from_pixels(np.zeros((1, 4000, 3), np.uint8))
    problem = f"reference '{media.name}': an image of 1x4000 pixels is too long and thin"
    with pytest.raises(MediaError, match=problem):
        References(SIZE, media=[media]).check(media.name)


def test_paths_stay_paths(tmp_path: Path) -> None:
    sources, media = media_sources(image=tmp_path / "a.png", last_frame=IMAGE, extend="https://example.org/a.mp4")
    assert sources == {
        "image": str(tmp_path / "a.png"), "last_frame": media[0].name, "extend": "https://example.org/a.mp4",
    }  # fmt: skip
    assert len(media) == 1 and media_sources(image=None) == ({}, [])


def test_names_alone_are_refused(
    tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The command line and replay have no pixels for such a name."""
    monkeypatch.chdir(tmp_path)
    media = InMemoryMedia(VIDEO)
    small = ("--image-size", *SIZE, "--num-sampling-steps", "1", "--num-frames", "1", "--save-dir", "out")
    prompt = f'x{{"reference_path": "{media.name}", "mask_strategy": "0"}}'
    assert run_script(SAMPLE, *small, "--prompt", prompt) == 1
    problem = f"reference '{media.name}' was given as pixels in memory, which no file holds"
    expected = f"error: {problem}; give the same array through the Python interface\n"
    assert capsys.readouterr().err == expected
    write_image(IMAGE, "a.png")
    assert run_script(SAMPLE, *small, "--prompt", "x", "--image", "a.png") == 0
    recipe = json.loads(Path("out/sample_0000.json").read_text())
    recipe["settings"]["reference_path"], recipe["references"] = [media.name], {media.name: media.sha256}
    Path("out/changed.json").write_text(json.dumps(recipe))
    capsys.readouterr()
    assert main(["replay", "out/changed.json", "--save-dir", "again"]) == 1
    assert capsys.readouterr().err == expected
    assert not Path("again").exists()
