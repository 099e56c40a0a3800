"""LoRA files: four layouts, bit for bit both ways; files of other programs; wrong ones, each refused in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.checkpoints.lora import (
    BASE,
    FILE,
    adapter_hash,
    check_base,
    modelspec,
    read_layers,
    read_lora,
    write_lora,
)
from opensora.checkpoints.lora_layouts import LAYOUTS
from opensora.checkpoints.read import read_metadata, read_state_dict
from opensora.checkpoints.save import save_file
from opensora.cli import main
from opensora.errors import WeightsError
from opensora.models.lora import LoRAConfig, LoRALayer, LoRAWeights
from tests.checkpoints import tree
from tests.full import some
from tests.test_lora import KINDS, make, weights_for

CONFIG = "model = dict(type='STDiT3', hidden_size=48, depth=2, num_heads=3, caption_channels=32, model_max_length=7)\n"
ALPHAS = LoRAConfig(rank=4, alpha=6, rank_pattern={"mlp.fc1": 3}, alpha_pattern={"attn.qkv": 0.1})


def path_of(folder: Path, layout: str) -> Path:
    return folder / layout if layout == "peft" else folder / f"{layout}.safetensors"


def content(path: Path) -> dict[str, Any]:
    """The files of an adapter: header and data of .safetensors, others as they are."""
    files = {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])}
    length = {name: 8 + int.from_bytes(raw[:8], "little") for name, raw in files.items()}
    return {
        name: (json.loads(raw[8 : length[name]]), raw[length[name] :]) if name.endswith(".safetensors") else raw
        for name, raw in files.items()
    }


def assert_same(found: LoRAWeights, wanted: LoRAWeights) -> None:
    assert found.layers.keys() == wanted.layers.keys() and found.base == wanted.base
    for name, layer in wanted.layers.items():
        one = found.layers[name]
        assert torch.equal(one.A, layer.A) and torch.equal(one.B, layer.B) and one.alpha == layer.alpha, name
        assert (one.A.dtype, one.B.dtype) == (layer.A.dtype, layer.B.dtype)


@pytest.fixture
def model() -> nn.Module:
    return make("STDiT3")


@pytest.fixture
def weights(model: nn.Module) -> LoRAWeights:
    """An adapter of several ranks and alphas, one of which float32 cannot hold."""
    return LoRAWeights(weights_for(model, ALPHAS).layers, "0f" * 32, modelspec("STDiT3", "A new shape", "2026-11-29"))


class TestLayouts:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_model(self, tmp_path: Path, kind: str, layout: str) -> None:
        model = make(kind)
        weights = weights_for(model, ALPHAS)
        write_lora(path_of(tmp_path, layout), weights, layout)
        assert_same(read_lora(path_of(tmp_path, layout), model), weights)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @some(6)
    def test_there_and_back(
        self, tmp_path: Path, model: nn.Module, weights: LoRAWeights, layout: str, dtype: torch.dtype
    ) -> None:
        """From every layout to every other one and back: the same bytes, in a header of any order."""
        layers = {n: LoRALayer(one.A.to(dtype), one.B.to(dtype), one.alpha) for n, one in weights.layers.items()}
        source = path_of(tmp_path / "source", layout)
        write_lora(source, LoRAWeights(layers, weights.base, weights.metadata), layout)
        for other in LAYOUTS:
            between, back = path_of(tmp_path / "between", other), path_of(tmp_path / other, layout)
            write_lora(between, read_lora(source, model), other)
            write_lora(back, read_lora(between, model), layout)
            assert content(back) == content(source)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_base_and_metadata_are_inside(
        self, tmp_path: Path, model: nn.Module, weights: LoRAWeights, layout: str
    ) -> None:
        path = path_of(tmp_path, layout)
        write_lora(path, weights, layout)
        metadata = read_metadata(path / "adapter_model.safetensors" if layout == "peft" else path)
        assert metadata[BASE] == weights.base and metadata["modelspec.architecture"] == "STDiT3/lora"
        assert read_lora(path, model).base == weights.base
        assert adapter_hash(read_lora(path, model)) == adapter_hash(weights)

    def test_what_kohya_states(self, tmp_path: Path, weights: LoRAWeights) -> None:
        path = tmp_path / "a.safetensors"
        write_lora(path, weights, "kohya")
        metadata, content = read_metadata(path), path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        assert metadata["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "6")
        keys = read_state_dict(path)
        assert "lora_unet_spatial_blocks_0_cross_attn_q_linear.lora_down.weight" in keys
        assert keys["lora_unet_spatial_blocks_0_attn_qkv.alpha"].item() == 0.1


class TestFilesOfOthers:
    """Files as other programs write them."""

    def test_peft(self, tmp_path: Path) -> None:
        """Written by peft itself, and ours read by peft."""
        from peft import LoraConfig, PeftModel, get_peft_model

        targets = ["attn.qkv", "cross_attn.q_linear", "mlp.fc2"]
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=targets, rank_pattern={"^.*mlp.fc2$": 3}, init_lora_weights=False
        )
        config.rank_pattern = {"mlp.fc2": 3}
        config.alpha_pattern = {"attn.qkv": 9}
        theirs = get_peft_model(make("STDiT3"), config)
        theirs.save_pretrained(tmp_path / "theirs")
        found = read_lora(tmp_path / "theirs", make("STDiT3"))
        state = dict(theirs.named_parameters())
        assert len(found.layers) == 4 * 3
        for name, layer in found.layers.items():
            assert torch.equal(layer.A, state[f"base_model.model.{name}.lora_A.default.weight"])
            assert torch.equal(layer.B, state[f"base_model.model.{name}.lora_B.default.weight"])
            module = theirs.base_model.model.get_submodule(name)
            assert layer.alpha / layer.rank == module.scaling["default"], name
        write_lora(tmp_path / "ours", found, "peft")
        again = PeftModel.from_pretrained(make("STDiT3"), tmp_path / "ours")
        for name, parameter in again.named_parameters():
            if "lora_" in name:
                assert torch.equal(parameter, state[name]), name
        for name in found.layers:
            module, other = (one.base_model.model.get_submodule(name) for one in (again, theirs))
            assert module.scaling == other.scaling

    def test_diffusers(self, tmp_path: Path, model: nn.Module, weights: LoRAWeights) -> None:
        """With its metadata, and older files without: there alpha is the rank."""
        state = {}
        for name, one in weights.layers.items():
            state |= {f"transformer.{name}.lora_A.weight": one.A, f"transformer.{name}.lora_B.weight": one.B}
        save_file(state, tmp_path / FILE)
        found = read_lora(tmp_path, model)
        assert all(one.alpha == one.rank for one in found.layers.values())
        config = {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"mlp.fc1": 3},
            "alpha_pattern": {"attn.qkv": 0.1},
            "use_rslora": False,
            "bias": "none",
            "lora_dropout": 0.0,
            "target_modules": ["to_q"],
            "init_lora_weights": "gaussian",
        }
        save_file(
            state,
            tmp_path / FILE,
            {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})},
        )
        assert_same(read_lora(tmp_path, model), LoRAWeights(weights.layers))

    @pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
    @pytest.mark.parametrize("with_alpha", [True, False])
    def test_comfyui(
        self, tmp_path: Path, model: nn.Module, weights: LoRAWeights, names: Any, with_alpha: bool
    ) -> None:
        state = {}
        for name, (a, b, alpha) in weights.layers.items():
            state |= {f"diffusion_model.{name}.{names[0]}.weight": a, f"diffusion_model.{name}.{names[1]}.weight": b}
            if with_alpha:
                state[f"diffusion_model.{name}.alpha"] = torch.tensor([alpha])
        save_file(state, tmp_path / "a.safetensors")
        for name, found in read_lora(tmp_path / "a.safetensors", model).layers.items():
            expected = torch.tensor(weights.layers[name].alpha).item() if with_alpha else found.rank
            assert found.alpha == expected and torch.equal(found.A, weights.layers[name].A)

    @pytest.mark.parametrize("kind", KINDS)
    def test_musubi(self, tmp_path: Path, kind: str) -> None:
        """Underscores come back as the model's own names; alpha in the type of the weights."""
        model, state = make(kind), {}
        weights = weights_for(model)
        for name, (a, b, alpha) in weights.layers.items():
            key = f"lora_unet_{name.replace('.', '_')}"
            state |= {f"{key}.lora_down.weight": a.bfloat16(), f"{key}.lora_up.weight": b.bfloat16()}
            state[f"{key}.alpha"] = torch.tensor(alpha).bfloat16()
        save_file(state, tmp_path / "a.safetensors", {"ss_network_module": "networks.lora_wan", "ss_network_dim": "4"})
        found = read_lora(tmp_path / "a.safetensors", model)
        assert {name: one.alpha for name, one in found.layers.items()} == {
            n: one.alpha for n, one in weights.layers.items()
        }

    def test_scaling_by_the_root_of_the_rank(self, tmp_path: Path, model: nn.Module, weights: LoRAWeights) -> None:
        write_lora(tmp_path / "a", weights, "peft")
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
        for name, one in read_lora(tmp_path / "a", model).layers.items():
            assert one.alpha / one.rank == pytest.approx(weights.layers[name].alpha / one.rank**0.5)


