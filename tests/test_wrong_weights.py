"""Files that are given as weights and are none, or not all of them: each is told as what it is, in one line."""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import pickletools
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from opensora.checkpoints import inspect
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.key_mapping import Drop
from opensora.checkpoints.pickles import MAX_BYTES, read_pickled
from opensora.checkpoints.read import read_metadata, read_state_dict
from opensora.checkpoints.save import save_file, save_pretrained
from opensora.errors import WeightsError
from tests.zoo import SMALL, stdit

CASES = Path(__file__).parent / "cases" / "checkpoints"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 26900000\n" % (b"a" * 64)
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x032.1:\x9a\x01"


def refusal(source: Path) -> str:
    """The message with which `opensora inspect` refuses a file, which is one line and takes no time."""
    begin = time.process_time()
    with pytest.raises(WeightsError) as caught:
        inspect(source)
    assert time.process_time() - begin < 5
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and str(source.name) in message
    return message


def tar(name: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return content.getvalue()


def archive(*names: str, **contents: bytes) -> bytes:
    """A zip archive of these files."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in (*names, *contents):
            file.writestr(name, contents.get(name, b"x"))
    return content.getvalue()


KINDS = {
    "a pointer": (LFS, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "a pointer of Windows": (LFS.replace(b"\n", b"\r\n"), "is a Git LFS pointer"),
    "a page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page, not the file itself"),
    "a page with blanks": (b"\xef\xbb\xbf \n<HTML><p>404</p>", "is a web page"),
    "an XML error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "an answer": (b"Entry not found", "is a text file, not weights"),
    "JSON": (b'{"error": "Repository not found"}\n', "is a text file, not weights"),
    "nothing": (b"", "is empty"),
    "zeros": (bytes(5000), "begins with nothing but zeros"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "its content is that of a .gguf file: rename it"),
    "ONNX": (ONNX + bytes(64), "is an ONNX program"),
    "gzip": (gzip.compress(b"x" * 1000), "is a compressed archive; unpack it"),
    "xz": (b"\xfd7zXZ\0" + bytes(64), "is a compressed archive"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(64), "is a compressed archive"),
    "tar": (tar("model.pt"), "is a tar archive; unpack it"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file"),
    "NumPy": (b"\x93NUMPY\x01\0" + bytes(64), "is a NumPy array"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "is an image"),
    "a video": (b"\0\0\0\x20ftypisom" + bytes(64), "is a video"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "x.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_file_are_told(tmp_path: Path, kind: str, name: str) -> None:
    content, told = KINDS[kind]
    (tmp_path / name).write_bytes(content)
    assert f"{name}: {told}" in refusal(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=name):  # in a folder as well
        read_state_dict(tmp_path)


@pytest.mark.parametrize("kind", ["a pointer", "a page", "nothing", "zeros"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_other_kinds_of_json_are_told(tmp_path: Path, kind: str, name: str) -> None:
    save_pretrained({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path, {}, max_shard_bytes=12)
    (tmp_path / name).write_bytes(KINDS[kind][0])
    with pytest.raises(WeightsError, match=rf"{name}: {KINDS[kind][1][:12]}"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("m/code/__torch__.py", "m/data.pkl", "m/constants.pkl"), "a TorchScript program, not weights"),
        (("m/data.pkl", "m/constants.pkl"), "a TorchScript program, not weights"),
        (("weights/model.pt", "readme.txt"), "an archive of other files; unpack it"),
        (("a.npy", "b.npy"), "an archive of NumPy arrays"),
        (("word/document.xml",), "an archive of other files"),
        ((), "an archive of other files"),
    ],
)
def test_other_archives_are_told(tmp_path: Path, names: tuple[str, ...], told: str) -> None:
    (tmp_path / "x.pt").write_bytes(archive(*names) if names else archive("empty"))
    assert told in refusal(tmp_path / "x.pt")


def test_a_real_torchscript_program(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "x.pt")
    assert "torch.jit.load(FILE).state_dict()" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("x.ckpt", "its content is that of a .pt file: rename it"),
        ("x.pt.incomplete", "is an unfinished download"),
        ("model.safetensors.part", "is an unfinished download"),
        ("x.onnx", "its content is that of a .pt file"),
    ],
)
def test_other_names_are_told(tmp_path: Path, name: str, told: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    assert told in refusal(tmp_path / name)


def test_a_folder_of_unfinished_downloads(tmp_path: Path) -> None:
    for name in ("model.safetensors.incomplete", "vae.pt.crdownload", "pytorch_model.bin.aria2"):
        (tmp_path / name).touch()
        assert f"holds an unfinished download alone ({name})" in refusal(tmp_path)
        (tmp_path / name).unlink()


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


PAYLOADS: dict[str, tuple[Callable[[], object], str]] = {
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, "entry 'a' is a sparse tensor"),
    "csr": (lambda: {"a": torch.eye(3).to_sparse_csr()}, "entry 'a' is a sparse tensor"),
    "meta": (lambda: {"a": torch.zeros(3, device="meta")}, "entry 'a' is a meta tensor, which has no values"),
    "quantized": (lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "a quantized tensor"),
    "complex": (lambda: {"a": torch.zeros(3, dtype=torch.complex64)}, "entry 'a' is a complex tensor"),
    "conjugate": (lambda: {"a": torch.ones(3, dtype=torch.complex64).conj()}, "a conjugate or negative view"),
    "negative": (lambda: {"a": torch.ones(3, dtype=torch.complex64).conj().imag}, "a conjugate or negative view"),
    "nested": (lambda: {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, "a nested tensor"),
    "whole numbers": (lambda: {0: torch.zeros(1), 1: torch.zeros(1)}, "its keys are integers"),
    "a number among names": (lambda: {"a": torch.zeros(1), 1: torch.zeros(1)}, "the name '1' is not a string"),
    "an optimizer": (lambda: {"optimizer": {"state": {}}, "step": 3}, "holds the state of a training run"),
    "groups": (lambda: {"state": {}, "param_groups": [{"lr": 1}]}, "holds the state of a training run"),
    "a list": (lambda: [torch.zeros(1)], "holds a list, not a state dict"),
    "a tensor": (lambda: torch.zeros(2), "holds a tensor, not a state dict"),
    "a text": (lambda: "weights", "holds a str, not a state dict"),
    "a dict in it": (lambda: {"a": {"b": torch.zeros(1)}}, "entry 'a' is a dict, not a plain tensor"),
    "tuples as names": (lambda: {("a", 1): torch.zeros(1)}, "keys that are neither strings nor numbers"),
    "an expanded view": (lambda: {"a": torch.zeros(1).expand(10**6, 10**6)}, "its tensors repeat"),
    "tied too often": (lambda: dict.fromkeys(map(str, range(500)), torch.zeros(10**4)), "its tensors repeat"),
    "deep wrappers": (lambda: _wrapped(20), "more than 8 dicts inside one another"),
}


def _wrapped(depth: int) -> object:
    return {"model": _wrapped(depth - 1)} if depth else {"a": torch.zeros(1)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", PAYLOADS)
def test_odd_values_are_told(tmp_path: Path, kind: str, zipped: bool) -> None:
    make, told = PAYLOADS[kind]
    torch.save(make(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert told in refusal(tmp_path / "x.pt")


class Pickle:
    """Builds a pickle opcode by opcode."""

    def __init__(self) -> None:
        self.content = b"\x80\x02"

    def add(self, *parts: bytes) -> Pickle:
        self.content += b"".join(parts)
        return self

    @staticmethod
    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    @staticmethod
    def number(value: int) -> bytes:
        encoded = pickle.encode_long(value)
        return b"\x8a" + bytes([len(encoded)]) + encoded


def tensor(numel: int, size: int, stride: int = 1, offset: int = 0, name: bytes = b"torch FloatStorage") -> bytes:
    """{"a": a tensor of one axis}, of a storage "0"."""
    storage = Pickle.text("storage") + b"c" + name.replace(b" ", b"\n") + b"\n" + Pickle.text("0") + Pickle.text("cpu")
    parts = b"(" + storage + Pickle.number(numel) + b"tQ" + Pickle.number(offset)
    shape = Pickle.number(size) + b"\x85" + Pickle.number(stride) + b"\x85"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + parts + shape + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + Pickle.text("a") + call + b"s."


def nest(levels: int, open_: bytes = b")") -> bytes:
    """Tuples of twice the tuple before, as a key: hashing it takes 2^levels steps."""
    twice = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))
    return b"\x80\x02" + open_ + twice + b"q\xff}h\xffK\x01s."


def self_containing(key: str) -> bytes:
    return b"\x80\x02}q\x00" + Pickle.text(key) + b"h\x00s."


HOSTILE: dict[str, tuple[bytes, str]] = {
    "tuples as a key": (nest(40), "neither strings nor numbers"),
    "tuples as a key, lists inside": (nest(40, b"]"), "neither strings nor numbers"),
    "tuples in a set": (nest(40)[:-6] + b"cbuiltins\nset\nh'\x85R.", "not a state dict"),
    "model in itself": (self_containing("model"), "more than 8 dicts inside one another"),
    "ema in itself": (self_containing("ema"), "more than 8 dicts inside one another"),
    "state_dict in itself": (self_containing("state_dict"), "more than 8 dicts inside one another"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "holds a list, not a state dict"),
    "other in itself": (self_containing("x"), "entry 'x' is a dict"),
    "a bytearray of 10^12": (
        b"\x80\x02}" + Pickle.text("a") + b"cbuiltins\nbytearray\n" + Pickle.number(10**12) + b"\x85Rs.", "is bytes",
    ),
    "a tensor of 10^12": (
        b"\x80\x02}" + Pickle.text("a") + b"ctorch\nTensor\n" + Pickle.number(10**12) + b"\x85Rs.", "torch.Tensor",
    ),
    "a large number": (b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"\x01.", "truncated, damaged"),
    "a large text": (b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"abc.", "truncated, damaged"),
    "digits": (b"\x80\x02I" + b"9" * 100_000 + b"\n.", "truncated, damaged"),
    "many opcodes": (b"\x80\x02" + b"N0" * 600_000 + b"N.", "truncated, damaged"),
    "many marks": (b"\x80\x02" + b"(" * 600_000 + b".", "nested too deep"),
    "many memos": (b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", i) for i in range(600_000)) + b".", "steps"),
    "a list read often": (
        b"\x80\x02](" + b"N" * 1000 + b"eq\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 10_000 + b".",
        "truncated, damaged",
    ),
    "a tensor of itself": (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00Nh\x00NtR.", "truncated, damaged",
    ),
    "a storage of 10^15": (tensor(10**15, 1), "lacks a storage"),
    "a view beyond its storage": (tensor(1, 100), "exceeds its storage"),
    "a view far away": (tensor(1, 1, offset=2**40), "exceeds its storage"),
    "a view with a negative step": (tensor(1, 1, stride=-1), "a size is not an integer"),
    "a view with a huge step": (tensor(1, 2, stride=2**62), "exceeds its storage"),
    "a view of 10^18 values": (tensor(1, 10**18, stride=0), "its tensors repeat"),
    "no end": (b"\x80\x02}", "truncated, damaged"),
    "an empty stack": (b"\x80\x02.", "truncated, damaged"),
    "a command": (b"\x80\x02cposix\nsystem\n" + Pickle.text("touch ran") + b"\x85R.", "to run code (posix.system)"),
    "an import": (b"\x80\x02ctorch._dynamo\nreset\n)R.", "to run code (torch._dynamo.reset)"),
    "another opcode": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "truncated, damaged"),
}  # fmt: skip


def zipped(content: bytes) -> bytes:
    """An archive of torch.save with this pickle and a storage of one value."""
    return archive("x/version", **{"x/data.pkl": content, "x/byteorder": b"little", "x/data/0": bytes(4)})


def old_style(content: bytes) -> bytes:
    """A file as PyTorch wrote it before 1.6, with this pickle and a storage of one value."""
    head = [pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*head, content, pickle.dumps(["0"], 2), struct.pack("<q", 1), bytes(4)])


@pytest.mark.parametrize("form", [zipped, old_style, bytes])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_end_at_once(tmp_path: Path, kind: str, form: Callable[[bytes], bytes]) -> None:
    content, told = HOSTILE[kind]
    (tmp_path / "x.pt").write_bytes(form(content))
    message = refusal(tmp_path / "x.pt")
    if form is zipped or "to run code" in told:
        assert told in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [("tuple_hash_bomb.pt", "truncated, damaged"), ("selfref.pt", "dicts inside"), ("lfs.safetensors", "git lfs pull")],
)
def test_given_cases(name: str, told: str) -> None:
    assert told in refusal(CASES / name)


@pytest.mark.parametrize(
    "damage", ["data.pkl is compressed", "a storage is compressed", "too large", "big-endian", "cut", "encrypted"]
)
def test_hostile_archives_end_at_once(tmp_path: Path, damage: str) -> None:
    contents = {"x/data.pkl": tensor(1, 1), "x/byteorder": b"little", "x/data/0": bytes(4)}
    how = dict.fromkeys(contents, zipfile.ZIP_STORED)
    if damage == "data.pkl is compressed":
        contents["x/data.pkl"] = bytes(50 * 2**20)
        how["x/data.pkl"] = zipfile.ZIP_DEFLATED
    elif damage == "a storage is compressed":
        contents["x/data/0"], how["x/data/0"] = bytes(2**20), zipfile.ZIP_DEFLATED
    elif damage == "too large":
        contents["x/data.pkl"] = bytes(MAX_BYTES + 1)
    elif damage == "big-endian":
        contents["x/byteorder"] = b"big"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, content in contents.items():
            out.writestr(name, content, how[name])
    written = file.getvalue()
    if damage == "cut":  # a storage that reaches beyond the file
        at = written.index(b"PK\x01\x02", written.index(b"x/data/0", len(written) // 2) - 60)
        written = written[: at + 20] + struct.pack("<II", 10**9, 10**9) + written[at + 28 :]
    elif damage == "encrypted":
        at = written.rindex(b"x/data.pkl") - 46
        written = written[: at + 8] + b"\x01" + written[at + 9 :]
    (tmp_path / "x.pt").write_bytes(written)
    assert "x.pt: truncated, damaged or not a PyTorch checkpoint (" in refusal(tmp_path / "x.pt")


def header(text: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = {
    "a length of 2^63": header("{}", length=2**63),
    "a length beyond the end": header("{}", length=3),
    "brackets": header("[" * 100_000),
    "deep": header('{"a":' * 1000 + "1" + "}" * 1000),
    "digits": header('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("9" * 5000), bytes(4)),
    "a list": header("[1, 2]"),
    "numbers": header('{"a": 3}'),
    "no type": header('{"a": {"shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
    "a list as type": header('{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
    "another type": header(f'{{"a": {ENTRY.replace("F32", "F6_E2M3")}}}', bytes(4)),
    "complex": header('{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}', bytes(8)),
    "no data": header(f'{{"a": {ENTRY}}}'),
    "negative": header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
    "huge": header('{"a":{"dtype":"F32","shape":[1000000000,1000000000,1000000000],"data_offsets":[0,4]}}', bytes(4)),
    "overlap": header(f'{{"a": {ENTRY}, "b": {ENTRY}}}', bytes(4)),
    "not UTF-8": header(b'{"\xff\xfe": 3}'),
    "NUL": header("\0" * 100),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_headers_end_at_once(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(HEADERS[kind])
    refusal(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"x\.safetensors") as caught:
        read_metadata(tmp_path / "x.safetensors")
        read_state_dict(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_strange_names_are_shown_on_one_short_line(tmp_path: Path, suffix: str) -> None:
    for name in ("a\nb\x1b[31m", "x" * 100_000, "\u202eevil", "\ud800"):
        if suffix == ".pt" or name != "\ud800":
            save_file({name: torch.zeros(1)}, tmp_path / f"x{suffix}")
            assert str(inspect(tmp_path / f"x{suffix}")).startswith(str(tmp_path))
            with pytest.raises(WeightsError, match="does not fit Linear") as caught:
                load_weights(nn.Linear(1, 1), tmp_path / f"x{suffix}")
            message = str(caught.value)
            assert message.isprintable() and len(message) < 1000


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_are_those_of_torch(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    base = torch.arange(24).reshape(4, 6).to(dtype)
    state = {"a": base, "turned": base.T, "slice": base[1:3, ::2], "scalar": base[0, 1], "empty": base[:0]}
    state |= {"tied": base, "parameter": nn.Parameter(base, requires_grad=False)}
    torch.save({"model": state, "epoch": 3, "lr": 0.1, "name": "x", "none": None}, tmp_path / "x.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    found = read_state_dict(tmp_path / "x.pt")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        one, other = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (found[name], tensor))
        assert torch.equal(one, other)


def test_the_state_of_a_module_with_its_metadata(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    loaded = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    load_weights(loaded, tmp_path / "x.pt")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_file_is_mapped_and_never_written(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    read_state_dict(tmp_path / "x.pt")["a"].add_(1)
    assert (tmp_path / "x.pt").read_bytes() == before


def test_opcodes_are_those_of_torch_save(tmp_path: Path) -> None:
    """What torch.save writes for a training state with everything usual in it can be read."""
    state = {"a": nn.Parameter(torch.zeros(2)), "size": torch.Size([2]), "device": torch.device("cpu"), "x": b"bytes"}
    state |= {"set": {1, 2}, "dtype": torch.float32, "long": 2**40, "t": (1, 2, 3, 4), "l": [1, None, True, 2.5]}
    torch.save(state, tmp_path / "x.pt")
    value = read_pickled(tmp_path / "x.pt").value
    assert value.keys() == state.keys() and value["long"] == 2**40 and value["l"] == [1, None, True, 2.5]
    content = zipfile.ZipFile(tmp_path / "x.pt").read("x/data.pkl")
    assert len(list(pickletools.genops(content))) > 50


class Model(nn.Module):
    """Names as deep as those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        self.head = nn.Linear(2, 1)


WRAPPED = {
    "compiled": (lambda name: f"_orig_mod.{name}", ("_orig_mod.",)),
    "data parallel": (lambda name: f"module.{name}", ("module.",)),
    "Lightning": (lambda name: f"model.diffusion_model.{name}", ("model.diffusion_model.",)),
    "both": (lambda name: f"_orig_mod.module.{name}", ("_orig_mod.", "module.")),
    "both, the other way": (lambda name: f"module._orig_mod.{name}", ("module.", "_orig_mod.")),
    "twice": (lambda name: f"module.module.{name}", ("module.", "module.")),
    "all": (lambda name: f"module.model.diffusion_model._orig_mod.{name}",
            ("module.", "model.diffusion_model.", "_orig_mod.")),
    "compiled blocks": (lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."), ("_orig_mod.",)),
    "checkpointed blocks": (
        lambda name: f"module.{name.replace('blocks.', 'blocks._checkpoint_wrapped_module.')}",
        ("module.", "_checkpoint_wrapped_module."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_known_wrappers_are_stripped_and_said(tmp_path: Path, kind: str, suffix: str) -> None:
    wrap, stripped = WRAPPED[kind]
    state = Model().state_dict()
    save_file({wrap(name): value for name, value in state.items()}, tmp_path / f"x{suffix}")
    model = Model()
    summary = load_weights(model, tmp_path / f"x{suffix}")
    assert summary.stripped == stripped and not summary.renamed
    assert f", stripped {', '.join(stripped)}" in str(summary)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.diffusion_model."])
def test_a_mixture_of_names_is_refused(tmp_path: Path, prefix: str) -> None:
    state = Model().state_dict()
    names = list(state)
    mixed = {(f"{prefix}{name}" if name in names[:3] else name): value for name, value in state.items()}
    save_file(mixed, tmp_path / "x.pt")
    for strict in (True, False):
        with pytest.raises(WeightsError, match=rf"3 of 8 names begin with `{prefix}`, the others do not"):
            load_weights(Model(), tmp_path / "x.pt", strict=strict)


@pytest.mark.parametrize("prefix", ["foo.", "ema_model.net.", "generator."])
def test_an_unknown_prefix_is_named(tmp_path: Path, prefix: str) -> None:
    save_file({f"{prefix}{name}": value for name, value in Model().state_dict().items()}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=rf"all names begin with `{prefix}`, the model's do not: write the file"):
        load_weights(Model(), tmp_path / "x.pt")
    assert f"all names begin with: {prefix}" in str(inspect(tmp_path / "x.pt"))


@pytest.mark.parametrize(
    "names",
    [
        ("base_model.model.blocks.0.attn.qkv.lora_A.weight", "base_model.model.blocks.0.attn.qkv.lora_B.weight"),
        (
            "lora_unet_blocks_0_attn.lora_down.weight",
            "lora_unet_blocks_0_attn.lora_up.weight",
            "lora_unet_blocks_0.alpha",
        ),
        ("transformer.blocks.0.attn.to_q_lora.up.weight", "transformer.blocks.0.attn.to_q_lora.down.weight"),
        ("blocks.0.hada_w1_a", "blocks.0.hada_w1_b"),
        ("blocks.0.lora_A.default.weight",),
    ],
)
def test_adapters_are_told(tmp_path: Path, names: tuple[str, ...]) -> None:
    save_file(dict.fromkeys(names, torch.zeros(2, 2)), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"is an adapter, not a model \(.*\); give it with --lora"):
        load_weights(Model(), tmp_path / "x.safetensors")
    assert inspect(tmp_path / "x.safetensors").family.startswith("adapter")


def test_adapters_by_their_folder_and_within_a_model(tmp_path: Path) -> None:
    save_file({"prompt_embeddings": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match="is an adapter"):
        load_weights(Model(), tmp_path)
    state = Model().state_dict()
    state |= {"head.base_layer.weight": torch.zeros(1, 2), "head.lora_A.weight": torch.zeros(1, 2)}
    save_file(state, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="is a model with an adapter in it"):
        load_weights(Model(), tmp_path / "x.pt")


@pytest.mark.parametrize(("name", "size"), [("hidden_size", 64), ("depth", 3), ("caption_channels", 16)])
def test_a_file_without_its_config_json(tmp_path: Path, name: str, size: int) -> None:
    from opensora.checkpoints import builder

    stdit(tmp_path / "x.pth")
    section = dict(type="STDiT", **SMALL, caption_channels=32, model_max_length=120)
    own = {"hidden_size": 48, "depth": 2, "caption_channels": 32}
    model = builder.build_model({**section, name: size}, tmp_path / "x.pth", {"input_size": (1, 4, 4)})
    with pytest.raises(WeightsError) as caught:
        load_weights(model, tmp_path / "x.pth")
    message = str(caught.value)
    assert "there is no config.json beside this file to say the sizes" in message
    assert f"{name} {own[name]} in the file and {size} in the model" in message
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"config\.json beside this file is not read for this name; give the folder"):
        load_weights(model, tmp_path / "x.pth")


def shards(folder: Path, weight_map: dict[str, str], held: dict[str, dict[str, Tensor]]) -> Path:
    for file, tensors in held.items():
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


A, B = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"1.safetensors": {"a": A, "b": A}, "2.safetensors": {"b": B}}, "1.safetensors: holds tensors that .*: b;"),
        ({"1.safetensors": {"a": A}, "2.safetensors": {"a": B, "b": B}}, "2.safetensors: holds tensors that .*: a;"),
        ({"1.safetensors": {"a": A}, "2.safetensors": {"b": B, "c": B}}, "2.safetensors: holds tensors that .*: c;"),
        ({"1.safetensors": {"a": A}, "2.safetensors": {"c": B}}, "2.safetensors: lacks tensors that .*: b;"),
    ],
)
def test_shards_give_what_the_index_promises(tmp_path: Path, held: dict[str, dict[str, Tensor]], told: str) -> None:
    shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, held)
    with pytest.raises(WeightsError, match=told):
        read_state_dict(tmp_path)
    assert read_state_dict(tmp_path / "2.safetensors")  # by itself


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors", "model.safetensors.index.json"),
        ("model.safetensors", "diffusion_pytorch_model.safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ],
)
def test_two_checkpoints_in_a_folder_are_not_chosen_from(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match="several checkpoints in this folder"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, suffix: str, value: float, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in Model().state_dict().items()}
    state["blocks.1.weight"][0, 1] = value
    save_file(state, tmp_path / f"x{suffix}")
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"non-finite values \(NaN, infinity\) in blocks\.1\.weight;"):
        load_weights(model, tmp_path / f"x{suffix}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert inspect(tmp_path / f"x{suffix}").not_finite == ("blocks.1.weight",)


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [
        (1e6, torch.float16, False),
        (6e4, torch.float16, True),
        (-1e5, torch.float16, False),
        (1e6, torch.bfloat16, True),
    ],
)
def test_weights_too_large_for_their_type_are_refused(
    tmp_path: Path, value: float, dtype: torch.dtype, fits: int
) -> None:
    state = Model().state_dict()
    state["head.bias"][0] = value
    save_file(state, tmp_path / "x.pt")
    if fits:
        load_weights(Model(), tmp_path / "x.pt", dtype=dtype)
    else:
        with pytest.raises(WeightsError, match=r"head\.bias has values up to .*, too large for float16; use --dtype"):
            load_weights(Model(), tmp_path / "x.pt", dtype=dtype)


def test_numbers_that_nothing_reads_do_not_count(tmp_path: Path) -> None:
    save_file({**Model().state_dict(), "pos_embed": torch.full((2,), math.nan)}, tmp_path / "x.pt")
    assert load_weights(Model(), tmp_path / "x.pt", mapping=(Drop("pos_embed"),)).dropped == ("pos_embed",)
