"""`opensora convert`: containers, layouts and number formats; what is refused; and `opensora models`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.acceleration.model_parts import kept_in_float32
from opensora.checkpoints import builder, convert, save
from opensora.checkpoints.fit import load_weights
from opensora.checkpoints.key_mapping import POSITIONS
from opensora.checkpoints.read import read_state_dict
from opensora.checkpoints.save import save_file, save_pretrained
from opensora.checkpoints.summary import content_hash
from opensora.cli import main
from opensora.config import find_config, model_zoo
from opensora.errors import ConfigError, WeightsError
from tests.checkpoints import tree
from tests.full import some
from tests.tiny import make_tiny_stdit3, make_tiny_vae
from tests.zoo import SMALL, dit, latte, make_vae, pixart, stdit, stdit2

CPU = torch.device("cpu")
TEXT = dict(caption_channels=32, model_max_length=120)
LONG_TEXT = dict(caption_channels=32, model_max_length=300)
# What is published -> how it is made, the model section that it fits, and whether the authors' layout is not ours.
PUBLISHED = {
    "DiT": (lambda folder: dit(folder / "a.pt", "label_10"), dict(type="DiT", condition="label_10", **SMALL), True),
    "Latte": (lambda folder: latte(folder / "a.pt", "label_3"), dict(type="Latte", condition="label_3", **SMALL), True),
    "PixArt": (lambda folder: pixart(folder / "a.pth"), dict(type="PixArt", **SMALL, **TEXT), True),
    "PixArtMS": (lambda folder: pixart(folder / "a.pth", "PixArtMS"), dict(type="PixArtMS", **SMALL, **TEXT), True),
    "PixArt-Sigma": (
        lambda folder: pixart(folder / "a.pth", text_length=300), dict(type="PixArt-Sigma", **SMALL, **LONG_TEXT), True,
    ),
    "STDiT": (lambda folder: stdit(folder / "a.pth"), dict(type="STDiT", **SMALL, **TEXT), False),
    "STDiT2": (lambda folder: stdit2(folder / "a"), dict(type="STDiT2"), False),
    "STDiT3": (lambda folder: make_tiny_stdit3(folder / "a"), dict(type="STDiT3"), False),
    "AutoencoderKL": (lambda folder: make_vae(folder / "a"), dict(type="VideoAutoencoderKL"), True),
    "video autoencoder": (lambda folder: make_tiny_vae(folder / "a"), dict(type="VideoAutoencoderPipeline"), False),
}  # fmt: skip


def config_of(folder: Path, **section: object) -> str:
    """A configuration file with this model section."""
    file = folder / "config.py"
    file.write_text(f"model = {section!r}\n")
    return str(file)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_stdit3(tmp_path / "model")


class TestContainers:
    def test_round_trip_is_exact(self, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        state = {**read_state_dict(model), "half": torch.randn(3).bfloat16(), "count": torch.tensor(3)}
        save_file(state, tmp_path / "a.safetensors")
        steps = [("pt", "b.pt"), ("hf", "c"), ("safetensors", "d.safetensors"), ("pt", "e.bin")]
        source = "a.safetensors"
        for to, name in steps:
            assert main(["convert", str(tmp_path / source), str(tmp_path / name), "--to", to]) == 0
            assert_same(read_state_dict(tmp_path / name), state)
            printed = capsys.readouterr().out
            assert printed.startswith(f"{tmp_path / name}: {len(state)} tensors, ") and printed.count("\n") == 1
            assert content_hash(state)[:12] in printed
            source = name
        assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()

    def test_a_folder_keeps_its_config(self, tmp_path: Path, model: Path) -> None:
        convert(str(model), str(tmp_path / "b"), "hf")
        assert tree(tmp_path / "b") == tree(model)

    def test_a_training_checkpoint(self, tmp_path: Path, model: Path) -> None:
        (tmp_path / "run").mkdir()
        model.rename(tmp_path / "run" / "model")
        torch.save({"a": torch.ones(1)}, tmp_path / "run" / "ema.pt")
        convert(str(tmp_path / "run"), str(tmp_path / "b"), "hf")
        assert tree(tmp_path / "b") == tree(tmp_path / "run" / "model")
        convert(str(tmp_path / "run" / "ema.pt"), str(tmp_path / "c"), "hf")
        assert read_state_dict(tmp_path / "c")["a"] == 1
        assert (tmp_path / "c" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()

    @pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
    def test_number_formats(self, tmp_path: Path, model: Path, name: str, dtype: torch.dtype) -> None:
        state = {**read_state_dict(model), "count": torch.tensor(3)}
        save_file(state, tmp_path / "a.pt")
        assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--to", "pt", "--dtype", name]) == 0
        found = read_state_dict(tmp_path / "b.pt")
        assert found["rope.freqs"].dtype == torch.float32 and found["count"].dtype == torch.int64
        kept = {n for n in state if kept_in_float32(n) or n == "count"}
        assert_same(found, {n: t if n in kept else t.to(dtype) for n, t in state.items()})


class TestLayouts:
    @pytest.mark.parametrize("name", PUBLISHED)
    @some(5)
    def test_there_and_back(self, tmp_path: Path, name: str) -> None:
        make, section, differs = PUBLISHED[name]
        source = make(tmp_path)
        published, config = read_state_dict(source), config_of(tmp_path, **section)
        argv = ["--to", "safetensors", "--config", config]
        assert main(["convert", str(source), str(tmp_path / "ours.safetensors"), *argv]) == 0
        ours = read_state_dict(tmp_path / "ours.safetensors")
        without_positions = {n: t for n, t in published.items() if n not in POSITIONS}
        same = ours.keys() == without_positions.keys() and all(ours[n].shape == published[n].shape for n in ours)
        assert same != differs
        back = ["convert", str(tmp_path / "ours.safetensors"), "--to", "pt", "--layout", "original"]
        assert main([*back, str(tmp_path / "back.pt")]) == 0
        assert_same(read_state_dict(tmp_path / "back.pt"), without_positions)
        if source.is_file():  # folders state the sizes, which this configuration leaves out
            assert main([*back, str(tmp_path / "checked.pt"), "--config", config]) == 0
            assert_same(read_state_dict(tmp_path / "checked.pt"), without_positions)

    @pytest.mark.parametrize("name", PUBLISHED)
    @some(4)
    def test_a_folder_of_ours_says_how_to_build_it(self, tmp_path: Path, name: str) -> None:
        make, section, _ = PUBLISHED[name]
        source = make(tmp_path)
        summary = convert(str(source), str(tmp_path / "ours"), "hf", config_of(tmp_path, **section))
        size = {"input_size": (1, 8, 8)}
        for path, known in ((source, section), (tmp_path / "ours", {"type": section["type"]})):
            path_model = builder.build_model(known, path, size, size)
            loaded = load_weights(path_model, path)
            if path == source:
                expected = path_model.state_dict()
                assert loaded.dropped == summary.dropped and loaded.renamed == summary.renamed
            else:
                assert not (loaded.dropped or loaded.renamed or loaded.resized)
                assert_same(path_model.state_dict(), expected)

    def test_summary_line_tells_the_changes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = config_of(tmp_path, type="PixArt", **SMALL, **{**TEXT, "model_max_length": 7})
        assert (
            main(["convert", str(pixart(tmp_path / "a.pth")), str(tmp_path / "b.pt"), "--to=pt", "--config", config])
            == 0
        )
        line = capsys.readouterr().out
        assert line.endswith("dropped pos_embed, resized x_embedder.proj.weight, y_embedder.y_embedding\n")
        assert read_state_dict(tmp_path / "b.pt")["y_embedder.y_embedding"].shape == (7, 32)

    def test_the_file_says_what_the_configuration_leaves_out(self, tmp_path: Path) -> None:
        source, config = pixart(tmp_path / "a.pth", text_length=300), config_of(tmp_path, type="PixArt", **SMALL)
        convert(str(source), str(tmp_path / "b"), "hf", config)
        stated = json.loads((tmp_path / "b" / "config.json").read_text())
        expected = {"model_type": "PixArt", **SMALL, "caption_channels": 32, "model_max_length": 300}
        assert {name: stated[name] for name in expected} == expected
        assert "input_size" not in stated  # weights are of no size

    def test_part_of_a_model_only_when_asked(self, tmp_path: Path) -> None:
        source, section = pixart(tmp_path / "a.pth", text_length=300), dict(type="STDiT3", **SMALL)
        with pytest.raises(WeightsError, match=r"does not fit STDiT3: .*missing "):
            convert(str(source), str(tmp_path / "b.pt"), "pt", config_of(tmp_path, **section))
        config = config_of(tmp_path, strict=False, **section)
        summary = convert(str(source), str(tmp_path / "b.pt"), "pt", config)
        found = read_state_dict(tmp_path / "b.pt")
        assert "spatial_blocks.1.attn.qkv.weight" in found and not {*summary.initial} & {*found}
        assert "temporal_blocks.0.attn.qkv.weight" in summary.initial and "left at initial values" in str(summary)
        convert(str(tmp_path / "b.pt"), str(tmp_path / "c.pt"), "pt", layout="original")
        published = read_state_dict(source)
        assert_same(read_state_dict(tmp_path / "c.pt"), {n: t for n, t in published.items() if n != "pos_embed"})

    @pytest.mark.parametrize("config", ["dit/inference/1x256x256-class.py", "opensora-v1-2/inference/sample.py"])
    def test_configurations_of_the_repository(self, tmp_path: Path, config: str) -> None:
        """Of full size, so that the small file is refused, tensor by tensor."""
        with pytest.raises(
            WeightsError, match=r"x_embedder\.proj\.weight: expected float32 \[1152, 4, 1, 2, 2\], found"
        ):
            convert(str(pixart(tmp_path / "a.pth")), str(tmp_path / "b.pt"), "pt", str(find_config(config)))
        assert not (tmp_path / "b.pt").exists()


class TestDestination:
    @pytest.mark.parametrize(("to", "name"), [("pt", "b.pt"), ("safetensors", "b.safetensors"), ("hf", "b")])
    def test_what_exists_is_replaced_only_when_asked(self, tmp_path: Path, model: Path, to: str, name: str) -> None:
        target = tmp_path / name
        save_pretrained({"old": torch.zeros(1)}, target, {}) if to == "hf" else save_file(
            {"old": torch.zeros(1)}, target
        )
        before = tree(tmp_path)
        with pytest.raises(ConfigError, match=rf"{name} exists; choose another path, or replace it with --force$"):
            convert(str(model), str(target), to)
        assert tree(tmp_path) == before
        convert(str(model), str(target), to, force=True)
        assert_same(read_state_dict(target), read_state_dict(model))

    def test_a_folder_is_never_replaced_by_a_file_nor_a_file_by_a_folder(self, tmp_path: Path, model: Path) -> None:
        (tmp_path / "b.pt").mkdir()
        (tmp_path / "file").touch()
        before = tree(tmp_path)
        for to, name in (("pt", "b.pt"), ("hf", "file")):
            with pytest.raises(ConfigError, match=rf"{name} exists; choose another path$"):
                convert(str(model), str(tmp_path / name), to, force=True)
        assert tree(tmp_path) == before

    def test_other_files_of_a_folder_stay(self, tmp_path: Path, model: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "tokenizer.json").write_text("{}")
        convert(str(model), str(tmp_path / "b"), "hf", force=True)
        assert tree(tmp_path / "b") == {**tree(model), "tokenizer.json": b"{}"}

    @pytest.mark.parametrize(("to", "name"), [("pt", "b.safetensors"), ("safetensors", "b.pt"), ("pt", "b")])
    def test_endings_tell_the_truth(self, tmp_path: Path, model: Path, to: str, name: str) -> None:
        with pytest.raises(ConfigError, match=rf"--to {to} writes one file, whose name ends in \.{to}"):
            convert(str(model), str(tmp_path / name), to)

    @pytest.mark.parametrize(("to", "name"), [("pt", "b.pt"), ("safetensors", "b.safetensors"), ("hf", "b")])
    @pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
    def test_whole_or_not_at_all(
        self, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, to: str, name: str, failure: BaseException
    ) -> None:
        def fail(tensors: object, path: Path, **_: object) -> None:
            Path(path).write_bytes(b"half")
            raise failure

        before = tree(tmp_path)
        monkeypatch.setattr(save, "save_safetensors", fail)
        monkeypatch.setattr(torch, "save", fail)
        assert main(["convert", str(model), str(tmp_path / name), "--to", to]) in (1, 130)
        assert tree(tmp_path) == before


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def damage(folder: Path, kind: str) -> Path:
    """A PixArt file as published, with one thing wrong."""
    state = torch.load(pixart(folder / "a.pth"), weights_only=True)["state_dict"]
    file = folder / "damaged.pth"
    if kind == "missing":
        del state["blocks.1.attn.qkv.bias"]
    elif kind == "extra":
        state["blocks.7.attn.qkv.bias"] = torch.zeros(3)
    elif kind == "wrong shape":
        state["t_block.1.bias"] = torch.zeros(5)
    elif kind == "runs code":
        state["evil"] = Evil()
    elif kind == "index":
        save_pretrained(state, folder / "sharded", {}, max_shard_bytes=20_000)
        shard = next((folder / "sharded").glob("model-00002-of-*.safetensors"))
        held = read_state_dict(shard)
        del held[min(held)]
        save_file(held, shard)
        return folder / "sharded"
    if kind == "wrong model":
        return dit(file, "label_10")
    torch.save({"state_dict": state}, file)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-5000])
    return file


DAMAGE = {
    "missing": "damaged.pth does not fit PixArt: missing blocks.1.attn.qkv.bias float32 [",
    "extra": "damaged.pth does not fit PixArt: unexpected blocks.7.attn.qkv.bias float32 [3]\n",
    "wrong shape": "damaged.pth does not fit PixArt: t_block.1.bias: expected float32 [",
    "wrong model": "damaged.pth does not fit PixArt: missing t_block.1.weight float32",
    "truncated": "damaged.pth: truncated, damaged or not a PyTorch checkpoint",
    "runs code": "damaged.pth: refused, it asks to run code (",
    "index": "safetensors: lacks tensors that the index lists: ",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--to", "safetensors", "--config", config_of(tmp_path, type="PixArt", **SMALL, **TEXT)]
    source = damage(tmp_path, kind)
    assert main(["convert", "a.pth", "whole.safetensors", *argv]) == 0
    capsys.readouterr()
    assert main(["convert", str(source), "out.safetensors", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and DAMAGE[kind] in error
    assert not Path("out.safetensors").exists() and not Path("ran").exists()
    model = builder.build_model(dict(type="PixArt", **SMALL, **TEXT), None)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, source)
    assert DAMAGE[kind].strip() in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("vae = dict(type='VideoAutoencoderKL')", "has no model = dict(type=...)"),
        ("model = dict(depth=2)", "has no model = dict(type=...)"),
        ("model = dict(type='PixArts')", "did you mean 'PixArt'?"),
        ("model = dict(type='rflow')", "model type 'rflow' is not known"),
        ("model = dict(type='PixArt', dept=2)", "unknown setting 'dept'; did you mean 'depth'?"),
        ("import os", "config.py"),
    ],
)
def test_wrong_configurations(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        convert(str(pixart(tmp_path / "a.pth")), str(tmp_path / "b.pt"), "pt", str(tmp_path / "config.py"))
    assert reason in str(caught.value) and not (tmp_path / "b.pt").exists()


def test_models_are_listed_at_once() -> None:
    code = (
        "import sys, time, opensora.cli as cli\n"
        "assert cli.main(['models']) == 0\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'transformers', 'diffusers', 'av', 'PIL'} & set(sys.modules)))\n"
        "print(time.process_time())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    table, heavy, seconds = done.stdout.rsplit("\n", 3)[:3]
    assert (table, heavy) == (model_zoo.table(), "HEAVY []"), done.stderr
    assert float(seconds) < 4  # of processor time; half of one where nothing else runs
