"""Media as strangers send them: each file gives a usable result or a clear refusal; nothing crashes or hangs."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from opensora.datasets import video as media
from opensora.datasets.video import reader
from opensora.datasets.video.container import SIZE_KEY
from opensora.errors import MediaError
from opensora.pipeline.references import References, read_reference
from tests.full import some

pytestmark = pytest.mark.timeout(60)
check_references = References((16, 24)).check
IDENTITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # the display matrix of an MP4 track


def clip(num_frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames with a red top, a blue bottom and a white left eighth, so that turning and mirroring show."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[:, : height // 2, :, 0] = frames[:, height // 2 :, :, 2] = 200
    frames[:, :, : width // 8] = 255
    return frames


def video(
    path: Path,
    frames: np.ndarray | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict | None = None,
    container: dict | None = None,
    times: list[int] | None = None,
    sound: bool = False,
    kind: str | None = None,
) -> Path:
    """Writes `frames` with PyAV; `times` are presentation times in 1/100 s."""
    frames = clip() if frames is None else frames
    with av.open(str(path), "w", format=kind, options=container or {}) as output:
        stream = output.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        audio = output.add_stream("aac", rate=44100, layout="mono") if sound else None
        if times:
            stream.codec_context.time_base = Fraction(1, 100)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[-1] == 4 else "rgb24")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 100)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if audio:
            output.mux([*audio.encode(silence()), *audio.encode()])
    return path


def silence() -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
    frame.rate, frame.pts = 44100, 0
    return frame


def audio(path: Path, codec: str = "aac", cover: bool = False) -> Path:
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=44100, layout="mono")
        picture = output.add_stream("png", rate=1) if cover else None
        if picture:
            picture.width, picture.height, picture.pix_fmt = 16, 16, "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
        frame = silence()
        if codec != "aac":
            frame = av.AudioResampler(format="s16").resample(frame)[0]
        output.mux([*stream.encode(frame), *stream.encode()])
        if picture:
            output.mux(picture.encode(av.VideoFrame.from_ndarray(clip(1, 16, 16)[0], format="rgb24")))
            output.mux(picture.encode())
    return path


def turned(path: Path, degrees: int) -> Path:
    """An MP4 whose track says that players should turn it clockwise, as telephones write it."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    content = video(path).read_bytes()
    track = content.index(IDENTITY, content.index(b"tkhd"))
    path.write_bytes(content[:track] + matrix + content[track + len(matrix) :])
    return path


def image(path: Path, mode: str = "RGB", kind: str | None = None, **options) -> Path:
    picture = Image.fromarray(clip(1)[0])
    picture = picture.convert("RGB").convert(mode) if mode != "P" else picture.quantize(8)
    picture.save(path, format=kind, **options)
    return path


