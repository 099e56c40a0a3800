"""Tables of videos: read with clear errors, decoded where needed, cropped by (seed, epoch, row); broken ones aside."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from opensora.datasets import video as media
from opensora.datasets.datasets import (
    VariableVideoTextDataset,
    VideoTextDataset,
    collate,
    frame_indices,
    num_starts,
    to_model_range,
)
from opensora.datasets.quarantine import UnreadableRow
from opensora.datasets.table import TextColumn, read_table
from opensora.datasets.transforms import resize_crop
from opensora.datasets.video import reader
from opensora.errors import ConfigError, MediaError
from tests.full import some

LENGTH = 40


def noise(count: int = LENGTH) -> np.ndarray:
    """Frames that differ from one another wherever one looks."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), dtype=np.uint8)


def write_clip(path: Path, codec: str = "libx264", uneven: bool = False, **options: str) -> Path:
    """A clip of several key frames, and of frames that are not stored in the order in which they are shown."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, 0 if codec == "ffv1" else 2
        shown = 0
        for number, pixels in enumerate(noise()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = shown, Fraction(1, 96)
            shown += 4 + number % 3 * 2 * uneven
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


def table_of(folder: Path, *paths: object, text: str = "a caption") -> Path:
    lines = [f'"{path}","{text}",{LENGTH},32,48' for path in paths]
    (folder / "table.csv").write_text("path,text,num_frames,height,width\n" + "\n".join(lines))
    return folder / "table.csv"


def read(folder: Path, content: str | bytes, name: str = "a.csv"):
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(folder / name)


# Tables


def test_cells_of_every_kind(tmp_path):
    content = (
        "\ufeffnum_frames, path ,text,aspect_ratio,height,width\r\n"
        '51,"a,b.mp4","two\nlines, ""quoted""",0.56,720,1280\r\n\r\n'
        "1.0,ä/東.png,,,n/a,inf\r\n"
        "7,c.mp4\r\n"
    )
    table = read(tmp_path, content)
    assert len(table) == 3
    assert list(table.path) == ["a,b.mp4", "ä/東.png", "c.mp4"]
    assert list(table.text) == ['two\nlines, "quoted"', "", ""]
    nan = np.nan
    for column, expected in zip(table.sizes(), ([51, 1, 7], [720, nan, nan], [1280, nan, nan]), strict=True):
        np.testing.assert_array_equal(column, expected)


@pytest.mark.parametrize("content", ["clips/a.MP4,a cat\nb.png,None\n", "clips/a.MP4,a cat\nb.png,None"])
def test_table_without_a_header(content, tmp_path):
    table = read(tmp_path, content)
    assert list(table.path) == ["clips/a.MP4", "b.png"] and list(table.text) == ["a cat", "None"]
    with pytest.raises(ConfigError, match="no column num_frames, which bucket_config needs"):
        table.sizes()


def test_first_row_that_is_a_file_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clip.webm").touch()
    assert list(read(tmp_path, "clip.webm,a cat\n").path) == ["clip.webm"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,text\na.mp4,b\n", "no column 'path', only file, text; name one so"),
        ("paths,text\na.mp4,b\n", "rename 'paths'"),
        ("", "no rows"),
        ("path,text\n", "no rows"),
        ("path,text\na.mp4,a cat, a dog\n", "'a.mp4' has 3 cells, more than the 2 columns"),
        ("a.mp4,a cat, a dog\n", "3 cells"),
        ('path,text\na.mp4,"a cat\nb.mp4,c\n', "line 3: unexpected end"),
        (b"path,text\na.mp4,\xff\xfe\n", "not UTF-8"),
    ],
)
def test_tables_that_are_refused(content, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, content)


