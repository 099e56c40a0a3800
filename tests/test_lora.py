"""LoRA adapters in the models: against peft, several at once, fused, and in every place that computes a layer."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.acceleration.activation_checkpointing import checkpoint_blocks
from opensora.acceleration.chunked_forward import chunk_blocks
from opensora.acceleration.offload import OffloadedModule
from opensora.acceleration.quantization import EightBitLinear, quantize
from opensora.acceleration.replace_modules import copy_structure
from opensora.checkpoints.lora import adapter_hash, read_lora, write_lora
from opensora.errors import WeightsError
from opensora.models import lora
from opensora.models.layers.attention import SelfAttention
from opensora.models.lora import LoRAConfig, LoRALayer, LoRAWeights
from tests.zoo import TEXT, random_model

ROOT = Path(__file__).parents[1] / "opensora"
CONFIG = LoRAConfig(rank=4, alpha=6, rank_pattern={"mlp.fc1": 3}, alpha_pattern={"attn.qkv": 9})
FIXED: dict[str, Any] = {"input_size": (3, 8, 8)}
KINDS: dict[str, dict[str, Any]] = {
    "STDiT3": TEXT, "STDiT2": TEXT, "STDiT": {**FIXED, **TEXT}, "PixArt": {**FIXED, **TEXT},
    "DiT": {**FIXED, "condition": "text", "caption_channels": 32}, "Latte": {**FIXED, "condition": "label_5"},
}  # fmt: skip


def make(kind: str) -> nn.Module:
    """A small frozen model with random weights."""
    return random_model(kind, **KINDS[kind]).requires_grad_(False)


def output(model: nn.Module, frames: int = 3, seed: int = 0) -> Tensor:
    """The model's output for random inputs."""
    draw = torch.Generator().manual_seed(seed)
    x, t = torch.randn(2, 4, frames, 8, 8, generator=draw), torch.tensor([300.0, 700.0])
    if model.config.get("condition", "text") != "text":
        return model(x, t, y=torch.tensor([1, 2]))
    y = torch.randn(2, 1, 1 if "condition" in model.config else 5, 32, generator=draw)
    sizes = {name: torch.tensor([value] * 2) for name, value in
             {"fps": 24.0, "height": 64.0, "width": 64.0, "num_frames": 3.0, "ar": 1.0}.items()}  # fmt: skip
    return model(x, t, y=y, **sizes) if model.size_arguments else model(x, t, y=y)


def weights_for(model: nn.Module, config: LoRAConfig = CONFIG, seed: int = 1) -> LoRAWeights:
    """An adapter whose B is not zero."""
    draw, layers = torch.Generator().manual_seed(seed), {}
    for name, layer in lora.target_layers(model, config).items():
        rank = config.rank_of(name)
        a = torch.randn(rank, layer.in_features, generator=draw) / layer.in_features**0.5
        b = torch.randn(layer.out_features, rank, generator=draw) / 4
        layers[name] = LoRALayer(a, b, config.alpha_of(name))
    return LoRAWeights(layers)


