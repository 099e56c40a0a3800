"""Reading, checking, loading, summarising and writing checkpoints, on small modules."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import ClassVar, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from opensora import registry
from opensora.checkpoints import save
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.hub import checkpoint_files, read_config_json
from opensora.checkpoints.inspection import family, inspect
from opensora.checkpoints.key_mapping import KEY_MAPPINGS, TRANSFORMER, Drop, Rename
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file, save_pretrained
from opensora.checkpoints.summary import content_hash, summarize
from opensora.errors import WeightsError
from opensora.models.stdit.stdit import STDiT
from opensora.models.vae.vae import FrameAutoencoder, VideoAutoencoderKL
from opensora.models.vae.vae_svd import VideoAutoencoderKLTemporalDecoder
from tests.full import some
from tests.test_encoders import SHAPES

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


class Rope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.freqs = nn.Parameter(torch.arange(4.0), requires_grad=False)


class Embedder(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(rows, 3))


class Small(nn.Module):
    """Parameters, a frozen one, buffers of each kind, and a text table."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.rope = Rope()
        self.y_embedder = Embedder(rows)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(4, 2)
        self.embed = nn.Embedding(4, 2)
        self.embed.weight = self.shared.weight


def on_meta(kind: type[nn.Module], *args: int) -> nn.Module:
    with torch.device("meta"):
        return kind(*args)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in Small().state_dict().items()}


class TestReading:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_round_trip(self, tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
        state["half"] = torch.randn(3, 2).bfloat16()
        save_file(state, tmp_path / f"new/folder/x{suffix}")
        assert_same(read_state_dict(tmp_path / f"new/folder/x{suffix}"), state)
        assert_same(read_state_dict(tmp_path / "new" / "folder"), state)

    @pytest.mark.parametrize("wrapper", ["state_dict", "ema", "model", "module"])
    def test_wrapped_state_dicts(self, tmp_path: Path, state: dict[str, Tensor], wrapper: str) -> None:
        torch.save({wrapper: state, "epoch": 3}, tmp_path / "x.pt")
        assert_same(read_state_dict(tmp_path / "x.pt"), state)

    def test_ema_before_model(self, tmp_path: Path) -> None:
        torch.save({"model": {"a": torch.zeros(1)}, "ema": {"module": {"a": torch.ones(1)}}}, tmp_path / "x.pt")
        assert read_state_dict(tmp_path / "x.pt")["a"] == 1

    def test_old_pickle_format(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
        assert_same(read_state_dict(tmp_path / "x.pth"), state)

    @pytest.mark.parametrize(
        "payload", [[torch.zeros(1)], torch.zeros(2), {}, {"a": torch.zeros(1), "epoch": 3}, {1: 2}]
    )
    def test_payload_without_a_state_dict(self, tmp_path: Path, payload: object) -> None:
        torch.save(payload, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=r"x\.pt: .*not a state dict"):
            read_state_dict(tmp_path / "x.pt")

    def test_sharded_training_checkpoint(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        names = sorted(state)
        shards = {"pytorch_model-00001.bin": names[:2], "pytorch_model-00002.bin": names[2:]}
        (tmp_path / "model").mkdir()
        for file, held in shards.items():
            torch.save({name: state[name] for name in held}, tmp_path / "model" / file)
        index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
        (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert_same(read_state_dict(tmp_path), state)
        assert_same(read_state_dict(tmp_path / "model" / "pytorch_model.bin.index.json"), state)

    def test_index_that_promises_too_much(self, tmp_path: Path) -> None:
        torch.save({"a": torch.zeros(1)}, tmp_path / "one.bin")
        (tmp_path / "model.bin.index.json").write_text('{"weight_map": {"a": "one.bin", "b": "one.bin"}}')
        with pytest.raises(WeightsError, match=r"one\.bin: lacks .* b;"):
            read_state_dict(tmp_path)


class TestDamage:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("left", [0.01, 0.5, 0.97])
    def test_truncated(self, tmp_path: Path, suffix: str, left: float) -> None:
        file = tmp_path / f"x{suffix}"
        save_file({"a": torch.randn(300, 10), "b": torch.randn(7)}, file)
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * left)])
        with pytest.raises(WeightsError, match=rf"x\{suffix}: truncated, damaged or no") as caught:
            read_state_dict(file)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("content", [b"\x01\x02 a picture", bytes(range(256)), struct.pack("<Q", 2**62)])
    def test_other_kinds_of_file(self, tmp_path: Path, suffix: str, content: bytes) -> None:
        file = tmp_path / f"x{suffix}"
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=rf"x\{suffix}: truncated, damaged or no"):
            read_state_dict(file)

    def test_formats_under_each_others_names(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / "x.pt")
        save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
        os.rename(tmp_path / "x.pt", tmp_path / "x.safetensors")
        os.rename(tmp_path / "y.safetensors", tmp_path / "y.pt")
        for file, name in (("x.safetensors", r"x\.pt"), ("y.pt", r"y\.safetensors")):
            with pytest.raises(WeightsError, match=rf"its content is that of a .* file: rename it to {name}$"):
                read_state_dict(tmp_path / file)

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "x.mp4").touch()
        with pytest.raises(WeightsError, match=r"x\.mp4: not a weight file"):
            read_state_dict(tmp_path / "x.mp4")
        with pytest.raises(WeightsError, match=r"cannot write this kind of file"):
            save_file({"a": torch.zeros(1)}, tmp_path / "y.mp4")

    def test_pickle_that_would_run_code(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'ran'}",)

        torch.save({"a": torch.zeros(1), "evil": Evil()}, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=r"x\.pt: refused, it asks to run code \(\w+\.system\)"):
            read_state_dict(tmp_path / "x.pt")
        assert not (tmp_path / "ran").exists()

    def test_pickled_module(self, tmp_path: Path) -> None:
        torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=r"x\.pt: refused, it asks to run code \(torch\.nn"):
            read_state_dict(tmp_path / "x.pt")


