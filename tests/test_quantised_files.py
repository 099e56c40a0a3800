"""Weight files in int8 and fp8: written by `convert`, told by `inspect`, loaded packed, refused where damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.acceleration.packed_tensor import PackedTensor, unpacked
from opensora.acceleration.quantization import EightBitLinear
from opensora.checkpoints import builder, convert, inspect
from opensora.checkpoints.eight_bits import pack, stored
from opensora.checkpoints.read import is_packed, read_state_dict
from opensora.checkpoints.safetensors_header import read_header
from opensora.checkpoints.save import save_file
from opensora.cli import main
from opensora.config import load_config
from opensora.datasets.video import read_video
from opensora.errors import ConfigError, WeightsError
from tests.checkpoints import tree
from tests.full import some

CPU = torch.device("cpu")
EMBEDDED = {"model": "embedded:stdit3", "text_encoder": "embedded:text_encoder"}
KINDS = ("int8", "fp8")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def files(kind: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model and text encoder in 8 bits."""
    folder = tmp_path_factory.mktemp(kind)
    for part, source in EMBEDDED.items():
        assert main(["convert", source, str(folder / part), "--to", kind]) == 0
    return {part: folder / part for part in EMBEDDED}


def load(part: str, path: str | Path, linear: str = "exact") -> torch.nn.Module:
    section = {**load_config("embedded")[0][part], "from_pretrained": str(path)}
    found = builder.find_weights(section, part)
    if part == "text_encoder":
        encoder = builder.build_text_encoder(section, found, torch.float32)
        builder.load_text_encoder_weights(encoder, section, found, CPU)
        return encoder.model
    model = builder.build_model(section, found, {"input_size": (5, 8, 8)})
    builder.load_model_weights(model, section, found, CPU, torch.float32, linear)
    return model


@pytest.mark.parametrize("part", EMBEDDED)
def test_files_hold_weights_and_scales(kind: str, files: dict[str, Path], part: str) -> None:
    header = read_header(files[part] / "model.safetensors")
    scales = [name for name in header if name.endswith(".weight_scale")]
    assert len(scales) == {"model": 2 * 6 * 7, "text_encoder": 3 * 7}[part]
    for name in scales:
        weight = header[name.removesuffix("_scale")]
        assert weight["dtype"] == {"int8": "I8", "fp8": "F8_E4M3"}[kind]
        assert header[name]["dtype"] == "F32" and header[name]["shape"] == [weight["shape"][0], 1]
    exact = [name for name in header if "embed" in name or "t_block" in name or "final_layer" in name]
    assert exact and all(header[name]["dtype"] not in ("I8", "F8_E4M3") for name in exact)
    assert is_packed(files[part])


@pytest.mark.parametrize("part", EMBEDDED)
def test_weights_stay_packed_and_are_near_the_original(kind: str, files: dict[str, Path], part: str) -> None:
    exact, small = load(part, EMBEDDED[part]).state_dict(), load(part, files[part]).state_dict()
    packed = {name for name, tensor in small.items() if isinstance(tensor, PackedTensor)}
    assert len(packed) == {"model": 2 * 6 * 7, "text_encoder": 3 * 7}[part]
    for name, tensor in small.items():
        error = (tensor.float() - exact[name].float()).norm() / exact[name].float().norm()
        assert error < ({"int8": 0.012, "fp8": 0.03}[kind] if name in packed else 1e-6), name


def test_the_tokenizer_goes_along(files: dict[str, Path]) -> None:
    assert {"spiece.model", "tokenizer_config.json", "config.json"} < {
        path.name for path in files["text_encoder"].iterdir()
    }


def test_eight_bit_products_take_the_values_of_the_file(kind: str, files: dict[str, Path]) -> None:
    held = read_state_dict(files["model"])
    model = load("model", files["model"], linear=kind)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, EightBitLinear)}
    assert len(layers) == 2 * 6 * 7
    for name, layer in layers.items():
        assert torch.equal(layer.weight.float(), held[f"{name}.weight"].packed.float()), name


def test_inspect_tells_the_format(kind: str, files: dict[str, Path]) -> None:
    info = inspect(files["model"])
    assert kind in info.summary.dtypes and info.family.startswith("STDiT3") and not info.not_finite
    assert info.summary.parameters == inspect(EMBEDDED["model"]).summary.parameters


