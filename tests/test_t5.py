from __future__ import annotations

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import opensora
from opensora.acceleration.quantization import Int8Linear, num_quantized, quantize
from opensora.checkpoints import builder
from opensora.config.sections import checkpoints as schemas
from opensora.models.text_encoder import t5
from opensora.models.text_encoder.t5 import T5Config, T5Encoder, T5EncoderModel
from tests.tiny import TINY_SENTENCES, make_tiny_t5

SHIPPED = Path(opensora.__file__).parent / "embedded" / "text_encoder"
needs_shipped = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the embedded text encoder has not been trained")


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> T5Encoder:
    section = {"type": "t5", "from_pretrained": str(folder), **options}
    encoder = builder.build_text_encoder(section, folder, dtype)
    builder.load_text_encoder_weights(encoder, section, folder, torch.device("cpu"))
    return encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> T5Encoder:
    return load(folder)


def test_padding_takes_part_in_nothing(tiny: T5Encoder) -> None:
    short, long = TINY_SENTENCES[0], TINY_SENTENCES[2]
    alone, mask = tiny.encode([short])
    assert alone.dtype == torch.float32 and mask.dtype == torch.int64
    assert alone.shape == (1, 1, mask.shape[1], tiny.output_dim) and mask.all()
    both, both_mask = tiny.encode([short, long])
    length = mask.shape[1]
    assert both.shape[2] == len(tiny.tokenizer.encode(long)) > length
    assert both_mask.sum(1).tolist() == [length, both.shape[2]]
    torch.testing.assert_close(both[:1, :, :length], alone, atol=1e-5, rtol=0)
    assert not both[0, :, length:].any()


def test_each_prompt_is_encoded_alone(tiny: T5Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5, "TOGETHER", 2)
    passes: list[int] = []
    hook = tiny.model.encoder.block[1].register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    found = tiny.encode_each([*TINY_SENTENCES])
    hook.remove()
    assert passes == [2, 2, 1] and tiny.encode_each([]) == []
    for text, features in zip(TINY_SENTENCES, found, strict=True):
        assert torch.equal(features, tiny.encode([text])[0])


SHAPES = {
    "tiny": dict(d_model=32, d_kv=16, d_ff=64, num_heads=2, num_layers=2, feed_forward_proj="gated-gelu"),
    "other inner width": dict(d_model=40, d_kv=24, d_ff=56, num_heads=3, num_layers=3, feed_forward_proj="gated-gelu"),
    "version 1.0": dict(d_model=64, d_kv=8, d_ff=128, num_heads=8, num_layers=4, feed_forward_proj="relu"),
    "few buckets": dict(d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2, feed_forward_proj="relu",
                        relative_attention_num_buckets=9, relative_attention_max_distance=20, layer_norm_epsilon=1e-3),
    "XXL": dict(d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=1, feed_forward_proj="gated-gelu"),
}  # fmt: skip