State = dict[str, Tensor]
Damage = Callable[[State, dict[str, Any]], object]
A, B, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
FIRST = "transformer.spatial_blocks.0.attn.qkv"


def rename(state: State, old: str, new: str) -> None:
    state[new] = state.pop(old)


def in_config(**changes: Any) -> Damage:
    return lambda state, config: config.update(changes)


# name -> what is changed in the tensors of a file of diffusers, or in its configuration; and the message
WRONG: dict[str, tuple[Damage, str]] = {
    "half a pair": (lambda s, c: s.pop(FIRST + B), "spatial_blocks.0.attn.qkv has no B"),
    "other half": (lambda s, c: s.pop(FIRST + A), "spatial_blocks.0.attn.qkv has no A"),
    "unknown module": (
        lambda s, c: [rename(s, f"{FIRST}{end}", f"{FIRST.replace('.0.', '.9.')}{end}") for end in (A, B)],
        "the adapter has spatial_blocks.9.attn.qkv, which is no linear layer of STDiT3",
    ),
    "unknown key": (lambda s, c: s.update({f"{FIRST}.dora_scale": torch.ones(4)}), "dora_scale is not known"),
    "another layout": (lambda s, c: s.update({"lora_unet_x.alpha": s[FIRST + A]}), "is no key of the diffusers"),
    "no prefix": (lambda s, c: [rename(s, k, k[12:]) for k in list(s)], "is no key of an adapter"),
    "another rank": (lambda s, c: s.update({FIRST + A: torch.ones(3, 48)}), "has rank 3, its conf"),
    "rank of the configuration": (in_config(r=5), "has rank 4, its configuration says 5"),
    "B of another rank": (lambda s, c: s.update({FIRST + B: torch.ones(144, 3)}), "A [4, 48] and B [144, 3]"),
    "another width": (lambda s, c: s.update({FIRST + A: torch.ones(4, 32)}), "takes A [r, 48], B [144, r]"),
    "a vector": (lambda s, c: s.update({FIRST + A: torch.ones(48)}), "lora_A.weight is float32 [48]"),
    "whole numbers": (lambda s, c: s.update({FIRST + A: torch.ones(4, 48).int()}), "is int32 [4, 48]"),
    "NaN": (lambda s, c: s[FIRST + A].fill_(float("nan")), "has non-finite values in"),
    "infinite alpha": (lambda s, c: s.update({FIRST + ALPHA: torch.tensor(float("inf"))}), "has non-finite values in"),
    "two alphas": (lambda s, c: s.update({FIRST + ALPHA: torch.tensor(5.0)}), "has alpha 5, its configuration says 6"),
    "A twice": (lambda s, c: s.update({f"{FIRST}.lora_down.weight": torch.ones(4, 48)}), "has A of spatial_"),
    "no tensors": (lambda s, c: s.clear(), "holds no tensors"),
    "DoRA": (in_config(use_dora=True), "an adapter with DoRA is not read here"),
    "LoKr": (in_config(peft_type="LOKR"), "an adapter of type LOKR is not read here"),
    "biases": (in_config(bias="all"), "an adapter with biases is not read here"),
    "no alpha": (in_config(lora_alpha=None), "lora_alpha"),
    "alpha as a text": (in_config(lora_alpha="6"), "lora_alpha"),
    "a negative rank": (in_config(rank_pattern={"mlp.fc1": -3}), "rank_pattern"),
    "a regular expression": (in_config(alpha_pattern={"(a+)+b": 3}), "the pattern '(a+)+b' is no name of a module"),
    "a configuration that is a list": (lambda s, c: (c.clear(), c.update(LIST=True)), "lora_adapter_metadata"),
}  # fmt: skip