class TestLoading:
    @pytest.mark.parametrize("meta", [False, True])
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_every_tensor_is_filled(self, tmp_path: Path, state: dict[str, Tensor], suffix: str, meta: bool) -> None:
        save_file(state, tmp_path / f"x{suffix}")
        model = on_meta(Small) if meta else Small()
        before = model.first.weight
        summary = load_weights(model, tmp_path / f"x{suffix}")
        assert_same(model.state_dict(), state)
        assert summary.tensors == len(state)
        assert summary.parameters == 15 + 5 + 4 + 1
        assert not (summary.dropped or summary.resized)
        assert model.first.weight.requires_grad and not model.rope.freqs.requires_grad
        assert meta or model.first.weight is before

    @pytest.mark.parametrize("meta", [False, True])
    def test_dtype(self, tmp_path: Path, state: dict[str, Tensor], meta: bool) -> None:
        save_file(state, tmp_path / "x.safetensors")
        model = on_meta(Small) if meta else Small()
        load_weights(model, tmp_path / "x.safetensors", dtype=torch.bfloat16)
        assert model.first.weight.dtype == model.y_embedder.y_embedding.dtype == torch.bfloat16
        assert model.rope.freqs.dtype == torch.float32
        assert model.count.dtype == torch.int64
        assert torch.equal(model.first.weight, state["first.weight"].bfloat16())

    @pytest.mark.parametrize("meta", [False, True])
    def test_without_dtype_the_model_decides(self, tmp_path: Path, state: dict[str, Tensor], meta: bool) -> None:
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        save_file(halves, tmp_path / "x.pt")
        model = on_meta(Small) if meta else Small()
        summary = load_weights(model, tmp_path / "x.pt")
        assert model.first.weight.dtype == torch.float32
        assert summary.dtypes == ("fp16", "int64")

    @pytest.mark.parametrize("meta", [False, True])
    def test_misfits_are_named_and_change_nothing(self, tmp_path: Path, state: dict[str, Tensor], meta: bool) -> None:
        state["first.weight"] = torch.zeros(5, 4)
        state["count"] = torch.tensor(0.5)
        state["extra"] = torch.zeros(2)
        del state["first.bias"]
        save_file(state, tmp_path / "x.pt")
        model = on_meta(Small) if meta else Small()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(WeightsError) as caught:
            load_weights(model, tmp_path / "x.pt", dtype=torch.float16)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / 'x.pt'} does not fit Small: ")
        assert "first.weight: expected float32 [5, 3], found float32 [5, 4]" in message
        assert "count: expected int64 [], found float32 []" in message
        assert "missing first.bias float32 [5]" in message
        assert "unexpected extra float32 [2]" in message
        if not meta:
            assert_same(model.state_dict(), before)

    def test_long_lists_are_cut(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=r"Sequential: (missing \S+ \S+ \[1(, 1)?\]; ){10}and 15 more$"):
            load_weights(nn.Sequential(*[nn.Linear(1, 1) for _ in range(12)]), tmp_path / "x.pt")

    @pytest.mark.parametrize("meta", [False, True])
    def test_tied_weights_may_be_stored_once(self, tmp_path: Path, meta: bool) -> None:
        save_file({"shared.weight": torch.ones(4, 2)}, tmp_path / "x.safetensors")
        model = on_meta(Tied) if meta else Tied()
        load_weights(model, tmp_path / "x.safetensors")
        assert model.embed.weight is model.shared.weight
        assert model.embed.weight.sum() == 8