def with_peft(model: nn.Module, weights: LoRAWeights) -> nn.Module:
    """The model with the same adapter by peft."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    layers = weights.layers
    config = LoraConfig(
        r=1, target_modules=list(layers), rank_pattern={f"^{name}$": one.rank for name, one in layers.items()},
        alpha_pattern={f"^{name}$": one.alpha for name, one in layers.items()},
    )  # fmt: skip
    injected = inject_adapter_in_model(config, model)
    state = {}
    for name, one in layers.items():
        state |= {f"{name}.lora_A.weight": one.A, f"{name}.lora_B.weight": one.B}
    assert not set_peft_model_state_dict(injected, state).unexpected_keys
    return injected


def difference(a: Tensor, b: Tensor) -> float:
    """The relative difference of two tensors."""
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_the_same(kind: str) -> None:
    """Output, gradients and merged weights, with ranks and alphas by pattern."""
    model, other = make(kind), make(kind)
    before, weights = output(model), weights_for(model)
    lora.add_adapter(model, "style", weights)
    found, expected = output(model), output(with_peft(other, weights))
    assert difference(found, expected) < 1e-6
    assert difference(found, before) > 1e-3  # the adapter does something
    ours = {n: p.requires_grad_() for n, p in model.named_parameters() if ".lora_style." in n}
    theirs = {n: p for n, p in other.named_parameters() if ".lora_" in n}
    (output(model) ** 2).mean().backward()
    (output(other) ** 2).mean().backward()
    assert len(ours) == len(theirs) == 2 * len(weights.layers)
    for name, parameter in ours.items():
        same = theirs[name.replace("lora_style.", "lora_") + ".default.weight"]
        assert difference(parameter.grad, same.grad) < 1e-5, name
    total = (
        torch.cat([p.grad.flatten() for p in one.values()])
        for one in (ours, {n: theirs[n.replace("lora_style.", "lora_") + ".default.weight"] for n in ours})
    )
    assert difference(*total) < 1e-6
    lora.fuse(model)
    for module in other.modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
    for name in weights.layers:
        merged = other.get_submodule(name).get_base_layer().weight
        assert difference(model.get_submodule(name).weight, merged) < 1e-6, name


def test_without_adapters_the_model_is_what_it_was() -> None:
    model = make("STDiT3")
    names, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    before, weights = output(model), weights_for(model)
    lora.add_adapter(model, "one", weights)
    assert [name for name in model.state_dict() if ".lora_" not in name] == names
    lora.set_adapters(model, {"one": 0.0})
    assert torch.equal(output(model), before)  # bit for bit
    lora.set_adapters(model, {"one": -0.5})
    changed = output(model)
    lora.fuse(model)
    assert 0 < difference(output(model), changed) < 1e-5
    lora.unfuse(model)
    assert torch.equal(output(model), changed)
    lora.remove_adapter(model, "one")
    assert torch.equal(output(model), before)
    assert (list(model.state_dict()), [name for name, _ in model.named_modules()]) == (names, modules)


def test_several_adapters_add_up() -> None:
    model = make("STDiT3")
    one, two = weights_for(model), weights_for(model, LoRAConfig(rank=2, targets=["mlp.*", "t_block.1"]), seed=2)
    lora.add_adapter(model, "one", one)
    lora.add_adapter(model, "two", two)
    lora.set_adapters(model, {"one": 0.5, "two": -2.0})
    found, plain = output(model), make("STDiT3")
    with torch.no_grad():
        for weights, strength in ((one, 0.5), (two, -2.0)):
            for name, (a, b, alpha) in weights.layers.items():
                plain.get_submodule(name).weight.add_(strength * alpha / len(a) * b @ a)
    assert difference(found, output(plain)) < 2e-6
    assert sorted(lora.adapters_of(model)) == ["one", "two"]
    again = lora.adapter_weights(model, "two")
    assert all(torch.equal(again.layers[name].A, layer.A) for name, layer in two.layers.items())


def test_a_new_adapter_changes_nothing_yet() -> None:
    model = make("STDiT3")
    before = output(model)
    lora.add_adapter(model, "new", LoRAConfig(rank=3, targets=["*"], alpha=1.5))
    assert torch.equal(output(model), before)
    layers = lora.adapter_weights(model, "new").layers
    assert set(layers) == set(lora.linear_layers(model))  # every linear layer can be adapted
    assert {layer.alpha for layer in layers.values()} == {1.5}
    a = layers["spatial_blocks.0.attn.qkv"].A
    assert 0.5 < a.abs().max() * a.shape[1] ** 0.5 <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_takes_adapters(kind: str) -> None:
    model = make(kind)
    plain = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert plain == set(lora.linear_layers(model))


def shared_structure(model: nn.Module) -> nn.Module:
    return copy_structure(model)


def chunks(model: nn.Module) -> nn.Module:
    chunk_blocks(model, 7)
    return model


def checkpoints(model: nn.Module) -> nn.Module:
    checkpoint_blocks(model)
    return model


def offloads(model: nn.Module) -> nn.Module:
    with OffloadedModule(model, torch.device("cpu")).onloaded(model):
        pass
    return model


WAYS: list[Callable[[nn.Module], nn.Module]] = [shared_structure, chunks, checkpoints, offloads]


@pytest.mark.parametrize("frames", [1, 3])  # of one frame, temporal attention computes its values alone
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_compute_sees_adapters(way: Callable[[nn.Module], nn.Module], frames: int) -> None:
    """Each is computed before the adapter is there, with it, and after a change of its strength."""
    usual, model = make("STDiT3"), way(make("STDiT3"))
    weights = weights_for(usual, LoRAConfig(targets=["*"]))
    with torch.no_grad():
        assert difference(output(model, frames), output(usual, frames)) < 1e-6
        for one in (usual, model):
            lora.add_adapter(one, "style", weights)
        assert difference(output(model, frames), output(usual, frames)) < 1e-6
        for one in (usual, model):
            lora.set_adapters(one, {"style": 0.3})
        assert difference(output(model, frames), output(usual, frames)) < 1e-6


def test_another_adapter_of_the_same_rank_is_not_compiled_again() -> None:
    from torch._dynamo.testing import CompileCounter

    model, usual = (random_model("STDiT3", **TEXT, depth=1).requires_grad_(False) for _ in range(2))
    counter = CompileCounter()
    for block in model.spatial_blocks:
        block.compile(backend=counter, dynamic=True)
    found, compiled = [], []
    with torch.no_grad():
        for seed, strength in ((1, 1.0), (1, 0.25), (5, 0.25)):
            for one in (model, usual):
                if "style" in lora.adapters_of(one):
                    lora.remove_adapter(one, "style")
                lora.add_adapter(one, "style", weights_for(one, seed=seed))
                lora.set_adapters(one, {"style": strength})
            found.append(output(model))
            compiled.append(counter.frame_count)
            assert difference(found[-1], output(usual)) < 1e-6
    assert compiled[0] and len(set(compiled)) == 1
    assert min(difference(found[0], found[1]), difference(found[1], found[2])) > 1e-3


def test_layers_of_8_bits_take_adapters() -> None:
    """In inference and in training: gradients flow through frozen 8-bit weights to the adapter."""
    attend, x = SelfAttention(128, 2).requires_grad_(False), torch.randn(2, 4, 128)
    config = LoRAConfig(rank=4, targets=["qkv", "proj"])
    exact, small = nn.Sequential(attend), nn.Sequential(copy_structure(attend))
    quantize(small)
    assert all(isinstance(layer, EightBitLinear) for layer in lora.linear_layers(small).values())
    weights = weights_for(exact, config)
    for model in (exact, small):
        lora.add_adapter(model, "style", weights)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.shape[0] == 4 or parameter.shape[-1] == 4)
        (model(x) ** 2).mean().backward()
    for name in weights.layers:
        ours, theirs = (lora.linear_layers(model)[name].lora("style") for model in (small, exact))
        assert difference(ours.A.grad, theirs.A.grad) < 0.05
        assert difference(ours.B.grad, theirs.B.grad) < 0.05
    with torch.no_grad():
        for length in (1, 4):
            assert difference(small(x[:, :length]), exact(x[:, :length])) < 0.05
    with pytest.raises(ValueError, match="quantized, so no adapter can be fused"):
        lora.fuse(small)


def test_frozen_weights_keep_their_type() -> None:
    """Layers in half precision compute in that of their inputs."""
    exact, half = make("STDiT3"), make("STDiT3")
    for name, layer in lora.linear_layers(half).items():
        if "_blocks." in name:
            layer.weight.data = layer.weight.data.half()
    assert difference(output(half), output(exact)) < 1e-2
    lora.add_adapter(half, "style", LoRAConfig())
    (output(half) ** 2).mean().backward()
    assert all(layer.lora("style").B.grad.dtype == torch.float32 for layer in lora.linear_layers(half).values()
               if layer.adapters())  # fmt: skip


WRONG: list[tuple[str, Callable[[nn.Module], Any]]] = [
    ("matches no linear layer", lambda m: lora.add_adapter(m, "a", LoRAConfig(targets=["attn.query"]))),
    ("matches no linear layer", lambda m: lora.add_adapter(m, "a", LoRAConfig(rank_pattern={"attn.qkw": 2}))),
    ("must be 1 to 48", lambda m: lora.add_adapter(m, "a", LoRAConfig(rank=49))),
    ("must be 1 to 48", lambda m: lora.add_adapter(m, "a", LoRAConfig(rank=0))),
    ("has no layers", lambda m: lora.add_adapter(m, "a", LoRAWeights({}))),
    ("no linear layer of STDiT3", lambda m: lora.add_adapter(m, "a", LoRAWeights({"x_embedder.proj": pair(4, 4)}))),
    ("takes A", lambda m: lora.add_adapter(m, "a", LoRAWeights({"t_block.1": pair(48, 3 * 48)}))),
    ("takes A", lambda m: lora.add_adapter(m, "a", LoRAWeights({"t_block.1": pair(48, 6 * 48)._replace(
        A=torch.ones(3, 48))}))),
    ("alpha is nan", lambda m: lora.add_adapter(m, "a", LoRAWeights({"t_block.1": pair(48, 6 * 48, float("nan"))}))),
    ("there is an adapter 'one' already", lambda m: lora.add_adapter(m, "one", LoRAConfig())),
    ("has 1 to 64 letters", lambda m: lora.add_adapter(m, "a.b", LoRAConfig())),
    ("there is no adapter 'two'; there is one", lambda m: lora.set_adapters(m, {"two": 1.0})),
    ("within", lambda m: lora.set_adapters(m, {"one": float("nan")})),
    ("within", lambda m: lora.set_adapters(m, {"one": 1e6})),
    ("no adapter 'two'", lambda m: lora.remove_adapter(m, "two")),
    ("unfuse them first", lambda m: (lora.fuse(m), lora.set_adapters(m, {"one": 0.5}))),
]  # fmt: skip


def pair(inputs: int, outputs: int, alpha: float = 1.0) -> LoRALayer:
    return LoRALayer(torch.ones(2, inputs), torch.ones(outputs, 2), alpha)


@pytest.mark.parametrize(("message", "wrong"), WRONG)
def test_what_does_not_fit_is_refused(message: str, wrong: Callable[[nn.Module], Any]) -> None:
    model = make("STDiT3")
    lora.add_adapter(model, "one", LoRAConfig())
    with pytest.raises(ValueError, match=message):
        wrong(model)
    assert lora.adapters_of(model) == ["one"]


# Where a module's weight is read past its forward: (file, code) -> it is no linear layer with adapters, or no product.
READS = {
    ("models/layers/embeddings.py", "self.proj.weight.flatten"): "the convolution of patches",
    ("models/layers/embeddings.py", "self.embedding_table.weight"): "a table of classes",
    ("acceleration/placement.py", "module.weight.contiguous"): "another memory layout of a convolution",
    ("acceleration/quantization.py", "linear.weight.detach"): "quantized before there are adapters",
}
HARMLESS = ("dtype", "device", "is_meta", "shape", "requires_grad", "numel", "itemsize")


def test_nothing_reads_a_weight_past_its_layer() -> None:
    """In models, acceleration and ranks, `other.weight` is read only to initialise it or for facts about it."""
    found = []
    for folder in ("models", "acceleration", "distributed", "pipeline"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "vae" in file.parts or "text_encoder" in file.parts:
                continue  # no adapters there
            found += [(str(file.relative_to(ROOT)), code) for code in reads(ast.parse(file.read_text()))]
    unknown = [one for one in found if one not in READS]
    assert unknown == [], "a product past the layer's forward skips its adapters; use Linear.outputs"
    assert set(READS) <= set(found)


def reads(tree: ast.AST) -> list[str]:
    """Reads of `x.weight` where x is not self, besides facts, initial values and conversions of whole layers."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
            continue
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            continue
        parent = parents[node]
        if isinstance(parent, ast.Attribute) and parent.attr in HARMLESS:
            continue
        call = next((p for p in _above(node, parents) if isinstance(p, ast.Call)), None)
        text = "" if call is None else ast.unparse(call.func)
        if not text.startswith("nn.init.") and "nn.init." not in "".join(
            ast.unparse(p.func) for p in _above(node, parents) if isinstance(p, ast.Call)
        ):
            found.append(ast.unparse(parent if isinstance(parent, ast.Attribute) else node))
    return found


def _above(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> list[ast.AST]:
    found = []
    while node in parents:
        node = parents[node]
        found.append(node)
    return found


def test_a_file_brings_an_adapter_back(tmp_path: Path) -> None:
    model = make("STDiT3")
    weights = weights_for(model)
    weights = LoRAWeights(weights.layers, base="0" * 64)
    write_lora(tmp_path / "a.safetensors", weights)
    again = read_lora(tmp_path / "a.safetensors", model)
    assert again.base == weights.base and adapter_hash(again) == adapter_hash(weights)
    for name, layer in weights.layers.items():
        found = again.layers[name]
        assert torch.equal(found.A, layer.A) and torch.equal(found.B, layer.B) and found.alpha == layer.alpha
    with pytest.raises(WeightsError, match="no linear layer of DiT"):
        read_lora(tmp_path / "a.safetensors", make("DiT"))
