"""Videos as people cut and join them: a frame counts if it can be decoded, for tables and for spans alike."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from opensora.datasets import video as media
from opensora.datasets.datasets import VideoTextDataset
from opensora.datasets.folder_table import make_table, read_row
from opensora.datasets.video import reader
from opensora.errors import MediaError
from opensora.pipeline.references import References, read_reference
from tests.full import some

check_references = References((16, 24)).check
CASES = Path(__file__).parent / "cases" / "media"
LENGTH, GOP = 36, 12
OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:log-level=none"
CODECS = {
    "hevc": ("libx265", {"x265-params": OPEN_GOP}),
    "h264": ("libx264", {"x264-params": OPEN_GOP.removesuffix(":log-level=none")}),
    "refresh": ("libx264", {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}),
    "mpeg2": ("mpeg2video", {}),
    "vp9": ("libvpx-vp9", {"lag-in-frames": "8"}),
}


def pictures(count: int = LENGTH) -> np.ndarray:
    """A bar that moves over a changing ground, uint8 [T, 48, 64, 3]."""
    frames = np.zeros((count, 48, 64, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[..., 2] = 5 * number
        frame[:, 3 * number % 64 : 3 * number % 64 + 9, :2] = 200
    return frames


def add_track(container: av.container.OutputContainer, codec: str, frames: np.ndarray, rate: int = 12, **options: str):
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    stream.codec_context.gop_size = GOP
    return stream


def encoded(path: Path, codec: str, frames: np.ndarray | None = None) -> Path:
    name, options = CODECS[codec]
    with av.open(str(path), "w") as container:
        stream = add_track(container, name, pictures() if frames is None else frames, **options)
        for pixels in pictures() if frames is None else frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def cut(source: Path, target: Path, first: int) -> Path:
    """The packets from number `first` on, as they are."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream, start = new.add_stream_from_template(old.streams.video[0]), None
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size and number >= first:
                start = packet.pts if start is None else start
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, stream
                new.mux(packet)
    return target


def second_key(path: Path) -> int:
    with av.open(str(path)) as container:
        return next(n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe and n > 1)


def decodable(path: Path) -> int:
    """How many frames a decoder makes that goes on after errors."""
    with av.open(str(path)) as container:
        count = 0
        for packet in container.demux(video=0):
            try:
                count += len(packet.decode())
            except av.FFmpegError:
                continue
    return count


