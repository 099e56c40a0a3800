"""Each part of the fast path against what it takes the place of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora import cli
from opensora.acceleration import precision, quantization
from opensora.acceleration.placement import to_device
from opensora.acceleration.quantization import KINDS, EightBitLinear, quantize
from opensora.datasets.video import read_video
from opensora.errors import ConfigError
from opensora.models.layers import attention as attention_module
from opensora.models.layers.attention import SelfAttention, attention, rotation_table
from opensora.models.vae.vae import VideoAutoencoderPipeline
from opensora.pipeline.replay import replay
from opensora.pipeline.step_cache import psnr
from opensora.schedulers.rf import RFLOW
from tests.full import some
from tests.test_plain import error, inputs, models
from tests.tiny import TINY_VAE

CPU = torch.device("cpu")


def test_convolutions_of_an_accelerator_are_channels_last():
    """Frozen ones; a CPU and training keep the layout of the file."""
    for device, frozen, last in (("meta", True, True), ("meta", False, False), ("cpu", True, False)):
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3), nn.Linear(4, 4)).requires_grad_(not frozen)
        flat, deep, _ = to_device(model, torch.device(device))
        assert flat.weight.is_contiguous(memory_format=torch.channels_last) is last
        assert deep.weight.is_contiguous(memory_format=torch.channels_last_3d) is last


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
    monkeypatch.setattr(attention_module, "attention", lambda *_: pytest.fail("there is nothing to compare"))
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
@some(2)
def test_a_request_asks_for_fewer_bits(kind, tmp_path):
    """Other frames, but not by much; and a recipe makes them again."""
    if "bf16" in kind and not precision.multiplies_bf16():
        pytest.skip("a processor without products for it")
    argv = ["generate", "a red circle", "--image-size", "16", "24", "--num-frames", "5", "--verbose", "0"]
    argv += ["--num-sampling-steps", "2"]
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