def both_models(shape: dict[str, Any], vocab_size: int = 50) -> tuple[nn.Module, T5EncoderModel]:
    """transformers' encoder and ours with the same random weights."""
    import transformers

    stated = schemas.T5Config(vocab_size=vocab_size, **shape)
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(transformers.T5Config(vocab_size=vocab_size, **shape))
        ours = T5EncoderModel(T5Config(**dict(stated)))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    generator = torch.Generator().manual_seed(0)
    bounds = {name: 3 / tensor.shape[-1] ** 0.5 for name, tensor in ours.state_dict().items()}
    weights = {
        name: torch.empty(tensor.shape).uniform_(-bounds[name], bounds[name], generator=generator)
        for name, tensor in ours.state_dict().items()
    }
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    for model in (theirs, ours):
        model.load_state_dict(weights, assign=True)
        model.eval().requires_grad_(False)
    return theirs, ours


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers(shape: str) -> None:
    theirs, ours = both_models(SHAPES[shape])
    for length in (1, 2, 40, 300) if shape != "XXL" else (5,):
        ids = torch.randint(50, (3, length), generator=torch.Generator().manual_seed(length))
        mask = (torch.arange(length) < torch.tensor([[length], [max(length // 2, 1)], [1]])).long()
        for rows in (slice(1), slice(3)):
            expected = theirs(input_ids=ids[rows], attention_mask=mask[rows]).last_hidden_state
            [found], real = ours([(ids[rows], mask[rows])]), mask[rows].bool()
            assert (found - expected)[real].norm() <= 1e-6 * expected[real].norm()
        assert torch.equal(*ours([(ids[:1], None), (ids[:1], mask[:1])]))


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_equals_transformers(dtype: torch.dtype, error: float) -> None:
    theirs, ours = (model.to(dtype) for model in both_models(SHAPES["tiny"]))
    for name, module in (*theirs.named_modules(), *ours.named_modules()):
        if dtype == torch.float16 and name.endswith(".wo"):
            module.float()
    ids = torch.arange(40)[None]
    expected = theirs(input_ids=ids).last_hidden_state
    [found] = ours([(ids, None)])
    assert found.dtype == expected.dtype == dtype
    assert (found - expected).float().norm() <= error * expected.float().norm()


class Casts(TorchDispatchMode):
    """Counts the bytes of casts by the device on which they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype:
            self.bytes[args[0].device.type] += out.nbytes
        return out


def test_weights_are_cast_on_the_device(folder: Path) -> None:
    """The meta device stands for an accelerator."""
    section = {"type": "t5", "from_pretrained": str(folder)}
    encoder = builder.build_text_encoder(section, folder, torch.bfloat16)
    with Casts() as casts:
        builder.load_text_encoder_weights(encoder, section, folder, torch.device("meta"))
    assert casts.bytes["cpu"] == 0 and casts.bytes["meta"] == sum(p.nbytes for p in encoder.model.parameters())


def test_layers_are_quantized() -> None:
    _, model = both_models({**SHAPES["tiny"], "d_model": 128, "d_kv": 64, "d_ff": 256})
    ids = torch.arange(20)[None]
    [exact] = model([(ids, None)])
    assert num_quantized(model) == 2 * (4 * 128 * 128 + 3 * 128 * 256)
    [found] = quantize(model)([(ids, None)])
    assert isinstance(model.get_submodule("encoder.block.1.layer.1.DenseReluDense.wo"), Int8Linear)
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()


def test_a_long_prompt_is_cut_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load(folder, model_max_length=5)
    with caplog.at_level(logging.WARNING):
        features, mask = encoder.encode([TINY_SENTENCES[2]])
    assert features.shape[2] == mask.sum() == 5
    assert "the quick brown fox" in caplog.text and "first 5" in caplog.text


def test_dtypes(folder: Path) -> None:
    encoder = load(folder, dtype=torch.float16)
    half = encoder.model
    assert half.shared.weight is half.encoder.embed_tokens.weight
    assert all((value.dtype == torch.float32) == (".wo." in name) for name, value in half.state_dict().items())
    assert encoder.encode(["a dog"])[0].isfinite().all()
    assert load(folder, dtype=torch.bfloat16).encode(["a dog"])[0].dtype == torch.float32


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_full_checkpoints_and_either_name_of_the_embedding(
    tiny: T5Encoder, folder: Path, tmp_path: Path, embedding: str
) -> None:
    state = load_file(folder / "model.safetensors")
    table = state.pop("shared.weight")
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if embedding in (name, "both"):
            state[name] = table.clone()
    state |= {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    for name in ("config.json", "spiece.model", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).encode(["a red circle"])[0], tiny.encode(["a red circle"])[0])


@needs_shipped
def test_shipped_encoder_tells_attributes_apart() -> None:
    encoder = load(SHIPPED)
    base = "a red circle moving left on a black background"
    others = [base.replace(*pair) for pair in (("red", "blue"), ("circle", "square"), ("left", "right"))]
    others.append(base.replace("black", "dark green"))
    same = base.replace("moving", "going")
    features, mask = encoder.encode([base, same, *others])
    mean = features[:, 0].sum(1) / mask.sum(1, keepdim=True)
    distance = (mean - mean[0]).norm(dim=1)
    assert distance[2:].min() > 2 * distance[1]
    assert 0.9 < features[:, 0][mask.bool()].square().mean().sqrt() < 1.1


@needs_shipped
@pytest.mark.parametrize("text", ["", " ", "zxqv flumph 123!", "中文 🎉", "A CAT in the Garden"])
def test_shipped_encoder_takes_any_text(text: str) -> None:
    features, mask = load(SHIPPED).encode([text])
    assert features.isfinite().all() and mask.all() and features.shape[2] >= 1


@needs_shipped
def test_shipped_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 3_000_000