def check(path: Path, count: int) -> None:
    """The table, spans and a whole read agree; a span to the end can be read."""
    full, _ = media.read_video(path)
    assert len(full) == read_row(path).num_frames == media.count_frames(path) == count
    for indices in ([0], [1, 2], [count // 2], list(range(count - 5, count))):
        frames, _ = media.read_span(path, lambda total, indices=indices: indices * (total == count))
        np.testing.assert_array_equal(frames, full[indices])


@pytest.mark.parametrize("kind", ["mkv", "mp4", "ts"])
@pytest.mark.parametrize("codec", ["hevc", "h264", "refresh", "mpeg2"])
@pytest.mark.parametrize("where", ["key", 3, 17])
@some(15)
def test_cut_without_encoding_anew(codec, kind, where, tmp_path):
    if kind == "mp4" and codec in ("mpeg2", "refresh"):
        pytest.skip("one more container is enough")
    source = encoded(
        tmp_path / f"a.{'ts' if codec == 'h264' and kind == 'ts' else 'mkv' if kind != 'mp4' else 'mp4'}", codec
    )
    path = cut(source, tmp_path / f"b.{kind}", second_key(source) if where == "key" else where)
    count = decodable(path)
    assert 0 < count < LENGTH
    check(path, count)


def test_packets_that_lack_their_key_frame_do_not_stop_a_decoder(tmp_path):
    check(cut(encoded(tmp_path / "a.webm", "vp9"), tmp_path / "b.webm", 3), 24)


@pytest.mark.parametrize(("name", "count"), [("cut_5.1.mkv", 53), ("midgop.ts", 24), ("seg1.mkv", 56)])
def test_cases_of_cuts(name, count):
    check(CASES / name, count)


@pytest.mark.parametrize("kind", ["mkv", "ts"])
def test_no_key_frame_at_all(kind, tmp_path):
    source = encoded(tmp_path / "a.ts", "h264", pictures(10))
    path = cut(source, tmp_path / f"b.{kind}", 2)
    for read in (media.read_video, read_row):
        with pytest.raises(MediaError, match=r"holds no frames|cannot be read"):
            read(path)


# Tracks


def two_tracks(path: Path, lengths: tuple[int, int], default: int | None) -> Path:
    """Tracks of 32x32 and 48x64, of so many frames; `default` is the only one that is marked so."""
    with av.open(str(path), "w") as container:
        clips = [np.zeros((lengths[0], 32, 32, 3), np.uint8), pictures(lengths[1])]
        tracks = [add_track(container, "mjpeg" if len(clip) == 1 else "libx264", clip) for clip in clips]
        for number, track in enumerate(tracks):
            track.disposition = av.stream.Disposition(int(number == default))
        for clip, track in zip(clips, tracks, strict=True):
            for pixels in clip:
                container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(track.encode())
    return path


@pytest.mark.parametrize("kind", ["mkv", "mp4"])
@pytest.mark.parametrize(
    ("lengths", "default", "height"),
    [((1, 9), 1, 48), ((1, 9), None, 48), ((1, 9), 0, 48), ((9, 1), None, 32), ((9, 6), 1, 48), ((6, 9), 0, 32),
     ((6, 9), None, 48), ((9, 6), None, 32), ((6, 6), None, 32)],
)  # fmt: skip
def test_moving_pictures_before_stills_then_the_default_then_the_longest(kind, lengths, default, height, tmp_path):
    path = two_tracks(tmp_path / f"a.{kind}", lengths, default)
    if kind == "mp4" and default is None:  # its writer then marks the first one
        height = 48 if lengths[0] == 1 else 32
    row = read_row(path)
    assert (row.height, row.num_frames) == (height, lengths[0] if height == 32 else lengths[1])
    assert media.read_video(path)[0].shape[:2] == (row.num_frames, height)


@pytest.mark.parametrize("name", ["still_track_first.mkv", "still_track_first.mp4"])
def test_cases_of_a_still_as_first_track(name):
    row = read_row(CASES / name)
    assert (row.num_frames, row.height, row.width, row.fps) == (36, 96, 128, 12)


# Times


def with_times(path: Path, count: int, duration: int) -> Path:
    """An MP4 whose table of times has one entry."""
    content = bytearray(encoded(path, "h264").read_bytes())
    at = content.index(b"stts") + 12
    content[at : at + 8] = struct.pack(">II", count, duration)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("duration", [2**31 - 1, 100_000, 0, 2**32 - 1, 2_000_000_000])
def test_broken_times_are_told(duration, tmp_path):
    path = with_times(tmp_path / "a.mp4", LENGTH, duration)
    for read in (media.read_video, read_row, media.count_frames):
        with pytest.raises(MediaError, match=r"its timestamps are invalid, .*; re-encode it"):
            read(path)


def test_a_case_of_broken_times():
    with pytest.raises(MediaError, match="its timestamps are invalid"):
        read_row(CASES / "sttsmax.mp4")


def test_times_that_are_short_of_frames_are_taken_on(tmp_path):
    for count, duration in ((20, 1024), (LENGTH, 900)):
        check(with_times(tmp_path / "a.mp4", count, duration), LENGTH)


# Animated images


def animated(path: Path, count: int = 7) -> Path:
    first, *others = [Image.fromarray(frame) for frame in pictures(count)]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=80, loop=0, **options)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.apng", "gif.webp", "webp.png"])
def test_animated_images_are_videos_everywhere(name, tmp_path):
    kind = {"gif.webp": "x.gif", "webp.png": "x.webp"}.get(name, name)
    path = animated(tmp_path / kind).rename(tmp_path / name)
    assert not media.is_image(path)
    full, fps = media.read_video(path)
    assert len(full) == 7 and fps == 12.5
    row = read_row(path)
    assert (row.num_frames, row.height, row.width, row.fps) == (7, 48, 64, 12.5)
    frames, _ = media.read_span(path, lambda total: [0, 4, total - 1])
    np.testing.assert_array_equal(frames, full[[0, 4, 6]])
    assert check_references(str(path)) == [7] and read_reference(str(path), (16, 24)).shape[1] == 7
    make_table(tmp_path, tmp_path / "t.csv")
    sample = VideoTextDataset(tmp_path / "t.csv", num_frames=7, image_size=(16, 16))[0]
    assert sample["fps"] == 12.5 and not (sample["video"][:, 0] == sample["video"][:, 6]).all()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_stills_of_the_same_kinds_are_images(name, tmp_path):
    Image.fromarray(pictures(1)[0]).save(tmp_path / name)
    assert media.is_image(tmp_path / name)
    assert (row := read_row(tmp_path / name)).num_frames == 1 and row.fps is None


def big_gif(path: Path, count: int, side: int) -> Path:
    dot = b"\x21\xf9\x04\0\x04\0\0\0" + b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    path.write_bytes(b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0" + bytes(6) + dot * count + b"\x3b")
    return path


def big_apng(path: Path, count: int, side: int) -> Path:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)),
        chunk(b"acTL", struct.pack(">II", count, 0)),
    ]
    whole, dot = zlib.compress(bytes(side * (side + 1))), zlib.compress(bytes(2))
    parts += [chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, side, side, 0, 0, 1, 10, 0, 0)), chunk(b"IDAT", whole)]
    for number in range(1, 2 * count - 1, 2):
        parts.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 1, 1, 0, 0, 1, 10, 0, 0)))
        parts.append(chunk(b"fdAT", struct.pack(">I", number + 1) + dot))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))
    return path