def test_no_table(tmp_path):
    for path, message in ((None, "--data-path"), (tmp_path / "no.csv", "No such file"), ("a.json", "convert it")):
        with pytest.raises(ConfigError, match=message):
            read_table(path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_table(tmp_path / "folder.csv")


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        read(tmp_path, "", "a.parquet")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"text": ["a", None], "path": ["a.mp4", "b.png"], "num_frames": [51, None], "aes": [1.0, 2.0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert list(table.path) == ["a.mp4", "b.png"] and list(table.text) == ["a", ""] and table.height is None
    np.testing.assert_array_equal(table.num_frames, [51, np.nan])
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        read(tmp_path, "path,text\n", "b.parquet")
    parquet.write_table(pyarrow.table({"file": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(ConfigError, match="no column 'path'"):
        read_table(tmp_path / "c.parquet")


def test_texts():
    texts = ["", "a", "", "café 東京\n", "\udc80"]
    packed = TextColumn(texts)
    assert list(packed) == texts and len(packed) == 5 and packed[3] == texts[3]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            packed[index]


# Spans


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {}),
        ("a.mov", "libx264", {"x264-params": "open-gop=1"}),
        ("a.mkv", "libx264", {}),
        ("a.mkv", "ffv1", {}),
        ("a.mp4", "mpeg4", {}),
        ("a.avi", "mpeg4", {}),  # its packets do not say when they are shown
        ("a.ts", "libx264", {}),
    ],
)
@pytest.mark.parametrize("uneven", [False, True])
@some(7)
def test_span_is_what_a_full_decode_gives(name, codec, options, uneven, tmp_path):
    path = write_clip(tmp_path / name, codec, uneven, **options)
    full, fps = media.read_video(path)
    assert len(full) == LENGTH or name == "a.avi"
    last = len(full) - 1
    for indices in ([0], [last], [5, 6, 7], [11, 12], [13], [20, 23, 27, 30], list(range(last + 1))):
        frames, rate = media.read_span(path, lambda total, indices=indices: indices * (total == len(full)))
        assert rate == fps
        assert len(frames) == len(indices)
        for frame, index in zip(frames, indices, strict=True):
            np.testing.assert_array_equal(frame, full[index])


def test_only_the_span_is_decoded(clip, monkeypatch):
    decoded = []
    frames = reader.decode_frames

    def counted(*args, **options):
        for frame in frames(*args, **options):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(reader, "decode_frames", counted)
    media.read_span(clip, lambda total: [30, 31, 32])
    assert 3 <= len(decoded) <= 12  # a group of pictures has 12


def test_span_where_seeking_leads_astray(clip, monkeypatch):
    full, _ = media.read_video(clip)
    monkeypatch.setattr(reader, "_span_from_key", lambda *_: None)
    frames, _ = media.read_span(clip, lambda total: [30, 32], lambda frame: frame[:2])
    np.testing.assert_array_equal(frames, full[[30, 32], :2])


def test_span_keeps_odd_sizes(tmp_path):
    path = media.write_video(noise(4)[:, :31, :47], tmp_path / "a.mp4", 8)
    [frame], fps = media.read_span(path, lambda total: [3])
    assert frame.shape == (31, 47, 3) and fps == 8


def test_span_of_a_file_whose_beginning_was_cut_without_encoding_anew(clip, tmp_path):
    """Its first frames are there, since others need them, and are not shown."""
    import av

    with av.open(str(clip)) as source, av.open(str(tmp_path / "a.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                length = source.streams.video[0].time_base.denominator // 24
                packet.pts, packet.dts, packet.stream = packet.pts - 5 * length, packet.dts - 5 * length, stream
                target.mux(packet)
    full, _ = media.read_video(tmp_path / "a.mp4")
    assert len(full) == LENGTH - 5
    for indices in ([0], [3, 4], [LENGTH - 6]):
        frames, _ = media.read_span(tmp_path / "a.mp4", lambda total, indices=indices: indices * (total == len(full)))
        np.testing.assert_array_equal(frames, full[indices])


def test_span_of_a_file_that_is_cut_off(tmp_path):
    path = media.write_video(noise(), tmp_path / "a.mp4", 8)
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(MediaError, match=r"cut off|cannot be read"):
        media.read_span(path, lambda total: [0])


def test_span_beyond_the_end(clip):
    with pytest.raises(MediaError, match=r"clip.mp4"):
        media.read_span(clip, lambda total: [total])


# Samples


def test_crops():
    for total, num_frames, interval in ((40, 8, 1), (40, 8, 3), (40, 40, 1), (9, 4, 3), (5, 1, 3), (41, 17, 2)):
        for start in range(num_starts(total, num_frames, interval)):
            indices = frame_indices(total, num_frames, interval, start)
            assert len(set(indices)) == num_frames and indices == sorted(indices)
            assert start == indices[0] and indices[-1] < total
    assert num_starts(4, 5, 1) == 0


def test_a_crop_is_a_function_of_seed_epoch_and_row(clip, tmp_path):
    table = table_of(tmp_path, *[clip] * 3)
    full, _ = media.read_video(clip)

    def starts(seed: int, epochs: range = range(6)) -> list[list[int]]:
        data, found = VariableVideoTextDataset(table, seed=seed), []
        for epoch in epochs:
            data.set_epoch(epoch)
            clips = [to_frames(data[f"{row}-38-32-48"]["video"]) for row in range(3)]
            matches = [[start for start in range(3) if (full[start] == one[0]).all()] for one in clips]
            assert all(len(match) == 1 for match in matches)
            found.append([match[0] for match in matches])
        return found

    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = starts(0)
    assert {start for epoch in first for start in epoch} == {0, 1, 2}  # the last frame is used too
    assert first == starts(0) and first != starts(1)
    assert starts(0, range(4, 5)) == first[4:5]
    assert len({tuple(epoch) for epoch in first}) > 3
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()


def to_frames(video: torch.Tensor) -> np.ndarray:
    return media.to_uint8(video)


def test_uint8_is_the_same_but_rounded(clip, tmp_path):
    image = media.write_image(noise(1)[0], tmp_path / "a.png")
    table = table_of(tmp_path, clip, image)
    for index, tolerance in (("0-5-20-20", 0.51 / 127.5), ("1-1-20-20", 1e-6)):
        exact, rounded = (VariableVideoTextDataset(table, as_uint8=as_uint8)[index] for as_uint8 in (False, True))
        assert rounded["video"].dtype == torch.uint8
        assert (to_model_range(rounded["video"]) - exact["video"]).abs().max() <= tolerance
        assert to_model_range(exact["video"]) is exact["video"]


def test_what_models_are_told(clip, tmp_path):
    image = media.write_image(noise(1)[0], tmp_path / "a.png")
    data = VariableVideoTextDataset(table_of(tmp_path, clip, image), frame_interval=5)
    sample = data["0-4-16-32"]
    assert {name: sample[name] for name in sample if name != "video"} == {
        "num_frames": 4, "height": 16, "width": 32, "ar": 0.5, "fps": 4.0, "text": "a caption",
    }  # fmt: skip
    assert data["1-1-16-32"]["fps"] == 120
    assert "text" not in VariableVideoTextDataset(tmp_path / "table.csv", dummy_text_feature=True)["1-1-16-32"]


def test_kind_is_told_by_content_where_the_suffix_is_unknown(clip, tmp_path):
    image = media.write_image(noise(1)[0], tmp_path / "a.png").rename(tmp_path / "a.picture")
    other = (tmp_path / "a.m4v").write_bytes(clip.read_bytes()) and tmp_path / "a.m4v"
    data = VideoTextDataset(table_of(tmp_path, image, other), num_frames=3, image_size=(16, 16))
    assert [data[row]["fps"] for row in (0, 1)] == [120, 24]
    assert (data[0]["video"][:, 0] == data[0]["video"][:, 2]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": None}, "num_frames"),
        ({"frame_interval": 0}, "frame_interval"),
        ({"image_size": 256}, "image_size"),
        ({"image_size": (None, None)}, "image_size"),
        ({"image_size": (16, 24)}, "resize_crop"),
        ({"transform_name": "centre"}, "did you mean 'center'"),
    ],
)
def test_settings_that_are_refused(options, message, clip, tmp_path):
    with pytest.raises(ConfigError, match=message):
        VideoTextDataset(table_of(tmp_path, clip), **options)


def test_settings_of_sizes_are_refused_when_sizes_come(clip, tmp_path):
    data = VariableVideoTextDataset(table_of(tmp_path, clip), transform_name="center")
    assert data["0-2-16-16"]["video"].shape == (3, 2, 16, 16)
    with pytest.raises(ConfigError, match="resize_crop"):
        data["0-2-16-24"]
    for index in (0, "0-2-16", "0-2-16-0", "a-2-16-16"):
        with pytest.raises(ValueError, match=r"row-T-H-W|invalid literal"):
            data[index]


# Broken files


@pytest.fixture
def mixed(clip, tmp_path) -> Path:
    """A table whose rows 1, 2, 4 and 5 give no samples."""
    (tmp_path / "bad.mp4").write_bytes(b"no video at all" * 50)
    image = media.write_image(noise(1)[0], tmp_path / "a.png")
    thin = media.write_image(np.zeros((1, 2000, 3), np.uint8), tmp_path / "thin.png")
    return table_of(tmp_path, clip, tmp_path / "bad.mp4", "", image, thin, tmp_path / "gone.mp4")


def test_broken_rows_are_set_apart(mixed):
    data = VideoTextDataset(mixed, num_frames=2, image_size=(16, 16))
    batch = collate([data[row] for row in range(len(data))])
    assert batch["video"].shape == (2, 3, 2, 16, 16) and batch["fps"].tolist() == [24, 120]
    assert [one.row for one in batch["unreadable"]] == [1, 2, 4, 5]
    reasons = [one.reason for one in batch["unreadable"]]
    for reason, word in zip(reasons, ("cannot be read", "no such file", "thin", "no such file"), strict=True):
        assert word in reason and not reason.startswith(("/", ":"))
    assert list(collate(batch["unreadable"])) == ["unreadable"]


def test_a_clip_shorter_than_its_row_says_and_an_image_for_a_video(mixed):
    data = VariableVideoTextDataset(mixed)
    for index, message in (("0-41-16-16", "40 frames, fewer than the 41"), ("3-9-16-16", "is an image")):
        assert message in data[index].reason
        with pytest.raises(MediaError, match=message):
            data.read(index)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_follow_the_epoch(mixed, persistent):
    data = VideoTextDataset(mixed, num_frames=2, image_size=(16, 16))
    loader = DataLoader(data, 6, collate_fn=collate, num_workers=1, persistent_workers=persistent)
    for epoch in (0, 1, 2):
        data.set_epoch(epoch)
        [batch] = loader
        assert torch.equal(batch["video"][0], data[0]["video"])
        assert all(isinstance(one, UnreadableRow) for one in batch["unreadable"])


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (719, 481), (33, 570), (64, 48)])
@pytest.mark.parametrize("size", [(24, 43), (43, 24), (16, 16), (1, 1)])
def test_picking_pixels_is_scaling_the_picture(height: int, width: int, size: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    scale = max(size[0] / height, size[1] / width)
    scaled = [max(round(side * scale), least) for side, least in zip((height, width), size, strict=True)]
    levels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    whole = torch.nn.functional.interpolate(levels, scaled, mode="bilinear")
    top, left = ((have - want) // 2 for have, want in zip(scaled, size, strict=True))
    expected = whole[..., top : top + size[0], left : left + size[1]].transpose(0, 1)
    torch.testing.assert_close(resize_crop(frames, size), expected, atol=2e-6, rtol=0)
