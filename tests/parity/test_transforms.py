"""Transforms and references against the recorded ones: resizing, cropping, whole files at the size that is made."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opensora.datasets.transforms import center, get_transform
from opensora.errors import ConfigError, MediaError
from opensora.pipeline.references import References, read_reference, read_references
from tests.full import count
from tests.parity.cases import ROOT

FACTS = json.loads((ROOT / "data" / "datasets.json").read_text())
TENSORS = load_file(ROOT / "data" / "datasets.safetensors")
MEDIA = ROOT / "data" / "datasets.media"
CASES = [(kind, case) for kind in ("video", "image") for case in FACTS["transforms"][kind]]


def tolerance(file: str) -> float:
    """Of what is decoded from a file: conversion of lossy colours differs between builds of FFmpeg."""
    if file.startswith(("h264", "mpeg4")):
        return 0.15
    return 0.02 if file.lower().endswith((".jpg", ".jpeg")) else 1e-5


@pytest.mark.parametrize(("kind", "case"), CASES, ids=lambda value: value if isinstance(value, str) else value["name"])
def test_transform(kind: str, case: dict) -> None:
    frames, expected = (TENSORS[f"{kind}.{case['name']}.{end}"] for end in ("in", "out"))
    frames = frames.permute(0, 2, 3, 1) if kind == "video" else frames
    out = get_transform(case["transform"])(frames.numpy(), tuple(case["size_h_w"]))
    assert out.dtype == torch.float32 and out.is_contiguous()
    expected = expected.transpose(0, 1) if kind == "video" else expected[:, None]
    tolerance = 1e-5 if kind == "video" else 1e-6
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)


def test_transform_errors() -> None:
    for case in FACTS["transforms"]["errors"]:
        shape = (2, 8, 8, 3) if "video" in case["what"] else (8, 8, 3)
        if case["what"].startswith("center transform with non-square"):
            with pytest.raises(ConfigError, match="resize_crop"):
                center(np.zeros(shape, np.uint8), (8, 12))
        elif case["what"] == "unknown transform name":
            with pytest.raises(ConfigError, match="not known"):
                get_transform(case["name"])
        elif case["what"] == "no transform name":
            with pytest.raises(ConfigError, match="not known"):
                get_transform(case.get("name"))
        elif case["what"] == "float input clip":
            with pytest.raises(ValueError, match="uint8"):
                center(np.zeros((2, 8, 8, 3)), (8, 8))
        else:
            raise AssertionError(f"a kind of error that this test does not know: {case['what']}")


@pytest.mark.parametrize("side", ["256", "512"])
def test_center_of_awkward_short_edges(side: str) -> None:
    """Quirk D6: the recorded transform fails for these, since its scaled size is rounded down below the target."""
    edges = FACTS["transforms"]["center_video_failing_short_edges"][side]
    assert edges
    for edge in edges[:: count(32, 4)]:
        frames = np.zeros((1, edge, edge + 1, 3), np.uint8)
        assert center(frames, (int(side), int(side))).shape == (3, 1, int(side), int(side))


def test_too_long_and_thin() -> None:
    for shape in ((8000, 2, 3), (1, 2, 8000, 3)):
        with pytest.raises(MediaError, match="too long and thin"):
            get_transform("resize_crop")(np.zeros(shape, np.uint8), (64, 64))


@pytest.mark.parametrize("case", FACTS["read_from_path"], ids=lambda case: f"{case['file']}-{case['transform']}")
def test_read_from_path(case: dict) -> None:
    """Quirk D9: what has no frames is an error here."""
    options = {"size": tuple(case["image_size"]), "transform": case["transform"]}
    if "error" in case or 0 in case["result"]["shape"]:
        with pytest.raises(MediaError, match="reference"):
            read_reference(str(MEDIA / case["file"]) if case["file"] else "", **options)
        return
    out = read_reference(str(MEDIA / case["file"]), **options)
    expected = TENSORS[case["tensor"]]
    assert list(out.shape) == case["result"]["shape"] and out.dtype == torch.float32
    assert (out - expected).abs().max() <= tolerance(case["file"])
    assert (out - expected).abs().mean() <= 0.05


@pytest.mark.parametrize("case", FACTS["collect_references"], ids=lambda case: str(case["reference_path"]))
def test_collect_references(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MEDIA)
    size, paths = tuple(case["image_size"]), case["reference_path"]
    if paths == [None]:  # there, a crash; here, the same as no reference
        assert read_references(None, size) == References(size).check(None) == []
    elif "error" in case:
        for function in (lambda text: read_references(text, size), References(size).check):
            with pytest.raises((ConfigError, MediaError), match="reference"):
                [function(text) for text in paths]
    else:
        expected = case["shapes_C_T_H_W_before_encoding"]
        assert [[list(one.shape) for one in read_references(text, size)] for text in paths] == expected
        assert [References(size).check(text) for text in paths] == [
            [shape[1] for shape in shapes] for shapes in expected
        ]


def is_whole(case: dict) -> bool:
    """Whether an item was read from a file that is not cut off (quirk D8)."""
    return "item" in case and not case["file"].startswith("truncated")


@pytest.mark.parametrize("case", [case for case in FACTS["items"] if is_whole(case)], ids=lambda case: case["file"])
def test_every_recorded_file_is_read(case: dict) -> None:
    """The media of the recorded dataset items, all kinds of them; those of one whole clip or image have its numbers."""
    out = read_reference(str(MEDIA / case["file"]), (16, 24))
    assert out.shape[0] == 3 and out.shape[2:] == (16, 24) and out.isfinite().all()
    tensor = TENSORS[case["tensor"]]
    if out.shape[1] == tensor.shape[1] and tensor.shape[1] == 1:
        out = read_reference(str(MEDIA / case["file"]), tuple(tensor.shape[2:]))
        assert (out - tensor).abs().max() <= tolerance(case["file"])


@pytest.mark.parametrize("name", ["broken.mp4", "empty.mp4", "truncated.mp4", "truncated.jpg", "not_an_image.png"])
def test_broken_recorded_files(name: str) -> None:
    """Quirk D8: a cut-off JPEG is an error too."""
    for function in (References((16, 16)).check, lambda path: read_reference(path, (16, 16))):
        with pytest.raises(MediaError, match=name):
            function(str(MEDIA / name))