@some(1)
def test_a_video_is_made_from_both(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    """Text encoder and model in 8 bits: another video than the exact one, but a close one."""
    argv = ["generate", "a red circle moving right on a black background", "--image-size", "64", "64"]
    argv += ["--num-frames", "17", "--num-sampling-steps", "4", "--seed", "3", "--verbose", "0", "--device", "cpu"]
    small = [
        "--ckpt-path",
        str(files["model"]),
        "--cfg-options",
        f"text_encoder.from_pretrained={files['text_encoder']}",
    ]
    for name, more in (("exact", []), ("small", small)):
        assert main([*argv, *more, "--output", str(tmp_path / f"{name}.mp4")]) == 0
    exact, found = (torch.from_numpy(read_video(tmp_path / f"{name}.mp4")[0]).float() for name in ("exact", "small"))
    error = (exact - found).square().mean()
    assert error > 0 and 10 * torch.log10(255**2 / error) > 25


def test_back_to_plain_weights(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    convert(str(files["model"]), str(tmp_path / "plain.safetensors"), "safetensors", dtype="bf16")
    plain, held = read_state_dict(tmp_path / "plain.safetensors"), read_state_dict(files["model"])
    assert plain.keys() == held.keys() and not is_packed(tmp_path / "plain.safetensors")
    assert all(torch.equal(plain[name], unpacked(tensor.to(plain[name].dtype))) for name, tensor in held.items())


def test_quantizing_again_changes_nothing(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    convert(str(files["model"]), str(tmp_path / "again"), kind)
    assert tree(tmp_path / "again") == tree(files["model"])


def test_one_file_or_a_folder(tmp_path: Path) -> None:
    convert("embedded:text_encoder", str(tmp_path / "a.safetensors"), "int8")
    assert is_packed(tmp_path / "a.safetensors")
    for name in ("a.pt", "b.bin", "c.gguf"):
        with pytest.raises(ConfigError, match=r"--to int8 writes a \.safetensors file, or a folder"):
            convert("embedded:text_encoder", str(tmp_path / name), "int8")
    with pytest.raises(ConfigError, match=r"exists; choose another path"):
        convert("embedded:text_encoder", str(tmp_path / "a.safetensors"), "fp8")


def small_file() -> dict[str, Tensor]:
    """A file of one quantized layer and a bias."""
    weight = PackedTensor(torch.randint(-127, 128, (32, 16), dtype=torch.int8), torch.rand(32, 1) + 0.1, "int8")
    return stored({"a.weight": weight, "a.bias": torch.zeros(32)})


SCALE = "a.weight_scale"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scale": (lambda file: file.pop(SCALE), "a.weight is int8 [32, 16] and has no scale"),
    "no weight": (lambda file: file.pop("a.weight"), "a.weight_scale has no weight"),
    "NaN": (lambda file: file[SCALE].fill_(float("nan")), "the scale of a.weight has NaN or infinity"),
    "infinity": (lambda file: file[SCALE][3].fill_(float("inf")), "the scale of a.weight has NaN or infinity"),
    "few scales": (lambda file: file.update({SCALE: torch.ones(31, 1)}), "is float32 [31, 1], not [32, 1]"),
    "a scale a column": (lambda file: file.update({SCALE: torch.ones(1, 16)}), "is float32 [1, 16], not [32, 1]"),
    "no scales": (lambda file: file.update({SCALE: torch.ones(0)}), "is float32 [0], not [32, 1]"),
    "whole scales": (lambda file: file.update({SCALE: torch.ones(32, 1).int()}), "is int32 [32, 1], not [32, 1]"),
    "a plain weight": (lambda file: file.update({"a.weight": torch.ones(32, 16)}), "has a scale, but is float32 [32"),
    "a vector": (lambda file: file.update({"a.weight": torch.ones(32).to(torch.int8)}), "but is int8 [32]"),
    "one of two scales": (
        lambda file: file.update({"b.weight": torch.ones(32, 16).to(torch.float8_e4m3fn)}),
        "b.weight is float8_e4m3fn [32, 16] and has no scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = DAMAGE[damage]
    file = small_file()
    change(file)
    save_file(file, tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and "a.safetensors" in error


def test_values_that_overflow_are_found(tmp_path: Path) -> None:
    """The product of a weight and a large scale."""
    file = small_file()
    file[SCALE][:] = 3e38
    found = pack(file, tmp_path)
    save_file(file, tmp_path / "a.safetensors")
    assert inspect(tmp_path / "a.safetensors").not_finite == ("a.weight",)
    assert isinstance(found["a.weight"], PackedTensor)


def test_comfyui_names_of_scales(tmp_path: Path) -> None:
    """One scale for all rows, and a mark."""
    weight = torch.randn(32, 16).to(torch.float8_e4m3fn)
    file = {"scaled_fp8": torch.empty(0), "a.weight": weight, "a.scale_weight": torch.tensor(0.5), "b": torch.ones(1)}
    save_file(file, tmp_path / "a.safetensors")
    found = read_state_dict(tmp_path / "a.safetensors")
    assert found.keys() == {"a.weight", "b"}
    assert torch.equal(found["a.weight"].unpack(), weight.float() * 0.5)


def test_fp8_without_any_scale_stays_plain(tmp_path: Path) -> None:
    weight = torch.randn(32, 16).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight}, tmp_path / "a.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "a.safetensors")["a.weight"].float(), weight.float())


def test_no_weights_of_a_whole_model_are_unpacked_at_once(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = []
    unpack = PackedTensor.unpack
    monkeypatch.setattr(PackedTensor, "unpack", lambda self: largest.append(self.shape) or unpack(self))
    load("model", files["model"])
    assert not largest  # checks and hashes read it in pieces


def test_wrong_shape_for_the_model(files: dict[str, Path], tmp_path: Path) -> None:
    file = stored(read_state_dict(files["model"]))
    name = "spatial_blocks.0.attn.proj.weight"
    save_file({**file, name: file[name][:, :128].contiguous()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((files["model"] / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=rf"{name}: expected float32 \[256, 256\], found (int8|fp8) \[256, 128\]"):
        load("model", tmp_path)
