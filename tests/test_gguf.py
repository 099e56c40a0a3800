"""GGUF files: written by the `gguf` package, read packed; hostile ones are refused in one line."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from opensora.acceleration.packed_tensor import PackedTensor
from opensora.checkpoints import builder, convert, inspect
from opensora.checkpoints.gguf import ORIGINAL_SHAPE
from opensora.checkpoints.gguf_header import MAX_VALUES, read_gguf_header
from opensora.checkpoints.hub import locate
from opensora.checkpoints.read import is_packed, read_state_dict
from opensora.cli import main
from opensora.config import load_config
from opensora.errors import WeightsError
from tests.full import count, some
from tests.gguf_files import quantized, random_blocks, write_gguf, write_t5_gguf

CPU = torch.device("cpu")
T5 = locate("embedded:text_encoder")
CONFIG = json.loads((T5 / "config.json").read_text())
PROMPTS = ["a red circle moving right on a black background", "two blue squares", "A small, green; star?!"]


def load_t5(path: Path, dtype: torch.dtype = torch.float32) -> builder.Any:
    section = {"type": "t5", "from_pretrained": str(path), "model_max_length": 32}
    encoder = builder.build_text_encoder(section, path, dtype)
    builder.load_text_encoder_weights(encoder, section, path, CPU)
    return encoder


@pytest.fixture(scope="module")
def exact() -> builder.Any:
    return load_t5(T5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_types(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(7).to(dtype)}
    found = read_state_dict(write_gguf(tmp_path / "a.gguf", tensors))
    if dtype == torch.bfloat16:  # written as bytes
        found = {name: tensor.view(tensors[name].shape) for name, tensor in found.items()}
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_packed_types(tmp_path: Path, name: str) -> None:
    raw = random_blocks(name, 8, 512)
    found = read_state_dict(write_gguf(tmp_path / "a.gguf", {"a.weight": (raw, name), "b": torch.ones(2)}))
    assert isinstance(found["a.weight"], PackedTensor) and found["a.weight"].format == name
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    expected = gguf.quants.dequantize(reader.tensors[0].data, reader.tensors[0].tensor_type)
    assert torch.equal(found["a.weight"].unpack(), torch.from_numpy(expected))
    assert is_packed(tmp_path / "a.gguf")


class TestT5:
    @pytest.fixture(params=["Q8_0", "Q5_1", "Q4_0"])
    def file(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        return write_t5_gguf(T5, tmp_path / f"t5-{request.param}.gguf", request.param, CONFIG)

    @some(2)
    def test_one_file_is_an_encoder_with_its_tokenizer(self, exact: builder.Any, file: Path) -> None:
        encoder = load_t5(file)
        config = encoder.model.config
        assert config.layer_norm_epsilon == pytest.approx(1e-6)  # stored in float32
        assert config == exact.model.config._replace(layer_norm_epsilon=config.layer_norm_epsilon)
        for prompt in PROMPTS:
            assert encoder.tokenizer.ids(prompt, 32) == exact.tokenizer.ids(prompt, 32)
        packed = [name for name, one in encoder.model.state_dict().items() if isinstance(one, PackedTensor)]
        assert len(packed) == 3 * 7 + 2  # and the embedding, under two names
        features, mask = encoder.encode(PROMPTS)
        wanted, wanted_mask = exact.encode(PROMPTS)
        assert torch.equal(mask, wanted_mask)
        error = (features - wanted).norm() / wanted.norm()
        assert 1e-4 < error < {"Q8_0": 0.02, "Q5_1": 0.1, "Q4_0": 0.25}[file.stem[3:]]

    @some(2)
    def test_features_are_those_of_the_unpacked_weights(self, file: Path, tmp_path: Path) -> None:
        convert(str(file), str(tmp_path / "plain.safetensors"), "safetensors")
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain.safetensors").rename(tmp_path / "plain" / "model.safetensors")
        for name in ("config.json", "spiece.model", "tokenizer_config.json"):
            (tmp_path / "plain" / name).write_bytes((T5 / name).read_bytes())
        assert torch.equal(load_t5(file).encode(PROMPTS)[0], load_t5(tmp_path / "plain").encode(PROMPTS)[0])

    @some(2)
    def test_inspect_tells_it(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(file)]) == 0
        printed = capsys.readouterr().out
        assert file.stem[3:] in printed and "family: T5 text encoder (llama.cpp's names)" in printed

    def test_the_tokenizer_beside_a_file_without_one(self, exact: builder.Any, tmp_path: Path) -> None:
        file = write_t5_gguf(T5, tmp_path / "t5.gguf", "Q8_0", CONFIG, tokenizer=False)
        with pytest.raises(WeightsError, match="no T5 tokenizer"):
            load_t5(file)
        for name in ("spiece.model", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((T5 / name).read_bytes())
        assert load_t5(file).tokenizer.ids(PROMPTS[0], 32) == exact.tokenizer.ids(PROMPTS[0], 32)
        assert builder.tokenizer_sha256(file) == builder.tokenizer_sha256(T5)

    @some(2)
    def test_half_precision(self, exact: builder.Any, file: Path) -> None:
        features = load_t5(file, torch.bfloat16).encode(PROMPTS[:1])[0]
        wanted = exact.encode(PROMPTS[:1])[0]
        assert (features - wanted).norm() / wanted.norm() < 0.3

    def test_relu_layers(self, tmp_path: Path) -> None:
        """T5 1.0 has no gate."""
        tensors = {"token_embd.weight": torch.ones(8, 32), "enc.blk.0.ffn_up.weight": torch.ones(64, 32)}
        file = write_gguf(tmp_path / "t5.gguf", tensors, "t5", lambda writer: writer.add_embedding_length(32))
        config = builder.t5_config(builder.t5_header(file))
        assert config == {"d_model": 32, "feed_forward_proj": "relu", "vocab_size": 8}


class TestTransformer:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """The embedded model as ComfyUI-GGUF's converter writes models: its own names, at most 4 dimensions."""
        folder, source = tmp_path / "model", locate("embedded:stdit3")
        folder.mkdir()
        tensors: dict[str, Tensor | tuple] = {}
        shapes: dict[str, list[int]] = {}
        for name, tensor in read_state_dict(source).items():
            if tensor.ndim > 4:
                shapes[name], tensor = list(tensor.shape), tensor.flatten(0, -4)
            large = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and name.endswith("weight") and "blocks" in name
            tensors[name] = quantized(tensor, "Q8_0") if large else tensor.float()

        def metadata(writer: gguf.GGUFWriter) -> None:
            for name, shape in shapes.items():
                writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)

        write_gguf(folder / "model.gguf", tensors, "stdit3", metadata)
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        assert shapes
        return folder

    def test_a_model_of_ours(self, folder: Path) -> None:
        section = {**load_config("embedded")[0]["model"], "from_pretrained": str(folder)}
        model = builder.build_model(section, folder, {"input_size": (5, 8, 8)})
        builder.load_model_weights(model, section, folder, CPU, torch.float32)
        exact = read_state_dict(locate("embedded:stdit3"))
        packed = 0
        for name, tensor in model.state_dict().items():
            packed += isinstance(tensor, PackedTensor)
            difference = (tensor.float() + 0 - exact[name].float()).norm() / exact[name].float().norm()
            assert difference < 0.01, name
        assert packed == 2 * 6 * 7

    def test_it_generates(self, folder: Path, tmp_path: Path) -> None:
        argv = ["generate", "a red circle", "--num-frames", "5", "--image-size", "16", "16", "--device", "cpu"]
        argv += ["--num-sampling-steps", "2", "--verbose", "0", "--ckpt-path", str(folder), "--seed", "1"]
        assert main([*argv, "--output", str(tmp_path / "a.mp4")]) == 0
        assert main([*argv, "--linear", "int8", "--output", str(tmp_path / "b.mp4")]) == 0
        assert "Q8_0" in str(inspect(folder))


