"""Packed weights: every format is unpacked as its authors do; a layer that holds one behaves as with plain weights."""

from __future__ import annotations

import copy

import gguf
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opensora.acceleration.packed_formats import FORMATS, GGUF_FORMATS
from opensora.acceleration.packed_tensor import PackedTensor, unpack_weights
from opensora.acceleration.quantization import KINDS, quantize
from tests.gguf_files import random_blocks

MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]
NAMES = [one.name for one in GGUF_FORMATS]


def packed(name: str, rows: int = 6, columns: int = 512, seed: int = 0) -> PackedTensor:
    if name in KINDS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return PackedTensor(*KINDS[name].quantize(torch.randn(rows, columns)), name)
    return PackedTensor(torch.from_numpy(random_blocks(name, rows, columns, seed)), None, name)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_unpacked_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_blocks(name, 6, 1024)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]))
    weight = PackedTensor(torch.from_numpy(raw), None, name)
    assert weight.shape == (6, 1024) and weight.dtype == torch.float32 and expected.isfinite().all()
    assert torch.equal(weight.unpack(), expected)
    monkeypatch.setattr("opensora.acceleration.packed_tensor.CHUNK", 2048)  # two rows at once
    assert torch.equal(weight.unpack(), expected)
    assert torch.equal(weight.to(torch.bfloat16).unpack(), expected.bfloat16())


@pytest.mark.parametrize("name", FORMATS)
class TestLayers:
    @pytest.fixture
    def layers(self, name: str) -> tuple[nn.Linear, nn.Linear]:
        """A layer with a packed weight, and one with the same weight unpacked."""
        weight = packed(name)
        small, plain = nn.Linear(512, 6), nn.Linear(512, 6)
        small.weight = nn.Parameter(weight, requires_grad=False)
        plain.weight = nn.Parameter(weight.unpack())
        small.bias = plain.bias
        return small, plain

    @pytest.mark.parametrize("mode", MODES)
    def test_outputs(self, layers: tuple[nn.Linear, nn.Linear], mode: type) -> None:
        small, plain = layers
        x = torch.randn(2, 3, 512)
        with mode():
            assert torch.equal(small(x), plain(x))
            assert type(small(x)) is torch.Tensor and isinstance(small.weight, PackedTensor)

    def test_gradients_of_inputs_and_biases(self, layers: tuple[nn.Linear, nn.Linear]) -> None:
        found = []
        for layer in layers:
            x = torch.linspace(-1, 1, 1536).view(3, 512).requires_grad_()
            layer.bias.grad = None
            layer(x).square().sum().backward()
            found.append((x.grad, layer.bias.grad))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])

    def test_a_backward_pass_keeps_no_unpacked_weight(self, layers: tuple[nn.Linear, nn.Linear]) -> None:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)), lambda x: x):
            layers[0](torch.randn(3, 512, requires_grad=True))
        assert (6, 512) not in kept and (512, 6) not in kept

    @pytest.mark.parametrize("mode", MODES)
    def test_what_reads_the_weight_itself(self, layers: tuple[nn.Linear, nn.Linear], mode: type) -> None:
        small, plain = layers
        x = torch.randn(2, 512)
        with mode():
            self.read(x, small, plain)

    def read(self, x: torch.Tensor, small: nn.Linear, plain: nn.Linear) -> None:
        assert torch.equal(F.linear(x, small.weight[2:], small.bias[2:]), F.linear(x, plain.weight[2:], plain.bias[2:]))
        assert isinstance(small.weight[2:], PackedTensor)
        assert torch.equal(small.weight @ x.t(), plain.weight @ x.t())
        assert torch.equal(x @ small.weight.t(), x @ plain.weight.t())
        assert torch.equal(small.weight.view(-1), plain.weight.view(-1))
        assert torch.equal(torch.aminmax(small.weight).max, plain.weight.max())

    def test_moves_casts_copies(self, layers: tuple[nn.Linear, nn.Linear]) -> None:
        small, plain = layers
        state = small.state_dict()
        assert isinstance(state["weight"], PackedTensor)
        other = copy.deepcopy(small).to(torch.bfloat16)
        assert other.weight.dtype == torch.bfloat16 and isinstance(other.weight, PackedTensor)
        assert torch.equal(
            other(torch.ones(1, 512).bfloat16()), copy.deepcopy(plain).bfloat16()(torch.ones(1, 512).bfloat16())
        )
        other.load_state_dict(state, assign=True)
        assert torch.equal(other.weight.unpack(), plain.weight)
        unpack_weights(other)
        assert type(other.weight) is nn.Parameter and torch.equal(other.weight, plain.weight)

    @pytest.mark.parametrize("mode", MODES)
    def test_casts_keep_it_packed(self, name: str, mode: type) -> None:
        """As while a model is loaded, also in inference mode."""
        with mode():
            weight = packed(name)
            for moved in (weight.to(device="cpu"), weight.to(torch.bfloat16), weight.cpu(), weight.to("cpu").float()):
                assert isinstance(moved, PackedTensor)
            assert weight.to(torch.bfloat16).dtype == torch.bfloat16

    def test_embeddings(self, name: str) -> None:
        weight, ids = packed(name), torch.tensor([[5, 0, 5], [1, 2, 3]])
        table = nn.Embedding(6, 512)
        table.weight = nn.Parameter(weight, requires_grad=False)
        with torch.inference_mode():
            assert torch.equal(table(ids), F.embedding(ids, weight.unpack()))

    def test_changes_in_place_are_errors(self, name: str) -> None:
        weight = packed(name)
        for change in (lambda: weight.mul_(2), lambda: weight.copy_(torch.ones(6, 512)), lambda: weight.zero_()):
            with pytest.raises(RuntimeError, match="would change a packed weight in place"):
                change()


@pytest.mark.parametrize("name", ["int8", "fp8", "Q4_K"])
def test_eight_bit_products_of_a_packed_layer(name: str) -> None:
    """`--linear` keeps the values of a file of the same format, and quantizes those of another."""
    weight = packed(name, rows=128)
    model = nn.Sequential(nn.Linear(512, 128, bias=False))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    kind = "int8" if name == "Q4_K" else name
    quantize(model, kind)
    assert isinstance(model[0], KINDS[kind])
    found, expected = model[0].weight.float() * model[0].scale[:, None], weight.unpack()
    error = (found - expected).norm() / expected.norm()
    assert error < (0.02 if name == "Q4_K" else 1e-6)