def big_webp(path: Path, count: int, side: int) -> Path:
    content = animated(path, 2).read_bytes()
    start, frame = content.index(b"VP8X"), content[content.index(b"ANMF") :]
    frame = frame[: 8 + int.from_bytes(frame[4:8], "little")]
    head = bytearray(content[start : content.index(b"ANMF")])
    head[12:18] = (side - 1).to_bytes(3, "little") * 2
    body = b"WEBP" + bytes(head) + frame * count
    path.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)
    return path


@pytest.mark.parametrize(
    ("make", "name", "count", "side"),
    [(big_gif, "a.gif", 4000, 8000), (big_apng, "a.png", 700, 900), (big_webp, "a.webp", 300, 8000),
     (big_gif, "b.gif", 5000, 600)],
)  # fmt: skip
def test_the_pixels_of_animated_images_are_counted_before_they_are_decoded(make, name, count, side, tmp_path):
    path = make(tmp_path / name, count, side)
    for read in (
        read_row,
        media.count_frames,
        lambda file: list(media.iterate_video(file, 4096)),
        lambda file: media.read_span(file, lambda total: [total - 1]),
        lambda file: check_references(str(file)),
    ):
        with pytest.raises(MediaError, match=r"pixels in all, over the limit of 536,870,912; make it smaller"):
            read(path)


def test_the_pixels_of_a_video_for_reference_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    path = encoded(tmp_path / "a.mp4", "h264")
    monkeypatch.setattr(reader, "MAX_DECODED", LENGTH * 48 * 64 - 1)
    with pytest.raises(MediaError, match="36 frames of 48x64, 110,592 pixels in all, over the limit of 110,591"):
        next(media.iterate_video(path, 4096))


@pytest.mark.parametrize("brand", [b"heic", b"avif", b"mif1"])
def test_photos_of_other_kinds_are_named(brand, tmp_path):
    (tmp_path / "a.mp4").write_bytes(struct.pack(">I", 24) + b"ftyp" + brand + bytes(200))
    with pytest.raises(MediaError, match="HEIC or AVIF photo"):
        read_row(tmp_path / "a.mp4")