class TestRules:
    @pytest.mark.parametrize(("rows", "meta"), [(2, False), (6, False), (6, True)])
    def test_text_table_takes_the_models_length(
        self, tmp_path: Path, state: dict[str, Tensor], rows: int, meta: bool
    ) -> None:
        save_file(state, tmp_path / "x.pt")
        model = on_meta(Small, rows) if meta else Small(rows)
        summary = load_weights(model, tmp_path / "x.pt", mapping=TRANSFORMER)
        table = state["y_embedder.y_embedding"]
        wanted = torch.stack([table[min(row, 3)] for row in range(rows)])
        assert torch.equal(model.y_embedder.y_embedding, wanted)
        assert summary.resized == ("y_embedder.y_embedding",)

    def test_text_table_of_another_width_is_a_misfit(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        save_file({**state, "y_embedder.y_embedding": torch.zeros(4, 7)}, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=r"y_embedding: expected float32 \[4, 3\], found float32 \[4, 7\]"):
            load_weights(Small(), tmp_path / "x.pt")

    def test_position_buffers_are_dropped(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        save_file({**state, "pos_embed": torch.zeros(9), "pos_embed_temporal": torch.zeros(9)}, tmp_path / "x.pt")
        summary = load_weights(on_meta(Small), tmp_path / "x.pt", mapping=TRANSFORMER)
        assert summary.dropped == ("pos_embed", "pos_embed_temporal")
        assert "dropped pos_embed, pos_embed_temporal" in str(summary)

    def test_a_model_keeps_its_own_position_buffers(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        save_file({**state, "pos_embed": torch.zeros(9)}, tmp_path / "x.pt")
        model = Small()
        model.register_buffer("pos_embed", torch.ones(3))
        model.register_buffer("pos_embed_temporal", torch.ones(3))
        load_weights(model, tmp_path / "x.pt", mapping=TRANSFORMER)
        assert model.pos_embed.sum() == 3

    def test_rename_and_drop(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        theirs = {name.replace("first.", "layers.first_"): tensor for name, tensor in state.items()}
        save_file({**theirs, "head.a": torch.zeros(1)}, tmp_path / "x.pt")
        rules = (Rename("layers.first_*", "first.*"), Drop("head.*"))
        model = Small()
        summary = load_weights(model, tmp_path / "x.pt", mapping=rules)
        assert summary.dropped == ("head.a",)
        assert_same(model.state_dict(), state)

    @pytest.mark.parametrize("target", sorted({*registry.MODELS.values(), *registry.AUTOENCODERS.values()}))
    def test_every_model_class_has_a_mapping(self, target: str) -> None:
        built = registry.resolve(target)
        cls = built if isinstance(built, type) else get_type_hints(built)["return"]
        assert cls.__name__ in KEY_MAPPINGS

    def test_rename_keeps_each_star(self) -> None:
        rule = Rename("blocks.*.attn.*", "spatial_blocks.*.self.*")
        for there, here in (("blocks.0.attn.w", "spatial_blocks.0.self.w"), ("blocks.a", "blocks.a")):
            assert rule.load(there, torch.zeros(1), {})[0] == here
            assert rule.save(here, torch.zeros(1))[0] == there
        with pytest.raises(ValueError, match=r"number of \*"):
            Rename("a.*", "b")

    @pytest.mark.parametrize(
        ("file", "model", "applies"),
        [("a.1", "b.1", True), ("a.1 b.2", "b.1", False), ("a.1", "b.1 a.1", False), ("a.1", "c.1", False)],
    )
    def test_rename_needs_a_clear_case(self, file: str, model: str, applies: bool) -> None:
        assert Rename("a.*", "b.*").applies(dict.fromkeys(file.split()), dict.fromkeys(model.split())) is applies

    def test_renames_are_told(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        save_file({f"old.{name}": tensor for name, tensor in state.items()}, tmp_path / "x.pt")
        model = nn.ModuleDict({"new": Small()})
        summary = load_weights(model, tmp_path / "x.pt", mapping=(Rename("old.*", "new.*"),))
        assert sorted(summary.renamed) == sorted((f"old.{name}", f"new.{name}") for name in state)
        assert "renamed old." in str(summary) and "and 2 more" in str(summary)

    @pytest.mark.parametrize(
        ("found", "wanted", "fits"),
        [
            ((6, 4, 2, 2), (6, 4, 1, 2, 2), True),
            ((6, 4, 1, 2, 2), (6, 4, 1, 2, 2), True),
            ((6, 4, 2, 2), (6, 4, 2, 2, 2), False),
            ((6, 4, 4, 2), (6, 4, 1, 2, 4), False),
            ((6, 4, 1, 2), (6, 4, 1, 2, 2), False),
            ((6, 4, 2), (6, 4, 1, 2, 1), False),
            ((6, 1, 4, 2, 2), (6, 4, 1, 2, 2), False),
        ],
    )
    def test_a_patch_kernel_gains_only_an_axis_of_time(
        self, tmp_path: Path, found: tuple[int, ...], wanted: tuple[int, ...], fits: bool
    ) -> None:
        model, kernel = nn.Module(), torch.randn(found)
        model.x_embedder = nn.Module()
        model.x_embedder.proj = nn.Module()
        model.x_embedder.proj.weight = nn.Parameter(torch.zeros(wanted))
        save_file({"x_embedder.proj.weight": kernel}, tmp_path / "x.pt")
        if fits:
            summary = load_weights(model, tmp_path / "x.pt", mapping=TRANSFORMER)
            assert torch.equal(model.x_embedder.proj.weight.flatten(), kernel.flatten())
            assert bool(summary.resized) == (found != wanted)
        else:
            with pytest.raises(WeightsError, match=r"x_embedder\.proj\.weight: expected float32 .*, found float32"):
                load_weights(model, tmp_path / "x.pt", mapping=TRANSFORMER)

    @pytest.mark.parametrize("kind", [VideoAutoencoderKL, VideoAutoencoderKLTemporalDecoder])
    @pytest.mark.parametrize("age", ["new", "old names", "old names and convolutions"])
    @pytest.mark.parametrize("meta", [False, True])
    @some(6)
    def test_diffusers_autoencoders(self, tmp_path: Path, kind: type[FrameAutoencoder], age: str, meta: bool) -> None:
        """Every way to publish one loads without being told which."""
        expected = kind(**SHAPES[kind]).state_dict()
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"} if age != "new" else {}
        state = {}
        for name, tensor in expected.items():
            there = name.removeprefix("module.")
            for new, old in names.items():
                there = there.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
            linear = there != name.removeprefix("module.") and tensor.ndim == 2
            state[there] = tensor[..., None, None] if linear and "convolutions" in age else tensor
        save_file(state, tmp_path / "diffusion_pytorch_model.bin")
        with torch.device("meta" if meta else "cpu"):
            model = kind(**SHAPES[kind])
        summary = load_weights(model, tmp_path)
        assert_same(model.state_dict(), expected)
        assert len(summary.renamed) == len(expected) and bool(summary.resized) == ("convolutions" in age)
        assert family(state).endswith("(AutoencoderKLTemporalDecoder)" if "Temporal" in kind.__name__ else "KL)")


class TestFixedPositions:
    """Models of one latent size, whose positions are computed and never read."""

    SETTINGS: ClassVar = dict(hidden_size=8, depth=1, num_heads=2, caption_channels=3, model_max_length=2)

    @pytest.mark.parametrize("meta", [False, True])
    def test_another_size(self, tmp_path: Path, meta: bool) -> None:
        other = STDiT(input_size=(2, 4, 4), **self.SETTINGS)
        save_file(other.state_dict(), tmp_path / "x.pt")
        with torch.device("meta" if meta else "cpu"):
            model = STDiT(input_size=(3, 6, 2), **self.SETTINGS)
            if not meta:
                model.pos_embed.zero_()
            summary = load_weights(model, tmp_path / "x.pt", dtype=torch.float16)
        assert summary.dropped == ("pos_embed", "pos_embed_temporal") and not summary.initial
        assert_same({name: model.get_buffer(name) for name in model.positions()}, model.positions())
        assert model.pos_embed.shape == (1, 3, 8) and model.pos_embed.dtype == torch.float32
        assert torch.equal(model.t_block[1].weight, other.t_block[1].weight.half())

    def test_positions_alone_may_be_missing(self, tmp_path: Path) -> None:
        model = STDiT(input_size=(2, 4, 4), **self.SETTINGS)
        state = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("pos_embed")}
        save_file(state, tmp_path / "x.pt")
        assert not load_weights(model, tmp_path / "x.pt").dropped
        del state["t_block.1.bias"]
        save_file(state, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=r"does not fit STDiT: missing t_block\.1\.bias float32 \[48\]$"):
            load_weights(model, tmp_path / "x.pt")


class TestNotStrict:
    @pytest.fixture
    def file(self, tmp_path: Path, state: dict[str, Tensor]) -> Path:
        """Lacks a bias and has a head."""
        del state["first.bias"]
        save_file({**state, "head": torch.zeros(2)}, tmp_path / "x.pt")
        return tmp_path / "x.pt"

    def test_what_is_missing_stays_and_is_told(
        self, file: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = Small()
        bias = model.first.bias.detach().clone()
        summary = load_weights(model, file, dtype=torch.bfloat16, strict=False)
        assert summary.initial == ("first.bias",) and summary.ignored == ("head",)
        assert torch.equal(model.first.bias, bias.bfloat16())
        assert torch.equal(model.first.weight, state["first.weight"].bfloat16())
        told = "ignored head, left at initial values first.bias"
        assert told in str(summary)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert told in caplog.text and "does not match the Small exactly" in caplog.text

    def test_nothing_is_told_of_a_whole_model(
        self, tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        save_file(state, tmp_path / "x.pt")
        summary = load_weights(on_meta(Small), tmp_path / "x.pt", strict=False)
        assert not summary.initial and "initial" not in str(summary) and not caplog.records

    def test_the_default_is_strict(self, file: Path) -> None:
        with pytest.raises(WeightsError, match=r"missing first\.bias float32 \[5\]; unexpected head float32 \[2\]$"):
            load_weights(Small(), file)

    def test_shapes_still_count(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        save_file({**state, "first.weight": torch.zeros(2, 2)}, tmp_path / "x.pt")
        model = Small()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(WeightsError, match=r"first\.weight: expected float32 \[5, 3\], found float32 \[2, 2\]$"):
            load_weights(model, tmp_path / "x.pt", strict=False)
        assert_same(model.state_dict(), before)

    def test_the_wrong_model_is_refused(self, tmp_path: Path) -> None:
        save_file({"other": torch.zeros(2)}, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=r"does not fit Small: missing .*unexpected other"):
            load_weights(Small(), tmp_path / "x.pt", strict=False)

    def test_the_meta_device_has_no_initial_values(self, file: Path) -> None:
        with pytest.raises(RuntimeError, match=r"strict=False needs a model with initial values.*: first\.bias$"):
            load_weights(on_meta(Small), file, strict=False)


class TestSummary:
    def test_one_line(self, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        save_file({"a": torch.zeros(1000, 2, dtype=torch.bfloat16), "shift": torch.zeros(4).bfloat16()}, file)
        summary = summarize(file, read_state_dict(file))
        assert str(summary) == f"{file}: 2 tensors, 2,000 parameters, bf16, sha256 {summary.sha256[:12]}"

    def test_hash_is_of_the_content(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        state["empty"] = torch.zeros(0, 3)
        hashes = {content_hash(state), content_hash(dict(reversed(state.items())))}
        for suffix in SUFFIXES:
            save_file(state, tmp_path / f"x{suffix}")
            hashes.add(content_hash(read_state_dict(tmp_path / f"x{suffix}")))
        save_pretrained(state, tmp_path / "sharded", {}, max_shard_bytes=50)
        hashes.add(content_hash(read_state_dict(tmp_path / "sharded")))
        strided = {name: t.mT.contiguous().mT if t.ndim == 2 else t for name, t in state.items()}
        assert hashes == {content_hash(strided)}

    @pytest.mark.parametrize(
        "other",
        [
            {"b": torch.zeros(2, 3)},
            {"a": torch.zeros(3, 2)},
            {"a": torch.zeros(2, 3, dtype=torch.int32)},
            {"a": torch.full((2, 3), 1e-40)},
        ],
    )
    def test_hash_sees_name_shape_dtype_and_bytes(self, other: dict[str, Tensor]) -> None:
        assert content_hash(other) != content_hash({"a": torch.zeros(2, 3)})

    def test_hash_is_of_the_file_before_casts_and_rules(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        save_file(state, tmp_path / "x.pt")
        summary = load_weights(Small(2), tmp_path / "x.pt", mapping=TRANSFORMER, dtype=torch.float16)
        assert summary.sha256 == content_hash(state)

    @pytest.mark.parametrize(
        ("names", "title"),
        [
            (["spatial_blocks.0.a", "temporal_blocks.0.a", "fps_embedder.mlp.0.weight"], "STDiT3"),
            (["spatial_vae.module.encoder.conv_in.weight", "temporal_vae.encoder.a", "scale"], "video autoencoder"),
            (["encoder.block_res_blocks.0.0.norm1.weight", "decoder.block_res_blocks.0.a"], "temporal autoencoder"),
            (["encoder.down_blocks.0", "decoder.up_blocks.0", "quant_conv.weight"], "per-frame autoencoder"),
            (["module.encoder.down_blocks.0", "module.decoder.up_blocks.0", "module.quant_conv.w"], "per-frame"),
            (
                [
                    "text_model.embeddings.token_embedding.w",
                    "text_model.encoder.layers.0.self_attn.q",
                    "text_model.final_layer_norm.w",
                ],
                "CLIP",
            ),
            (["blocks.0.attn_temp.w", "t_block_temp.1.w", "t_block.1.w", "fl_embedder.w", "y_embedder.w"], "STDiT2"),
            (["blocks.0.attn_temp.w", "t_block.1.w", "y_embedder.w"], "STDiT ("),
            (["temp_embed", "blocks.0.adaLN_modulation.1.w", "y_embedder.w"], "Latte"),
            (["pos_embed", "blocks.0.adaLN_modulation.1.w", "y_embedder.w"], "DiT"),
            (["t_block.1.w", "blocks.0.cross_attn.w", "y_embedder.w"], "PixArt (alpha or Sigma)"),
            (["t_block.1.w", "blocks.0.cross_attn.w", "y_embedder.w", "blocks.9.attn.sr.w"], "PixArt-Sigma"),
            (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "T5"),
            (["first.weight"], "unknown"),
        ],
    )
    def test_family(self, names: list[str], title: str) -> None:
        assert family(names).startswith(title)

    def test_inspect(self, tmp_path: Path) -> None:
        save_pretrained({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2)}, tmp_path, {"type": "t5"})
        lines = str(inspect(tmp_path)).splitlines()
        assert lines[0].startswith(f"{tmp_path}: 1 tensors, 2 parameters, fp32, sha256 ")
        assert lines[1:] == ["config.json: t5", "family: T5 text encoder"]


class TestWriting:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_shared_strided_and_sliced_tensors(self, tmp_path: Path, suffix: str) -> None:
        base = torch.arange(1000.0).reshape(10, 100)
        state = {"a": base, "tied": base, "turned": base.T, "slice": base[2:4], "param": nn.Parameter(base[0])}
        save_file(state, tmp_path / f"x{suffix}")
        assert_same(read_state_dict(tmp_path / f"x{suffix}"), {name: tensor.detach() for name, tensor in state.items()})
        assert (tmp_path / f"x{suffix}").stat().st_size < 20_000

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
    def test_permissions_are_those_of_any_new_file(self, tmp_path: Path, suffix: str, umask: int, mode: int) -> None:
        old = os.umask(umask)
        try:
            save_file({"a": torch.zeros(1)}, tmp_path / f"x{suffix}")
            save_pretrained({"a": torch.zeros(1)}, tmp_path / "folder", {})
        finally:
            os.umask(old)
        written = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert len(written) == 3 and {file.stat().st_mode & 0o777 for file in written} == {mode}

    def test_folder(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        save_pretrained(state, tmp_path / "new", {"type": "Small", "rows": 4})
        assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
        assert read_config_json(tmp_path / "new") == {"type": "Small", "rows": 4}
        assert_same(read_state_dict(tmp_path / "new"), state)

    def test_shards(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        save_pretrained(state, tmp_path, {}, max_shard_bytes=64)
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(shards) > 1 and shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
        assert_same(read_state_dict(tmp_path), state)

    def test_saving_again_leaves_no_older_weights(self, tmp_path: Path, state: dict[str, Tensor]) -> None:
        (tmp_path / "model-best.safetensors").touch()
        for limit in (64, 10**9, 120, 64):
            state["first.bias"] = state["first.bias"] + 1
            save_pretrained(state, tmp_path, {}, max_shard_bytes=limit)
            assert_same(read_state_dict(tmp_path), state)
            assert len(list(tmp_path.glob("model*.safetensors"))) == len(checkpoint_files(tmp_path)) + 1

    @pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_a_failed_write_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, failure: BaseException
    ) -> None:
        file = tmp_path / f"x{suffix}"
        save_file({"a": torch.ones(2)}, file)

        def fail(tensors: object, path: Path, **_: object) -> None:
            Path(path).write_bytes(b"half")
            raise failure

        monkeypatch.setattr(save, "save_safetensors", fail)
        monkeypatch.setattr(torch, "save", fail)
        interrupted = isinstance(failure, KeyboardInterrupt)
        message = None if interrupted else r"cannot be written \(.*No space left"
        with pytest.raises(KeyboardInterrupt if interrupted else WeightsError, match=message):
            save_file({"a": torch.zeros(2)}, file)
        assert list(tmp_path.iterdir()) == [file]
        assert_same(read_state_dict(file), {"a": torch.ones(2)})

    def test_a_failed_shard_leaves_the_old_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = {"a": torch.ones(2), "b": torch.ones(2)}
        save_pretrained(old, tmp_path, {"version": 1}, max_shard_bytes=8)
        names = sorted(tmp_path.iterdir())
        real, calls = save.save_safetensors, []

        def fail_second(tensors: dict[str, Tensor], path: Path, **options: object) -> None:
            calls.append(path)
            if len(calls) == 2:
                raise OSError("disk full")
            real(tensors, path, **options)

        monkeypatch.setattr(save, "save_safetensors", fail_second)
        with pytest.raises(WeightsError, match=r"model-00002-of-00002.safetensors: cannot be written"):
            save_pretrained({name: tensor + 1 for name, tensor in old.items()}, tmp_path, {"version": 2}, 8)
        assert sorted(tmp_path.iterdir()) == names
        assert read_config_json(tmp_path) == {"version": 1}
        assert_same(read_state_dict(tmp_path), old)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX limits")
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_a_full_disk(self, tmp_path: Path, suffix: str) -> None:
        import resource
        import signal

        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
        try:
            with pytest.raises(WeightsError, match="cannot be written"):
                save_file({"a": torch.zeros(10_000)}, tmp_path / f"x{suffix}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, handler)
        assert list(tmp_path.iterdir()) == []
