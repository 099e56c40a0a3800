"""Bounded reads, bounded JSON, names that stay names, and outputs that are replaced whole or not at all."""

import os

import pytest

from opensora.errors import MediaError, printable
from opensora.files import atomic_write, check_file_name, parse_json, read_bytes


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path, tmp_path / "none", "a\0b", tmp_path / "x\udcff"):
        with pytest.raises(MediaError):
            read_bytes(path, 100)
    with pytest.raises(MediaError, match="larger than 4 bytes"):
        read_bytes(tmp_path / "file", 4)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 60 + "1" + "}" * 60, "1" * 5_000, "1." + "1" * 5_000, "NaN", "-Infinity",
     "{", b"\xff\xfe", f"[{'0,' * 1_000_000}0]"],
)  # fmt: skip
def test_json_out_of_bounds_is_one_error(text):
    with pytest.raises(MediaError, match=r"^here: cannot be read as JSON") as raised:
        parse_json(text, "here")
    assert len(str(raised.value)) < 300


def test_json_within_bounds_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, null]}', "here") == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/b", "a\\b", "C:x", "..", ".", "", ".hidden", "a\nb", "a\x1bb", "x" * 300, 5, None, "x\udcff"],
)
def test_a_path_is_no_plain_name(name):
    with pytest.raises(MediaError, match="not a plain file name"):
        check_file_name(name, "draft")


def test_plain_names_stay():
    for name in ("sample_0000", "ein Käfer.mp4", "a..b"):
        assert check_file_name(name, "draft") == name


@pytest.mark.parametrize("blocked", [0, 1])
def test_old_files_stay_when_one_cannot_be_replaced(tmp_path, blocked):
    paths = [tmp_path / "a.mp4", tmp_path / "a.json"]
    paths[blocked].mkdir()
    paths[1 - blocked].write_text("old")
    with pytest.raises(MediaError), atomic_write(*paths) as new:
        for file in new:
            file.write_text("new")
    assert paths[1 - blocked].read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4"]


def test_controls_are_shown_as_escapes():
    assert printable("a\x1b[31mb\u202ec\n\td\udcff") == "a\\x1b[31mb\\u202ec\n\td\\udcff"