def a_file(path: Path) -> bytes:
    tensors = {"a.weight": (random_blocks("Q8_0", 8, 64), "Q8_0"), "b": torch.ones(3, 4)}
    return write_gguf(path, tensors, more=lambda writer: writer.add_array("list", ["x", "y"])).read_bytes()


def header(tensors: int = 0, keys: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: str | bytes, size: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if size is None else size) + raw


def tensor(name: str = "a", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


U32 = struct.pack("<I", 4)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "version 1": (header(version=1), "GGUF version 1 is not read here"),
    "big-endian": (header(version=3 << 24), "is not read here (known are 2 and 3, little-endian)"),
    "many tensors": (header(tensors=2**63), "lists 9,223,372,036,854,775,808 tensors"),
    "many keys": (header(keys=2**40), "and 1,099,511,627,776 keys"),
    "no content": (header(keys=1), "ends too early"),
    "a long key": (header(keys=1, rest=text(b"k", 2**50)), "holds a text of"),
    "a long text": (header(keys=1, rest=text("k") + struct.pack("<I", 8) + text(b"v", 2**63)), "holds a text of"),
    "not UTF-8": (header(keys=1, rest=text(b"\xff\xfe") + bytes(8)), "that is not UTF-8"),
    "unknown value": (header(keys=1, rest=text("k") + struct.pack("<I", 99) + bytes(8)), "value of unknown type 99"),
    "nested lists": (
        header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)), "value of unknown type 9",
    ),
    "a long list": (
        header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 4, 2**62)), f"more than {MAX_VALUES:,} values",
    ),
    "a cut list": (header(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 4, 100) + bytes(64)), "ends too early"),
    "twice a key": (header(keys=2, rest=2 * (text("k") + U32 + U32)), "lists k twice"),
    "alignment 0": (header(keys=1, rest=text("general.alignment") + U32 + bytes(4)), "alignment is no multiple of 8"),
    "alignment text": (
        header(keys=1, rest=text("general.alignment") + struct.pack("<I", 8) + text("x")), "is no multiple of 8",
    ),
    "a split model": (header(keys=1, rest=text("split.count") + U32 + struct.pack("<I", 3)), "a part of a split model"),
    "no dimensions": (header(tensors=1, rest=tensor(shape=())), "tensor a has 0 dimensions"),
    "many dimensions": (header(tensors=1, rest=text("a") + struct.pack("<I", 2**31) + bytes(64)), "dimensions"),
    "size 0": (header(tensors=1, rest=tensor(shape=(0, 4))), "has shape [4, 0]"),
    "a huge shape": (header(tensors=1, rest=tensor(shape=(2**63, 2**63))), "exceeds the file or overlaps another"),
    "Q2_K": (header(tensors=1, rest=tensor(shape=(256, 4), kind=10)), "stored as ggml type 10, which is not read here"),
    "half a block": (header(tensors=1, rest=tensor(shape=(40, 4), kind=8)), "has shape [4, 40]"),
    "beyond the end": (header(tensors=1, rest=tensor(offset=2**40) + bytes(99)), "exceeds the file or overlaps"),
    "not aligned": (header(tensors=1, rest=tensor(offset=8) + bytes(99)), "at offset 8"),
    "twice a tensor": (header(tensors=2, rest=2 * tensor() + bytes(99)), "lists tensor a twice"),
    "overlap": (
        header(tensors=2, rest=tensor("a", (64,)) + tensor("b") + bytes(999)), "tensor b exceeds the file or overlaps",
    ),
    "a wrong original shape": (
        header(1, 1, rest=text(ORIGINAL_SHAPE + "a") + struct.pack("<IIQ3I", 9, 4, 3, 2, 2, 2) + tensor() + bytes(99)),
        "the original shape of a is not that of its tensor",
    ),
    "no original shape": (
        header(1, 1, rest=text(ORIGINAL_SHAPE + "a") + struct.pack("<II", 4, 4) + tensor() + bytes(99)),
        "the original shape of a is not that of its tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = HOSTILE[kind]
    (tmp_path / "a.gguf").write_bytes(content)
    start = time.process_time()
    assert main(["inspect", str(tmp_path / "a.gguf")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and "a.gguf" in error
    assert time.process_time() - start < 2


def test_cut_and_changed_files_never_crash(tmp_path: Path) -> None:
    """Every cut is refused; a changed byte is refused or gives tensors within the file."""
    whole = a_file(tmp_path / "whole.gguf")
    generator = random.Random(0)
    path = tmp_path / "a.gguf"
    for _ in range(count(60, 2000)):
        path.write_bytes(whole[: generator.randrange(24, len(whole) - 40)])
        with pytest.raises(WeightsError):
            read_state_dict(path)
        changed = bytearray(whole)
        changed[generator.randrange(4, 300)] = generator.randrange(256)
        path.write_bytes(changed)
        try:
            infos = read_gguf_header(path).tensors.values()
        except WeightsError as error:
            assert "\n" not in str(error)
        else:
            assert all(0 <= info.start <= info.end <= len(whole) for info in infos)


@pytest.mark.parametrize(("name", "content"), [("a.safetensors", "gguf"), ("a.pt", "gguf"), ("a.gguf", "pt")])
def test_content_of_another_kind(tmp_path: Path, name: str, content: str) -> None:
    if content == "gguf":
        (tmp_path / name).write_bytes(a_file(tmp_path / "b.gguf"))
    else:
        torch.save({"a": torch.ones(3)}, tmp_path / name)
    with pytest.raises(WeightsError, match=rf"its content is that of a \.{content} file: rename it"):
        read_state_dict(tmp_path / name)


DAMAGED_TOKENIZERS: dict[str, Callable[[gguf.GGUFWriter], None]] = {
    "fewer scores": lambda writer: writer.add_token_scores([0.0, 1.0]),
    "no scores": lambda writer: None,
    "scores that are texts": lambda writer: writer.add_array("tokenizer.ggml.scores", ["a", "b", "c", "d"]),
}


@pytest.mark.parametrize("damage", DAMAGED_TOKENIZERS)
def test_damaged_tokenizers(damage: str, tmp_path: Path) -> None:
    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("t5")
        writer.add_token_list(["<pad>", "</s>", "<unk>", "a"])
        DAMAGED_TOKENIZERS[damage](writer)

    file = write_gguf(tmp_path / "t5.gguf", {"token_embd.weight": torch.ones(4, 32)}, "t5", metadata)
    with pytest.raises(WeightsError, match="tokens, scores and types of its tokenizer do not fit"):
        builder.build_text_encoder({"type": "t5", "from_pretrained": str(file)}, file, torch.float32)


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(2**31)

    file = write_gguf(tmp_path / "t5.gguf", {"token_embd.weight": torch.ones(4, 32)}, "t5", metadata)
    with pytest.raises(WeightsError, match="num_layers"):
        builder.build_text_encoder({"type": "t5", "from_pretrained": str(file)}, file, torch.float32)
