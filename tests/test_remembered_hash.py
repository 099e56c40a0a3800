"""Hashes of large checkpoints are remembered for the same files alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from opensora.checkpoints import remembered_hash
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.remembered_hash import FileIdentity
from opensora.checkpoints.summary import content_hash


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The tensors that are hashed; any checkpoint is large and settled."""
    found: list[Any] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered_hash, "MIN_BYTES", 1)
    monkeypatch.setattr(remembered_hash, "SETTLED", -1e9)
    monkeypatch.setattr(remembered_hash, "content_hash", lambda tensors: found.append(tensors) or content_hash(tensors))
    return found


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(5.0)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def hash_of(path: Path) -> str:
    identity = FileIdentity(path)
    return identity.content_hash(read_state_dict(path))


def rewrite(path: Path, value: float = 7.0) -> None:
    """Other content of the same size and modification time, in the same inode."""
    stat = path.stat()
    other = path.with_name("other.safetensors")
    save_file({"a": torch.full((5,), value)}, other)
    path.write_bytes(other.read_bytes())
    other.unlink()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_ino == stat.st_ino


def cache() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"], "opensora", "weights.json")


def test_files_are_hashed_once(hashed: list[Any], weights: Path) -> None:
    expected = content_hash(read_state_dict(weights))
    assert [hash_of(weights) for _ in range(3)] == [expected] * 3
    assert len(hashed) == 1


def test_other_content_is_hashed_again(hashed: list[Any], weights: Path) -> None:
    first = hash_of(weights)
    time.sleep(0.02)  # the clock of the file system ticks
    rewrite(weights)
    assert hash_of(weights) == content_hash(read_state_dict(weights)) != first
    moved = weights.rename(weights.with_name("b.safetensors"))
    assert hash_of(moved) == hash_of(moved) and len(hashed) == 3


@pytest.mark.parametrize("remembered", [False, True])
def test_files_that_change_while_they_are_read_are_not_remembered(
    hashed: list[Any], weights: Path, remembered: bool
) -> None:
    if remembered:
        hash_of(weights)
    known = cache().read_bytes() if remembered else b""
    identity, tensors = FileIdentity(weights), {"a": torch.arange(5.0)}
    time.sleep(0.02)
    rewrite(weights)
    assert identity.content_hash(tensors) == content_hash(tensors)
    assert (cache().read_bytes() if cache().exists() else b"") == known
    weights.unlink()
    assert identity.content_hash(tensors) == content_hash(tensors)


def test_files_that_have_just_changed_are_not_remembered(
    hashed: list[Any], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered_hash, "SETTLED", 60.0)
    assert hash_of(weights) == hash_of(weights)
    assert len(hashed) == 2 and not cache().exists()


def test_small_checkpoints_are_always_hashed(hashed: list[Any], weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered_hash, "MIN_BYTES", 10**6)
    assert hash_of(weights) == hash_of(weights)
    assert len(hashed) == 2 and not cache().exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": "b"}', "null", "\0" * 99, '{"' + "0" * 64 + '": 3}'])
def test_a_damaged_cache_is_replaced(hashed: list[Any], weights: Path, content: str) -> None:
    cache().parent.mkdir(parents=True)
    cache().write_text(content)
    assert hash_of(weights) == hash_of(weights) == content_hash(read_state_dict(weights))
    assert len(hashed) == 1 and len(json.loads(cache().read_text())) == 1


def test_an_unwritable_cache_is_no_error(hashed: list[Any], weights: Path) -> None:
    cache().parent.parent.mkdir(parents=True)
    cache().parent.write_text("a file, not a folder")
    assert hash_of(weights) == hash_of(weights)
    assert len(hashed) == 2


def test_the_cache_is_bounded(hashed: list[Any], weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered_hash, "MAX_ENTRIES", 3)
    for number in range(5):
        weights = weights.rename(weights.with_name(f"{number}.safetensors"))
        hash_of(weights)
    assert len(json.loads(cache().read_text())) == 3
    hash_of(weights)
    assert len(hashed) == 5


def test_a_hash_is_of_all_shards(hashed: list[Any], tmp_path: Path) -> None:
    for name in "ab":
        save_file({name: torch.ones(3)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    first = hash_of(index)
    save_file({"b": torch.zeros(3)}, tmp_path / "b.safetensors")
    assert hash_of(index) != first and len(hashed) == 2