def moving(path: Path, num_frames: int = 5) -> Path:
    pictures = [Image.fromarray(np.roll(clip(1)[0], 3 * index, axis=1)) for index in range(num_frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    return path


def cut(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def cut_before(path: Path, number: int) -> Path:
    """The file up to, but without, the packet of this number: nothing in it is damaged."""
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: places[number]])
    return path


def text(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def deep(path: Path, dtype: type, scale: int) -> Path:
    Image.fromarray((clip(1)[0, ..., 0].astype(dtype) * scale).astype(dtype)).save(path)
    return path


def png_claiming(path: Path, height: int, width: int) -> Path:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return text(path, b"\x89PNG\r\n\x1a\n" + body)


def no_frames(path: Path, codec: str = "mpeg4", **options: str) -> Path:
    """A video track without a single frame."""
    with av.open(str(path), "w", options=options) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        output.start_encoding()
    return path


def two_sizes(path: Path) -> Path:
    first, second = (video(path.with_name(f"{n}.ts"), clip(6, n, n)).read_bytes() for n in (32, 64))
    return text(path, first + second)


def playlist(path: Path) -> Path:
    target = video(path.with_name("secret.ts"))
    return text(path, f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n")


def named(path: Path, suffix: str, make: Callable, *args, **options) -> Path:
    """A file made under one suffix, then renamed to another."""
    made = make(path.with_suffix(suffix), *args, **options)
    return made.rename(path)


LOSSY, FAST = {"crf": "4"}, {"movflags": "faststart"}
TURN = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6
DAMAGED = ["plain.mp4", "vp9.webm", "old.avi", "stream.ts", "moving.gif", "a_jpeg.png", "palette.png"]
RGBA = np.concatenate([clip(), np.full((6, 32, 48, 1), 40, np.uint8)], axis=-1)
# name -> how to make it; each gives 6 frames of 32x48 unless another size is noted
USABLE: dict[str, tuple[Callable[[Path], Path], tuple[int, int, int]]] = {
    "plain.mp4": (lambda p: video(p, options=LOSSY), (6, 32, 48)),
    "vp9.webm": (lambda p: video(p, codec="libvpx-vp9", options=LOSSY), (6, 32, 48)),
    "alpha.webm": (lambda p: video(p, RGBA, "libvpx-vp9", "yuva420p"), (6, 32, 48)),
    "alpha_rle.mov": (lambda p: video(p, RGBA[..., [3, 0, 1, 2]][..., 1:], "qtrle", "argb"), (6, 32, 48)),
    "alpha_10bit.mov": (lambda p: video(p, RGBA, "prores_ks", "yuva444p10le"), (6, 32, 48)),
    "alpha_ffv1.mkv": (lambda p: video(p, RGBA, "ffv1", "bgra"), (6, 32, 48)),
    "10bit.mp4": (lambda p: video(p, pix_fmt="yuv420p10le", options=LOSSY), (6, 32, 48)),
    "16bit.mkv": (lambda p: video(p, codec="ffv1", pix_fmt="yuv444p16le"), (6, 32, 48)),
    "gray.mkv": (lambda p: video(p, codec="ffv1", pix_fmt="gray"), (6, 32, 48)),
    "rotated_90.mp4": (lambda p: turned(p, 90), (6, 48, 32)),
    "rotated_180.mp4": (lambda p: turned(p, 180), (6, 32, 48)),
    "rotated_270.mp4": (lambda p: turned(p, 270), (6, 48, 32)),
    "variable_rate.mp4": (lambda p: video(p, times=[0, 3, 50, 51, 170, 400]), (6, 32, 48)),
    "variable_rate.mkv": (lambda p: video(p, times=[0, 3, 50, 51, 170, 400]), (6, 32, 48)),
    "with_sound.mp4": (lambda p: video(p, sound=True), (6, 32, 48)),
    "one_frame.mp4": (lambda p: video(p, clip(1)), (1, 32, 48)),
    "odd_sides.mkv": (lambda p: video(p, clip(6, 31, 47), "ffv1", "bgr0"), (6, 31, 47)),
    "length_unknown.mkv": (lambda p: video(p, container={"live": "1"}), (6, 32, 48)),
    "fragments.mp4": (lambda p: video(p, container={"movflags": "frag_keyframe+empty_moov"}), (6, 32, 48)),
    "stream.ts": (video, (6, 32, 48)),
    "old.avi": (lambda p: video(p, codec="mpeg4", options={"qscale": "2"}), (6, 32, 48)),
    "a_video.png": (lambda p: named(p, ".mp4", video), (6, 32, 48)),
    "a_video": (lambda p: named(p, ".mp4", video), (6, 32, 48)),
    "an_image.mp4": (lambda p: named(p, ".png", image), (1, 32, 48)),
    "a_jpeg.png": (lambda p: named(p, ".jpg", image, quality=95), (1, 32, 48)),
    "an_image": (lambda p: named(p, ".webp", image, lossless=True), (1, 32, 48)),
    "moving.gif": (moving, (5, 32, 48)),
    "still.gif": (image, (1, 32, 48)),
    "moving.png": (moving, (5, 32, 48)),
    "moving.webp": (moving, (5, 32, 48)),
    "moving": (lambda p: named(p, ".webp", moving), (5, 32, 48)),
    "still.webp": (image, (1, 32, 48)),
    "16bit.png": (lambda p: deep(p, np.uint16, 257), (1, 32, 48)),
    "alpha.png": (lambda p: image(p, "RGBA"), (1, 32, 48)),
    "gray_alpha.png": (lambda p: image(p, "LA"), (1, 32, 48)),
    "palette.png": (lambda p: image(p, "P", transparency=0), (1, 32, 48)),
    "bits.png": (lambda p: image(p, "1"), (1, 32, 48)),
    "cmyk.jpg": (lambda p: image(p, "CMYK"), (1, 32, 48)),
    "rotated.jpg": (lambda p: image(p, exif=TURN), (1, 48, 32)),
    "pages.tif": (lambda p: moving(p, 3), (1, 32, 48)),
    "one_pixel.png": (lambda p: media.write_image(clip(1, 1, 1)[0], p), (1, 1, 1)),
    "name: with; colons.mp4": (video, (6, 32, 48)),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.mp4": (lambda p: None, "no such file"),
    "folder.mp4": (Path.mkdir, "no such file"),
    "pipe.mp4": (os.mkfifo, "no such file"),
    "empty.mp4": (lambda p: text(p, b""), "cannot be read as a video"),
    "empty.png": (lambda p: text(p, b""), "cannot be read as an image"),
    "empty": (lambda p: text(p, b""), "cannot be read"),
    "words.mp4": (lambda p: text(p, "no video at all\n" * 99), "cannot be read as a video"),
    "page.png": (lambda p: text(p, "<!DOCTYPE html><html>404</html>"), "cannot be read as an image"),
    "drawing.png": (lambda p: text(p, "<svg xmlns='http://www.w3.org/2000/svg'/>"), "cannot be read as an image"),
    "program.png": (lambda p: text(p, "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "cannot be read as an"),
    "icon.png": (lambda p: image(p, kind="ico"), "none of JPEG, PNG"),
    "list.mp4": (playlist, "cannot be read as a video"),
    "list.txt": (lambda p: text(p, f"ffconcat version 1.0\nfile '{video(p.with_name('s.mp4')).name}'\n"), "cannot be"),
    "cut.mp4": (lambda p: cut(video(p), 0.7), "cannot be read as a video|holds no video"),
    "cut_behind_index.mp4": (lambda p: cut(video(p, container=FAST), 0.9), "cut off|Invalid data"),
    "cut.mkv": (lambda p: cut(video(p, codec="ffv1", pix_fmt="bgr0"), 0.7), "cut off"),
    "cut.avi": (lambda p: cut(video(p, codec="mpeg4"), 0.7), "cut off|Invalid data"),
    "cut_between_frames.avi": (lambda p: cut_before(video(p, codec="mpeg4"), 4), "cut off"),
    "cut_between_frames.mkv": (lambda p: cut_before(video(p, codec="mpeg4"), 4), "cut off"),
    "cut_between_frames.mp4": (lambda p: cut_before(video(p, codec="mpeg4", container=FAST), 4), "4 of its 6 frames"),
    "cut.png": (lambda p: cut(image(p), 0.7), "cannot be read as an image"),
    "cut.jpg": (lambda p: cut(image(p), 0.8), "cannot be read as an image"),
    "cut.webp": (lambda p: cut(image(p), 0.7), "cannot be read as an image"),
    "header_only.mkv": (lambda p: cut(video(p), 0.2), "cut off|cannot be read|no video"),
    "sound.mp4": (audio, "holds no video"),
    "sound.mp4.png": (lambda p: named(p, ".m4a", audio), "cannot be read as an image"),
    "sound.mkv": (audio, "holds no video"),
    "sound.avi": (lambda p: audio(p, "pcm_s16le"), "holds no video"),
    "sound_with_cover.mp4": (lambda p: audio(p, cover=True), "holds no video"),
    "no_frames.mp4": (no_frames, "no frames|holds no video|cannot be read"),
    "no_frames_yet.mp4": (lambda p: no_frames(p, "libx264", movflags="empty_moov"), "holds no frames"),
    "no_frames.mkv": (no_frames, "no frames|End of file"),
    "claims_much.png": (lambda p: png_claiming(p, 100_000, 100_000), "exceeds limit|over the limit of 8192"),
    "claims_more.png": (lambda p: png_claiming(p, 9000, 9000), "9000x9000 pixels, over the limit of 8192"),
    "long_side.png": (lambda p: png_claiming(p, 1, 8193), "1x8193 pixels, over the limit of 8192"),
    "wide.mp4": (lambda p: video(p, np.zeros((1, 16, 8208, 3), np.uint8)), "16x8208 pixels, over the limit of 8192"),
    "two_sizes.ts": (two_sizes, "differ in size"),
    "floats.tif": (lambda p: deep(p, np.float32, 1), "32-bit pixels"),
    "deep.tif": (lambda p: deep(p, np.int32, 1), "32-bit pixels"),
    "f" * 400 + ".png": (lambda p: None, "no such file"),
    "nul\0.png": (lambda p: None, "no such file"),
}


def test_there_are_enough():
    assert len(REFUSED) >= 30 and len(USABLE) >= 30


@pytest.mark.parametrize("name", USABLE)
def test_usable(name, tmp_path):
    make, size = USABLE[name]
    path = make(tmp_path / name)
    frames = media.read_image(path)[None] if media.is_image(path) else media.read_video(path)[0]
    assert frames.shape == (*size, 3) and frames.dtype == np.uint8
    if ";" not in name:
        assert check_references(str(path)) == [size[0]]
    reference = read_reference(str(path), (16, 24))
    assert reference.shape == (3, size[0], 16, 24) and reference.abs().max() <= 1


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    make, reason = REFUSED[name]
    path = tmp_path / name
    make(path)
    for read in (check_references, lambda source: read_reference(source, (16, 24))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(MediaError, match=reason) as caught:
                read(str(path))
        message = str(caught.value)
        assert "\n" not in message and message.count(repr(str(path))[1:-1]) == 1


@pytest.mark.parametrize("name", ["alpha.webm", "alpha_rle.mov", "alpha_10bit.mov", "alpha_ffv1.mkv", "10bit.mp4"])
def test_colours_survive(name, tmp_path):
    """Transparency is dropped, not blended; ten bits become eight by their upper ones."""
    frames, _ = media.read_video(USABLE[name][0](tmp_path / name))
    assert np.abs(frames[:, 4:12, 12:44].mean((0, 1, 2)) - (200, 0, 0)).max() < 8
    assert np.abs(frames[:, 20:28, 12:44].mean((0, 1, 2)) - (0, 0, 200)).max() < 8


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(degrees, tmp_path):
    frames, _ = media.read_video(turned(tmp_path / "a.mp4", degrees))
    expected = np.rot90(clip(), -degrees // 90, axes=(1, 2))  # clockwise
    assert frames.shape == expected.shape and np.abs(frames.astype(int) - expected).mean() < 12


def test_rotation_of_an_image_is_applied(tmp_path):
    """Orientation 6 of EXIF: to be turned clockwise by 90 degrees."""
    picture = media.read_image(USABLE["rotated.jpg"][0](tmp_path / "rotated.jpg"))
    assert np.abs(picture.astype(int) - np.rot90(clip(1)[0], -1)).mean() < 12


def test_16_bit_levels_are_scaled(tmp_path):
    picture = media.read_image(deep(tmp_path / "a.png", np.uint16, 257))
    assert np.array_equal(picture, np.repeat(clip(1)[0, ..., :1], 3, axis=-1))


@pytest.mark.parametrize(
    "said", ["", "x", "31x", "0x0", "-1x4", "31x4", "64x96", "9" * 5000 + "x1", "31x48x1", "30x47"]
)
def test_size_in_the_metadata_is_not_believed_blindly(said, tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "use_metadata_tags"}) as output:
        output.metadata[SIZE_KEY] = said
        stream = output.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(clip(1)[0], format="rgb24")))
        output.mux(stream.encode())
    assert media.read_video(path)[0].shape == (1, 32, 48, 3)


def test_frames_are_counted_while_they_are_decoded(tmp_path, monkeypatch):
    path = video(tmp_path / "a.mp4")
    assert len(media.read_video(path, max_frames=6)[0]) == len(list(media.iterate_video(path, 6))) == 6
    for read in (lambda: media.read_video(path, 5), lambda: list(media.iterate_video(path, 5))):
        with pytest.raises(MediaError, match="more than 5 frames"):
            read()
    monkeypatch.setattr(reader, "MAX_PIXELS", 4 * 4096)  # small frames count as 4096 pixels
    with pytest.raises(MediaError, match="more than 4 frames"):
        media.read_video(path)


def test_a_playlist_leads_nowhere(tmp_path):
    """Renamed or not: what it names is not opened. The same file by itself is fine."""
    secret = playlist(tmp_path / "a.m3u8").with_name("secret.ts")
    assert len(media.read_video(secret)[0]) == 6
    for name in ("a.m3u8", "a.mkv"):
        path = playlist(tmp_path / name)
        with pytest.raises(MediaError, match="cannot be read as a video"):
            media.read_video(path)


@pytest.mark.parametrize("name", DAMAGED)
@some(4)
def test_damaged_files(name, tmp_path):
    """Bytes overwritten at random: frames or a MediaError, whatever is hit."""
    content = USABLE[name][0](tmp_path / name).read_bytes()
    random, path, outcomes = np.random.default_rng(0), tmp_path / f"damaged-{name}", set()
    for _ in range(60):
        damaged = np.frombuffer(content, np.uint8).copy()
        where = random.integers(0, len(damaged), random.integers(1, 40))
        if random.random() < 0.5:
            where = where % min(len(damaged), 1000)  # the headers
        damaged[where] = random.integers(0, 256, len(where))
        path.write_bytes(damaged.tobytes())
        try:
            frames = read_reference(str(path), (16, 24))
            assert frames.shape[0] == 3 and frames.shape[1] and frames.shape[2:] == (16, 24)
            outcomes.add("read")
        except MediaError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes
