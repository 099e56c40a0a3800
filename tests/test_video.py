"""Writing and reading media: quality, sizes, metadata, and nothing left behind on failure."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from opensora.datasets import video as media
from opensora.errors import MediaError
from opensora.files import atomic_write


def ramp(num_frames: int, height: int, width: int) -> np.ndarray:
    """A smooth clip whose colours differ by frame and place."""
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (num_frames, height, width)), indexing="ij")
    return (np.stack([0.2 + 0.6 * x, 0.3 + 0.5 * y, 0.2 + 0.6 * t], axis=-1) * 255).astype(np.uint8)


@contextmanager
def small_files():
    """No file may grow beyond 1 KiB: what a full disk looks like to the writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [(9, 16, 24), (1, 16, 24), (4, 17, 25), (3, 32, 854), (2, 1, 1)])
def test_video_round_trip(size, tmp_path):
    frames = ramp(*size)
    path = media.write_video(frames, tmp_path / "a.b.mp4", fps=8)
    back, fps = media.read_video(path)
    assert back.shape == frames.shape and back.dtype == np.uint8 and fps == 8
    assert np.abs(back.astype(int) - frames).mean() < 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.b.mp4"]


def test_file_plays_everywhere(tmp_path):
    import av

    media.write_video(ramp(4, 17, 24), tmp_path / "a.mp4", fps=24)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == ("h264", "yuv420p", 24, 18)
        assert len(container.streams) == 1 and "mp4" in container.format.name


@pytest.mark.parametrize(
    "colors", [((255, 0, 0), (128, 128, 128)), ((0, 160, 0), (128, 0, 200)), ((0, 0, 0), (0, 0, 255))]
)
def test_chroma_is_the_mean_of_four_pixels(colors, tmp_path):
    """So that an edge between two colors is as sharp as yuv420p can have it. Weights of Cb, Cr: ITU-R BT.601."""
    import av

    frame = np.empty((16, 24, 3), np.uint8)
    frame[:] = colors[0]
    frame[4:11, 6:19] = colors[1]  # edges both between and within the squares that share a chroma
    media.write_video(frame[None], tmp_path / "a.mp4", fps=8, crf=0)
    with av.open(str(tmp_path / "a.mp4")) as container:
        planes = next(container.decode(video=0)).to_ndarray(format="yuv420p")
    red, green, blue = frame.reshape(8, 2, 12, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    expected = [128 + 224 / 255 * (blue - luma) / 1.772, 128 + 224 / 255 * (red - luma) / 1.402]
    for plane, chroma in zip(planes[16:].reshape(2, 8, 12), expected, strict=True):
        np.testing.assert_allclose(plane, chroma, atol=1.5)


@pytest.mark.parametrize("fps", [8, 12.6, 23.976, 30000 / 1001, 0.5, 120])
def test_frame_rates(fps, tmp_path):
    _, back = media.read_video(media.write_video(ramp(5, 16, 16), tmp_path / "a.mp4", fps))
    assert back == pytest.approx(fps, rel=1e-5)


def test_frame_rate_zero_means_24_and_others_are_refused(tmp_path):
    assert media.read_video(media.write_video(ramp(2, 16, 16), tmp_path / "a.mp4", 0))[1] == 24
    for fps in (-1, float("nan"), float("inf")):
        with pytest.raises(MediaError, match="frame rate"):
            media.write_video(ramp(2, 16, 16), tmp_path / "b.mp4", fps)
    assert not (tmp_path / "b.mp4").exists()


def test_same_input_same_bytes(tmp_path):
    frames, metadata = ramp(9, 32, 48), {"opensora_recipe": "{}"}
    first, second = (media.write_video(frames, tmp_path / name, 8, metadata) for name in ("a.mp4", "b.mp4"))
    assert first.read_bytes() == second.read_bytes()


def test_metadata(tmp_path):
    text = '{"prompt": "a café, 東京; a=b\\n#1", "long": "' + "x" * 20000 + '"}'
    for path in (
        media.write_video(ramp(2, 15, 16), tmp_path / "a.mp4", 8, {"opensora_recipe": text}),
        media.write_image(ramp(1, 9, 7)[0], tmp_path / "a.png", {"opensora_recipe": text}),
    ):
        assert media.read_metadata(path)["opensora_recipe"] == text
    assert media.read_metadata(media.write_image(ramp(1, 9, 7)[0], tmp_path / "b.png")) == {}


def test_image_round_trip_is_exact(tmp_path):
    frame = ramp(1, 9, 7)[0]
    assert np.array_equal(media.read_image(media.write_image(frame, tmp_path / "a.v1.png")), frame)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 99, None, "cut", "folder"])
def test_broken_files(content, tmp_path):
    for name, write, read in (
        ("a.mp4", lambda p: media.write_video(ramp(9, 32, 32), p, 8), media.read_video),
        ("a.png", lambda p: media.write_image(ramp(1, 32, 32)[0], p), media.read_image),
    ):
        path = tmp_path / name
        if content == "folder":
            path.mkdir()
        elif content == "cut":
            path.write_bytes(write(path).read_bytes()[:-200])
        elif content is not None:
            path.write_bytes(content)
        for reader in (read, media.read_metadata):
            if content == "cut" and name == "a.mp4" and reader is media.read_metadata:
                continue  # the header comes first, so that it can still be read
            with pytest.raises(MediaError) as caught:
                reader(path)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_image_is_no_video(tmp_path):
    (tmp_path / "a.mp3").write_bytes(b"ID3" + bytes(500))
    with pytest.raises(MediaError):
        media.read_video(tmp_path / "a.mp3")


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    for path, write in (
        (tmp_path / "a.mp4", lambda p: media.write_video(noise, p, 8)),
        (tmp_path / "a.png", lambda p: media.write_image(noise[0], p)),
    ):
        path.write_bytes(b"old")
        with small_files(), pytest.raises(MediaError, match="cannot be written"):
            write(path)
        assert path.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.mp4", "a.png"]


def test_impossible_places(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(MediaError, match="cannot be written"):
            media.write_video(ramp(2, 16, 16), folder / "a.mp4", 8)
        with pytest.raises(MediaError, match="cannot be written"):
            media.write_image(ramp(1, 16, 16)[0], folder / "a.png")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_interruption_leaves_nothing(interruption, tmp_path, monkeypatch):
    import av

    def interrupt(*args, **kwargs):
        raise interruption

    monkeypatch.setattr(av, "VideoFrame", type("Interrupted", (), {"from_ndarray": interrupt}))
    with pytest.raises(interruption):
        media.write_video(ramp(2, 16, 16), tmp_path / "a.mp4", 8)
    assert list(tmp_path.iterdir()) == []


def test_replacing_is_all_or_nothing(tmp_path, monkeypatch):
    rename, names = os.replace, []

    def fails_at_second(source, target):
        names.append(target.name)
        if len(names) == 2:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr("os.replace", fails_at_second)
    with (
        pytest.raises(MediaError, match="No space left"),
        atomic_write(tmp_path / "a", tmp_path / "b") as temporaries,
    ):
        for temporary in temporaries:
            temporary.write_text("new")
    assert names == ["a", "b"] and list(tmp_path.iterdir()) == []


def test_to_uint8():
    video = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 7.0]).reshape(1, 3, 1, 2)
    frames = media.to_uint8(video)
    assert frames.shape == (3, 1, 2, 3)
    assert frames[..., 0].ravel().tolist() == frames[..., 2].ravel().tolist() == [0, 0, 128, 255, 255, 255]
    assert media.to_uint8(torch.zeros(3, 2, 4, 5, dtype=torch.bfloat16)).shape == (2, 4, 5, 3)
    with pytest.raises(MediaError, match="NaN"):
        media.to_uint8(torch.full((3, 1, 2, 2), float("nan")))
    with pytest.raises(ValueError):
        media.to_uint8(torch.zeros(1, 3, 4, 8, 8))


def test_frames_of_a_wrong_kind_are_refused(tmp_path):
    for frames in (np.zeros((0, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(ValueError):
            media.write_video(frames, tmp_path / "a.mp4", 8)


def test_contact_sheet():
    assert media.contact_sheet(ramp(1, 64, 64)).shape == (192 + 8, 192 + 8, 3)
    assert media.contact_sheet(ramp(51, 64, 64)).shape == (3 * 196 + 4, 4 * 196 + 4, 3)
    assert media.contact_sheet(ramp(5, 64, 32), columns=5).shape == (200, 5 * 100 + 4, 3)
    assert max(media.contact_sheet(ramp(3, 72, 1280)).shape) < 2000
    frames = ramp(24, 8, 8)
    sheet = media.contact_sheet(frames, side=8)
    assert np.array_equal(sheet[4:12, 4:12], frames[0]) and np.array_equal(sheet[-12:-4, -12:-4], frames[-1])