def written(folder: Path, damage: Damage = lambda state, config: None) -> Path:
    """A file of diffusers with one thing wrong."""
    layers = weights_for(make("STDiT3"), LoRAConfig(rank=4, alpha=6)).layers
    state: State = {}
    for name, one in layers.items():
        state |= {f"transformer.{name}.lora_A.weight": one.A, f"transformer.{name}.lora_B.weight": one.B}
    config: dict[str, Any] = {"r": 4, "lora_alpha": 6}
    damage(state, config)
    text = "[1]" if "LIST" in config else json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(state, folder / "a.safetensors", {"lora_adapter_metadata": text})
    return folder / "a.safetensors"


def refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a conversion that is refused."""
    (tmp_path / "config.py").write_text(CONFIG)
    argv = ["convert", str(path), str(tmp_path / "out.safetensors"), "--to", "lora-comfyui"]
    assert main([*argv, "--config", str(tmp_path / "config.py")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "out.safetensors").exists()
    return error


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = WRONG[kind]
    error = refused(written(tmp_path, damage), tmp_path, capsys)
    assert message in error and "a.safetensors" in error


def huge_header() -> bytes:
    return (2**25).to_bytes(8, "little") + b"{" + b" " * 2**25


CONTENT = {
    "a pickle": ("a.pt", b"\x80\x02}q\x00.", "adapters are .safetensors files"),
    "a pickle by another name": ("a.safetensors", b"\x80\x02}q\x00.", "its content is that of a .pt file"),
    "a huge header": ("a.safetensors", huge_header(), "its header has 33,554,432 bytes, over"),
    "a cut file": ("a.safetensors", (100).to_bytes(8, "little") + b'{"a":', "its header exceeds the file"),
    "text": ("a.safetensors", b"not an adapter", "is a text file, not weights"),
    "nothing": ("a.safetensors", b"", "is empty"),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_what_is_no_such_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, message = CONTENT[kind]
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name, tmp_path, capsys)


def test_peft_folders_that_are_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lora(tmp_path / "a", weights_for(make("STDiT3")), "peft")
    (tmp_path / "a" / "adapter_config.json").unlink()
    assert "adapter_config.json" in refused(tmp_path / "a", tmp_path, capsys)
    (tmp_path / "b").mkdir()
    assert "no such adapter; give a .safetensors file, or a folder" in refused(tmp_path / "b", tmp_path, capsys)


def test_kohya_needs_a_model_that_has_its_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lora(tmp_path / "a.safetensors", weights_for(make("DiT")), "kohya")
    with pytest.raises(WeightsError, match="which only a model tells apart; name it with --config"):
        read_layers(tmp_path / "a.safetensors")
    assert "blocks_0_attn_qkv" in refused(tmp_path / "a.safetensors", tmp_path, capsys)


def test_wrong_base(tmp_path: Path, weights: LoRAWeights) -> None:
    check_base("a", weights, "0f" * 32)
    check_base("a", LoRAWeights(weights.layers), "1e" * 32)  # not stated
    with pytest.raises(WeightsError, match=r"was trained on other weights \(0f0f0f0f0f0f\) than those loaded \(1e1e"):
        check_base("a", weights, "1e" * 32)


class TestCommand:
    def test_convert_and_inspect(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source, config = written(tmp_path), tmp_path / "config.py"
        config.write_text(CONFIG)
        steps = [
            ("kohya", "b.safetensors"),
            ("peft", "c"),
            ("comfyui", "d.safetensors"),
            ("diffusers", "e.safetensors"),
        ]
        for layout, name in steps:
            argv = ["convert", str(source), str(tmp_path / name), "--to", f"lora-{layout}", "--config", str(config)]
            assert main(argv) == 0
            source = tmp_path / name
            assert f"in the layout of {layout}\nrank 4, alpha 6\nbase: not stated" in capsys.readouterr().out
            assert main(["inspect", str(source)]) == 0
            assert "LoRA of 28 layers" in capsys.readouterr().out
        model = make("STDiT3")
        assert_same(read_lora(tmp_path / "e.safetensors", model), read_lora(tmp_path / "a.safetensors", model))

    @pytest.mark.parametrize(
        ("to", "name", "reason"),
        [
            ("lora-peft", "b.safetensors", "writes a folder"), ("lora-kohya", "b", "writes a .safetensors file"),
            ("lora-comfyui", "a.safetensors", "exists; choose another path, or replace it with --force"),
        ],
    )  # fmt: skip
    def test_destinations(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, name: str, reason: str
    ) -> None:
        source = written(tmp_path)
        before = tree(tmp_path)
        assert main(["convert", str(source), str(tmp_path / name), "--to", to]) == 1
        assert reason in capsys.readouterr().err and tree(tmp_path) == before

    def test_an_adapter_as_a_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["generate", "a red circle", "--ckpt-path", str(written(tmp_path)), "--device", "cpu"]
        assert main([*argv, "--output", str(tmp_path / "a.mp4")]) == 1
        assert "is an adapter, not a model" in (error := capsys.readouterr().err) and "--lora" in error
