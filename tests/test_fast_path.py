"""Each part of the fast path against what it takes the place of."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora import cli
from opensora.acceleration import precision, quantization
from opensora.acceleration.kernels import layout, linear
from opensora.acceleration.kernels.causal_conv import FoldedTime, folded_causal_conv
from opensora.acceleration.kernels.layout import channels_last, outputs_last, pairwise_group_norm
from opensora.acceleration.kernels.linear import OneDnnLinear, onednn_module
from opensora.acceleration.placement import to_device
from opensora.acceleration.quantization import KINDS, EightBitLinear, quantize
from opensora.acceleration.replace_modules import replace_modules
from opensora.checkpoints import builder
from opensora.checkpoints.fit import load_weights
from opensora.datasets.video import read_video
from opensora.errors import ConfigError
from opensora.models.layers import attention as attention_module
from opensora.models.layers.attention import Kernels, SelfAttention, attention, rotation_table
from opensora.models.layers.embeddings import Mlp
from opensora.models.vae.vae import VideoAutoencoderPipeline
from opensora.models.vae.vae_temporal import CausalConv3d
from opensora.pipeline.replay import replay
from opensora.pipeline.step_cache import psnr
from opensora.schedulers.rf import RFLOW
from tests.test_plain import error, inputs, models
from tests.tiny import TINY_VAE, make_tiny_vae

CPU = torch.device("cpu")
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="PyTorch is built without oneDNN")


def twins(bias: bool = True, outputs: int = 40) -> tuple[nn.Linear, nn.Linear]:
    """A linear layer of 24 inputs, and the same one by oneDNN."""
    plain, fast = (nn.Linear(24, outputs, bias=bias) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    return plain, onednn_module(fast)


@needs_onednn
@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_by_onednn(bias, mkl, monkeypatch):
    """In inference alone; names in the state dict stay."""
    monkeypatch.setattr(linear, "mkl_is_faster", lambda: mkl)
    plain, fast = twins(bias)
    calls, product = [], linear.product
    monkeypatch.setattr(linear, "product", lambda *args: calls.append(1) or product(*args))
    x = torch.randn(2, 5, 3, 24).transpose(1, 2)
    assert torch.equal(fast(x), plain(x)) and not calls
    with torch.no_grad():
        assert error(fast(x), plain(x)) < 1e-6 and calls
    assert fast.state_dict().keys() == plain.state_dict().keys()


@needs_onednn
@pytest.mark.parametrize("what", ["float64", "few rows", "autocast", "meta"])
def test_what_onednn_is_not_asked_to_do(what, monkeypatch):
    plain, fast = twins()
    monkeypatch.setattr(linear, "product", lambda *_: pytest.fail("not for oneDNN"))
    x = torch.randn(2 if what == "few rows" else 9, 24)
    if what == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(x).dtype == torch.bfloat16
    elif what == "float64":
        assert torch.equal(fast.double()(x.double()), plain.double()(x.double()))
    elif what == "meta":
        assert fast.to("meta")(x.to("meta")).shape == (9, 40)
    else:
        with torch.no_grad():
            assert torch.equal(fast(x), plain(x))


@needs_onednn
@pytest.mark.skipif(not linear.multiplies_bf16(), reason="a processor without products for it")
@pytest.mark.parametrize("gelu", [False, True])
def test_bf16_is_multiplied_by_onednn(gelu, monkeypatch):
    """With its bias, and what follows it, in one operation, and rounded once."""
    plain, fast = (twin.bfloat16() for twin in twins())
    x = torch.randn(2, 9, 24).bfloat16()
    then = (lambda out: F.gelu(out, approximate="tanh")) if gelu else (lambda out: out)
    exact, published = then(copy.deepcopy(plain).double()(x.double())), then(plain(x))
    monkeypatch.setattr(F, "linear", lambda *_: pytest.fail("oneDNN adds the bias by itself"))
    with torch.no_grad():
        assert error(fast(x, gelu), exact) <= error(published, exact) + 1e-4


@pytest.mark.parametrize("what", ["gradients", "another processor"])
def test_bf16_that_is_left_to_pytorch(what, monkeypatch):
    plain, fast = (twin.bfloat16() for twin in twins())
    monkeypatch.setattr(linear, "product", lambda *_: pytest.fail("not for oneDNN"))
    monkeypatch.setattr(linear, "multiplies_bf16", lambda: what == "gradients")
    x = torch.randn(9, 24).bfloat16()
    with torch.set_grad_enabled(what == "gradients"):
        assert torch.equal(fast(x), plain(x))


def test_mkl_is_for_processors_of_its_maker(tmp_path, monkeypatch):
    for maker, expected in (("GenuineIntel", torch.backends.mkl.is_available()), ("AuthenticAMD", False)):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        monkeypatch.setattr(linear, "Path", lambda _: tmp_path / "cpuinfo")
        assert linear.mkl_is_faster.__wrapped__() == expected


def test_place_chooses_for_a_cpu():
    model = nn.Sequential(nn.Linear(4, 4), CausalConv3d(2, 2), nn.Conv2d(4, 4, 3))
    assert type(to_device(copy.deepcopy(model), CPU)[0]) is nn.Linear, "trained modules stay"
    to_device(model.requires_grad_(False), CPU)
    assert isinstance(model[0], OneDnnLinear) == HAS_ONEDNN
    assert isinstance(model[1], FoldedTime)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert not isinstance(
        to_device(CausalConv3d(2, 2).bfloat16(), CPU), FoldedTime
    )  # it would round its sum after every frame


def test_weights_in_training_stay_where_they_are():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 6))
    channels_last(model)
    assert outputs_last(model) == []
    assert all(layer.weight.is_contiguous() for layer in model)


def test_small_weights_lie_as_products_read_them(monkeypatch):
    monkeypatch.setattr(layout, "SMALL", 24 * 40)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 48)).requires_grad_(False)
    x, before = torch.randn(9, 24), {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    to_device(model, CPU)
    assert model[0].weight.t().is_contiguous() and model[1].weight.is_contiguous()
    assert error(model(x), expected) < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict(before)
    assert model[0].weight.t().is_contiguous()


def test_group_norm_of_many_pixels_is_accurate_whatever_the_layout():
    norm = nn.GroupNorm(4, 16).requires_grad_(False)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 16, 200, 300) + 0.5
    true = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double())
    norm = pairwise_group_norm(norm)
    made = norm(x.to(memory_format=torch.channels_last))
    assert error(norm(x), true) < 2e-7 and error(made, true) < 2e-7
    assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("kernel", "stride", "frames"),
    [*((k, 1, t) for k in (1, 3) for t in (1, 2, 3, 5)), (3, 2, 2), (3, 2, 4), (3, 2, 8)],
)
def test_time_folded_into_2d_convolutions(kernel, stride, frames):
    plain = CausalConv3d(4, 6, kernel, stride)
    x, grads = torch.randn(2, 4, frames, 3, 5), []
    outs = []
    for conv in (plain, folded_causal_conv(plain)):
        conv.zero_grad()
        outs.append(conv(x))
        outs[-1].square().sum().backward()
        grads.append(conv.conv.weight.grad)
    assert error(outs[1], outs[0]) < 1e-6 and error(grads[1], grads[0]) < 1e-6
    conv.requires_grad_(False)
    for folded in (True, False):
        channels_last(conv, folded)
        assert error(conv(x), outs[0]) < 1e-6


def test_attention_along_frames_moves_nothing_and_is_the_same():
    attend = SelfAttention(16, 2, qk_norm=True)
    x, rotation = torch.randn(2, 5, 3, 16), rotation_table(torch.tensor([1.0, 0.5, 0.2, 0.1]), 5)
    columns = x.transpose(1, 2).flatten(0, 1)
    expected = attend(columns, rotation).unflatten(0, (2, 3)).transpose(1, 2)
    assert error(attend(x, rotation), expected) < 1e-6


def test_a_single_token_attends_to_itself(monkeypatch):
    attend = SelfAttention(16, 2, qk_norm=True)
    x, rotation = torch.randn(2, 1, 3, 16), rotation_table(torch.ones(4), 1)
    expected = attend(x, rotation)
    attend.kernels = Kernels(attention=lambda *_: pytest.fail("there is nothing to compare"))
    with torch.no_grad():
        assert error(attend(x, rotation), expected) < 1e-6


def test_a_single_token_by_layers_of_8_bits():
    attend, x = SelfAttention(128, 2).requires_grad_(False), torch.randn(2, 1, 33, 128)
    expected = attend(x)
    quantize(nn.Sequential(attend))
    with torch.no_grad():
        assert error(attend(x), expected) < 0.05


@pytest.mark.parametrize("given", [False, True])
def test_one_timestep_is_that_of_all_samples(given, monkeypatch):
    model, _ = models(pred_sigma=False)
    told = {**inputs((3, 6, 8), given), "timestep": torch.tensor([871.0])}
    told["x_mask"] = told["x_mask"] if given else None
    ways = [told, {**told, "timestep": torch.tensor([871.0, 871.0])}]
    norms, layer_norm = [], F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda *args, **more: norms.append(len(args)) or layer_norm(*args, **more))
    shared, each = (model(**one) for one in ways)
    assert error(shared, each) < 1e-6
    of_one, of_two = norms[: len(norms) // 2], norms[len(norms) // 2 :]
    assert {2} == set(of_two) and set(of_one) == ({2, 5} if given else {5})  # with the modulation as weight and bias


def test_more_heads_than_kernels_count(monkeypatch):
    q, k, v = (torch.randn(2, 4, 7, 8) for _ in range(3))
    expected = attention(q, k, v)
    monkeypatch.setattr(attention_module, "MOST_HEADS", 3)
    assert error(attention(q, k, v), expected) < 1e-6


class Told:
    """A denoiser that notes what it is called with."""

    def __init__(self, model: Any) -> None:
        self.model, self.prepared, self.calls = model, 0, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prepare(self, shape: Sequence[int], **arguments: Any) -> dict[str, Any]:
        self.prepared += 1
        return self.model.prepare(shape, **arguments)

    def __call__(self, x: Tensor, timestep: Tensor, **arguments: Any) -> Tensor:
        self.calls.append((len(x), arguments))
        return self.model(x, timestep, **arguments)


@pytest.mark.parametrize(
    ("scale", "apart", "batches", "prepared"),
    [(4.0, False, [2] * 3, 1), (4.0, True, [1] * 6, 2), (1.0, False, [1] * 3, 1)],
)
def test_text_is_read_once_a_request(scale, apart, batches, prepared):
    fast, _ = models(pred_sigma=False)
    told = inputs((3, 6, 8), False)
    cond = {"y": told["y"][:1, :, :5], **{name: told[name] for name in ("fps", "height", "width")}}
    denoiser = Told(fast)
    reads = []
    for block in fast.blocks_in_order():
        block.cross_attn.kv_linear.register_forward_hook(lambda *_: reads.append(1))
    scheduler = RFLOW(num_sampling_steps=3, cfg_scale=scale)
    null = None if scale == 1 else {"y": fast.null_caption(cond["y"])}
    made = scheduler.sample(denoiser, told["x"][:1], cond, null, sequential_cfg=apart, precompute=True)
    assert [batch for batch, _ in denoiser.calls] == batches
    assert denoiser.prepared == prepared and len(reads) == prepared * len(fast.blocks_in_order())
    assert all("x_mask" not in arguments for _, arguments in denoiser.calls)
    slowly = scheduler.sample(lambda x, t, **a: fast(x, t, **a), told["x"][:1], cond, null)
    assert error(made, slowly) < 1e-5


def test_large_frames_are_decoded_one_by_one(monkeypatch):
    vae = to_device(VideoAutoencoderPipeline(**TINY_VAE).eval().requires_grad_(False), CPU)
    z = torch.randn(1, 4, 5, 2, 2)
    whole = vae.decode(z, 17)
    assert [piece.shape[2] for piece in vae.decoded(z, 17)] == [4, 4, 4, 4, 1]  # its micro_batch_size
    monkeypatch.setattr("opensora.models.vae.vae.MOST_PIXELS", 1)
    pieces = list(vae.decoded(z, 17))
    assert [piece.shape[2] for piece in pieces] == [1] * 17
    assert error(torch.cat(pieces, dim=2), whole) < 1e-5


@needs_onednn
def test_an_mlp_by_onednn():
    """With its activation computed by its first layer; hooks, gradients and layers in 8 bits stay what they are."""
    plain, fast = (Mlp(128, 256, 128) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    fast = replace_modules(fast, onednn_module)
    x, called = torch.randn(2, 30, 128), []
    assert error(fast(x), plain(x)) < 1e-6
    with torch.no_grad():
        handle = fast.fc1.register_forward_hook(lambda module, args, out: called.append(args[0].shape))
        assert error(fast(x), plain(x)) < 1e-6
        assert error(fast(x[0, :1]), plain(x[0, :1])) < 1e-6
        assert len(called) == 2
        handle.remove()
    for one in (plain, fast):
        one(x).square().sum().backward()
    assert error(fast.fc1.weight.grad, plain.fc1.weight.grad) < 1e-5
    with torch.no_grad():
        assert error(quantize(fast)(x), plain(x)) < 0.05


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("fp8", 0.06)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_in_8_bits(kind, most, bias):
    layer = nn.Linear(256, 384, bias=bias)
    small = KINDS[kind](layer)
    x = torch.randn(3, 20, 256) * torch.logspace(-3, 3, 20)[:, None]  # each token has a scale of its own
    with torch.no_grad():
        for row, expected in zip(small(x).flatten(0, 1), layer(x).flatten(0, 1), strict=True):
            assert 1e-5 < error(row, expected) < most
        assert small(x[0, :1]).shape == (1, 384)
        assert small(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_keeps_modulation_and_ends(kind):
    fast, _ = models(hidden_size=128, num_heads=4)
    told = inputs((3, 6, 8), False)
    exact = fast(**told)
    quantize(fast, kind)
    small = {name for name, module in fast.named_modules() if isinstance(module, EightBitLinear)}
    assert len(small) == 7 * 2 * fast.config["depth"]  # of every block: self- and cross-attention, MLP
    assert 1e-5 < error(fast(**told), exact) < 0.05


FEWER_BITS = {
    "int8": ["--linear", "int8"], "fp8": ["--linear", "fp8"], "bf16": ["--cpu-dtype", "bf16"],
    "int8 of bf16": ["--linear", "int8", "--cpu-dtype", "bf16"],
}  # fmt: skip


@pytest.mark.parametrize("kind", FEWER_BITS)
def test_a_request_asks_for_fewer_bits(kind, tmp_path):
    """Other frames, but not by much; and a recipe makes them again."""
    if "bf16" in kind and not linear.multiplies_bf16():
        pytest.skip("a processor without products for it")
    argv = ["generate", "a red circle", "--image-size", "16", "24", "--num-frames", "5", "--verbose", "0"]
    argv += ["--num-sampling-steps", "4"]
    for name, flags in (("exact", ["--cpu-dtype", "fp32"]), (kind, FEWER_BITS[kind])):
        assert cli.main([*argv, *flags, "--save-dir", str(tmp_path / name)]) == 0
    exact, small = (read_video(tmp_path / name / "sample_0000.mp4")[0] for name in ("exact", kind))
    assert (exact != small).any()
    assert psnr(small, exact) > 25
    assert replay(tmp_path / kind / "sample_0000.mp4", tmp_path / "again").identical


def test_a_processor_without_such_products_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: False)
    argv = ["generate", "a red circle", "--device", "cpu", "--cpu-dtype", "bf16", "--save-dir", str(tmp_path / "out")]
    assert cli.main(argv) != 0
    assert "no products of bf16 for cpu_dtype; remove it, or use 'fp32'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_type_that_models_compute_in():
    for asked, on_cpu, found in (("bf16", "fp32", torch.float32), ("float64", "fp32", torch.float64)):
        assert precision.inference_dtype(CPU, asked, on_cpu) == found
    assert precision.inference_dtype(torch.device("cuda"), "fp16", "fp32") == torch.float16


def test_a_device_without_such_products_says_so(monkeypatch):
    def missing(*args, **kwargs):
        raise NotImplementedError("no such kernel")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"cannot multiply in fp8 \(no such kernel\)"):
        patch.setattr(quantization.Fp8Linear, "round", missing)  # it lacks the type itself
        quantization.check("fp8", CPU, torch.float32)
    monkeypatch.setattr(torch, "_scaled_mm", missing)
    with pytest.raises(ConfigError, match=r"cannot multiply in fp8 \(no such kernel\); use --linear exact or --linear"):
        quantization.check("fp8", CPU, torch.float32)
    quantization.check("int8", CPU, torch.float32)
    quantization.check("exact", CPU, torch.float32)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="says which files are mapped")
def test_an_autoencoder_lets_go_of_its_file(tmp_path):
    """Its kernels are copies; all else would hold what is mapped of the file."""
    make_tiny_vae(tmp_path / "vae")

    def mapped() -> bool:
        gc.collect()
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    section = {"type": "VideoAutoencoderPipeline", "from_pretrained": str(tmp_path / "vae")}
    built = builder.build_model(section, tmp_path / "vae")
    load_weights(built, tmp_path / "vae", dtype=torch.float32)
    assert mapped(), "else this test says nothing"
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    to_device(built.eval().requires_grad_(False), CPU)
    assert not mapped()
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.state_dict().items())
