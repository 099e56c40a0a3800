"""Sections of configurations and the config.json of checkpoints: declared once, checked to the bottom."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opensora import registry
from opensora.checkpoints import builder
from opensora.config.sections import DATASETS, SECTIONS, TYPES, checked
from opensora.config.settings import InferenceSettings, TrainSettings
from opensora.errors import ConfigError, OpenSoraError, WeightsError
from tests.tiny import TINY_STDIT3, make_tiny_t5

MODEL = {"type": "STDiT3-XL/2"}
HUGE = 10**30
GIVEN_BY_US = {"t5": {"model", "tokenizer"}, "clip": {"model", "tokenizer"}}  # arguments that no section sets
# training reads these sections itself
NO_BUILDER = {"EncodedDataset", "BatchFeatureDataset", "ShapeClips", "WorldClips"}


def settings(**changes: Any) -> InferenceSettings:
    return InferenceSettings.from_config({"model": MODEL, "num_frames": 1, **changes}, "s.py")


def signature(name: str) -> inspect.Signature:
    found = inspect.signature(registry.builder(name), eval_str=True)
    if any(p.kind is p.VAR_KEYWORD for p in found.parameters.values()):
        found = inspect.signature(found.return_annotation)
    return found


def test_every_builder_has_a_declaration():
    assert set(TYPES) - NO_BUILDER == set(registry.BUILDERS)
    assert set(SECTIONS["model"]) == {*registry.MODELS, *registry.AUTOENCODERS}
    assert set(DATASETS) - NO_BUILDER == set(registry.DATASETS)


@pytest.mark.parametrize("name", sorted(registry.BUILDERS))
def test_declared_keywords_are_those_of_the_builder(name):
    """Names and defaults; a value that is a dict or None may differ in how it is written."""
    taken = signature(name).parameters
    declared = TYPES[name].defaults()
    assert set(declared) == set(taken) - GIVEN_BY_US.get(name, set())
    assert {key: taken[key].default for key in declared} == declared


@pytest.mark.parametrize("name", sorted(TYPES))
def test_every_keyword_is_explained(name):
    for key, field in TYPES[name].model_fields.items():
        assert field.description and field.examples[0] is not None, key
        checked({"type": name, key: field.examples[0]} if key != "type" else {"type": name})


@pytest.mark.parametrize(
    ("section", "value", "problem"),
    [
        # whole numbers
        (
            "scheduler",
            {"type": "rflow", "num_sampling_steps": 3.5},
            "num_sampling_steps must be an integer; it is 3.5",
        ),
        (
            "scheduler",
            {"type": "rflow", "num_sampling_steps": "3"},
            "num_sampling_steps must be an integer; it is '3'",
        ),
        (
            "scheduler",
            {"type": "rflow", "num_sampling_steps": True},
            "num_sampling_steps must be an integer; it is True",
        ),
        (
            "scheduler",
            {"type": "iddpm", "num_sampling_steps": 10_001},
            "num_sampling_steps must be at most 10000; it is 10001",
        ),
        ("scheduler", {"type": "dpm-solver", "order": 4}, "order must be at most 3; it is 4"),
        ("scheduler", {"type": "iddpm", "diffusion_steps": HUGE}, "diffusion_steps must be "),
        ("vae", {"type": "VideoAutoencoderKL", "micro_batch_size": 4.5}, "micro_batch_size must be an integer"),
        (
            "vae",
            {"type": "VideoAutoencoderKL", "act_fn": "tanh"},
            "vae.act_fn 'tanh' is not known; choose one of silu, swish",
        ),
        (
            "vae",
            {"type": "VideoAutoencoderKL", "down_block_types": ["DownBlock2D"] * 4},
            "down_block_types[0] 'DownBlock2D' is not known; did you mean 'DownEncoderBlock2D'?",
        ),
        ("vae", {"type": "OpenSoraVAE_V1_2", "micro_frame_size": "17"}, "micro_frame_size must be an integer"),
        (
            "vae",
            {"type": "OpenSoraVAE_V1_2", "vae_2d": {"layers_per_block": 0}},
            "vae_2d.layers_per_block must be at least 1",
        ),
        ("vae", {"type": "OpenSoraVAE_V1_2", "shift": [0.1, "x"]}, "shift[1] must be a number; it is 'x'"),
        ("text_encoder", {"type": "t5", "model_max_length": "x"}, "model_max_length must be an integer; it is 'x'"),
        ("text_encoder", {"type": "clip", "model_max_length": 0}, "model_max_length must be at least 1; it is 0"),
        ("text_encoder", {"type": "classes", "num_classes": 10**9}, "num_classes must be at most 1000000"),
        # numbers, switches, texts, choices
        ("scheduler", {"type": "rflow", "cfg_scale": None}, "cfg_scale must be a number; it is None"),
        ("scheduler", {"type": "rflow", "cfg_scale": float("inf")}, "cfg_scale must be a finite number; it is inf"),
        ("scheduler", {"type": "rflow", "cfg_scale": [7]}, "cfg_scale must be a number; it is [7]"),
        ("scheduler", {"type": "iddpm", "ddim_eta": 1.5}, "ddim_eta must be at most 1; it is 1.5"),
        (
            "scheduler",
            {"type": "rflow", "use_timestep_transform": "yes"},
            "use_timestep_transform must be True or False",
        ),
        (
            "scheduler",
            {"type": "rflow", "sample_method": "logit"},
            "sample_method 'logit' is not known; did you mean 'logit-normal'?",
        ),
        (
            "scheduler",
            {"type": "dpm-solver", "method": 3},
            "method 3 is not known; choose one of multistep, singlestep",
        ),
        ("model", {**MODEL, "from_pretrained": 3}, "from_pretrained must be a string; it is 3"),
        ("model", {**MODEL, "from_pretrained": "a\0b"}, "from_pretrained must be a string without NUL"),
        ("model", {**MODEL, "from_pretrained": "o\udcff"}, r"from_pretrained must be UTF-8 text; it is 'o\udcff'"),
        ("vae", {"type": "VideoAutoencoderKL", "subfolder": 3}, "subfolder must be a string; it is 3"),
        ("vae", {"type": "VideoAutoencoderKL", "cache_dir": ["x"]}, "cache_dir must be a string; it is ['x']"),
        (
            "text_encoder",
            {"type": "t5", "local_files_only": "True"},
            "local_files_only must be True or False; it is 'True'",
        ),
        ("model", {**MODEL, "qk_norm": "yes"}, "qk_norm must be True or False; it is 'yes'"),
        ("model", {**MODEL, "qk_norm": 1}, "qk_norm must be True or False; it is 1"),
        # sizes
        ("model", {**MODEL, "hidden_size": -256}, "hidden_size must be at least 1; it is -256"),
        ("model", {**MODEL, "hidden_size": HUGE}, "hidden_size must be "),
        ("model", {**MODEL, "num_heads": 0}, "num_heads must be at least 1; it is 0"),
        ("model", {**MODEL, "mlp_ratio": float("inf")}, "mlp_ratio must be a finite number; it is inf"),
        ("model", {**MODEL, "mlp_ratio": 0}, "mlp_ratio must be above 0; it is 0"),
        ("model", {**MODEL, "mlp_ratio": "4"}, "mlp_ratio must be a number; it is '4'"),
        ("model", {**MODEL, "depth": 10**9}, "depth must be at most 256; it is 1000000000"),
        ("model", {**MODEL, "patch_size": (1, 2)}, "patch_size"),
        ("model", {**MODEL, "patch_size": (1, 2, 0)}, "patch_size[2] must be at least 1; it is 0"),
        ("model", {**MODEL, "model_max_length": "x"}, "model_max_length must be an integer; it is 'x'"),
        ("model", {**MODEL, "hidden_size": 100, "num_heads": 16}, "hidden_size 100 must be a multiple of num_heads 16"),
        ("model", {**MODEL, "hidden_size": 65_536, "depth": 256}, "parameters; at most 1e+13 are built"),
        ("model", {**MODEL, "mlp_ratio": 1e6}, "parameters; at most 1e+13 are built"),
        ("model", {"type": "PixArt", "input_size": (1, 4096, 4096)}, "more than 1,048,576 tokens"),
        ("model", {"type": "DiT", "condition": "label_x"}, "condition must be of the form"),
        ("model", {"type": "DiT", "condition": "label_99999999"}, "condition must be of the form"),
        (
            "model",
            {"type": "PixArt-Sigma", "kv_compress_config": {"scale": 2}},
            "unknown setting 'model.kv_compress_config.scale'",
        ),
        ("dataset", {"type": "VideoTextDataset", "num_frames": True}, "num_frames must be an integer; it is True"),
        ("dataset", {"type": "VideoTextDataset", "image_size": (0, 64)}, "image_size[0] must be at least 1; it is 0"),
        ("dataset", {"type": "VariableVideoTextDataset", "frame_interval": 0}, "frame_interval must be at least 1"),
        (
            "dataset",
            {"type": "ShapeClips", "sizes": [(17, 64, 64)]},
            "sizes[0] must be (num_frames, height, width, share)",
        ),
        # keys
        (
            "scheduler",
            {"type": "rflow", "num_sampling_step": 3},
            "unknown setting 'scheduler.num_sampling_step'; did you mean",
        ),
        (
            "model",
            {**MODEL, "from_pretraind": "x"},
            "unknown setting 'model.from_pretraind'; did you mean 'from_pretrained'?",
        ),
        ("scheduler", {"type": ["rflow"]}, "scheduler type ['rflow'] is not known"),
        ("scheduler", {"type": "t5"}, "scheduler type 't5' is not known; choose one of rflow"),
        ("scheduler", ["rflow"], "scheduler must be a dict; it is ['rflow']"),
        ("model", {}, "model needs a type"),
    ],
)
def test_wrong_values_in_sections(section, value, problem):
    """One line, which opens with the file and names section, key, value and expectation."""
    with pytest.raises(ConfigError) as failure:
        settings(**{section: value})
    message = str(failure.value)
    assert message.startswith("s.py: ") and problem in message and "\n" not in message and len(message) < 700
    if "parameters" not in message and "multiple" not in message and "tokens" not in message:
        assert f"{section}" in message


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"bucket_config": {"144p": {1: (0.5,)}}}, "bucket_config.144p[1] must be (keep probability, batch size)"),
        ({"bucket_config": {"144p": {1: (0.5, 1.5)}}}, "bucket_config.144p[1] must be (keep probability, batch size)"),
        ({"bucket_config": {"144p": {"x": (0.5, 1)}}}, "bucket_config.144p.x must be an integer; it is 'x'"),
        ({"bucket_config": {"144p": {10**9: (0.5, 1)}}}, "bucket_config.144p[1000000000] must be at most 100000"),
        ({"bucket_config": {"144p": (0.5, 1)}}, "bucket_config.144p must be a dict"),
        ({"bucket_config": [1]}, "bucket_config must be a dict; it is [1]"),
        ({"mask_ratios": {"identity": "0.5"}}, "mask_ratios.identity must be a number; it is '0.5'"),
        ({"mask_ratios": {"identity": 1.5}}, "mask_ratios.identity must be at most 1; it is 1.5"),
        ({"mask_ratios": {1: 0.5}}, "mask_ratios[1] must be a string; it is 1"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas must be two numbers from 0 to below 1; it is (0.9, 1.0)"),
        ({"num_workers": 10**6}, "num_workers must be at most 1024; it is 1000000"),
        ({"max_steps": 3.5}, "max_steps must be an integer; it is 3.5"),
        ({"lr": True}, "lr must be a number; it is True"),
        ({"lr": -1}, "lr must be at least 0; it is -1"),
        ({"outputs": "o\udcff"}, "outputs must be UTF-8 text"),
        ({"load": 3}, "load must be a string; it is 3"),
        ({"sample_prompts": ["a", None, 3]}, "sample_prompts[2] must be a string; it is 3"),
        ({"discriminator": {"kind": 3}}, "discriminator needs a type"),
    ],
)
def test_wrong_values_of_training(values, problem):
    with pytest.raises(ConfigError) as failure:
        TrainSettings.from_config({"model": MODEL, **values}, "s.py")
    assert str(failure.value).startswith(f"s.py: {problem}") and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"num_sample": 10**8}, "num_sample must be at most 100000"),
        ({"num_frames": True}, "num_frames must be a string or an integer; it is True"),
        ({"num_frames": 10**9}, "num_frames must be at most 100000"),
        ({"num_frames": " 1000000 "}, "num_frames must be at most 100000"),
        ({"num_frames": "9" * 101}, "num_frames must be below 9223372036854775808; it is 999"),
        ({"num_frames": "x" * 101}, "num_frames must be at most 100 long; it is "),
        ({"loop": 10**9}, "loop must be at most 10000"),
        ({"image_size": (16, 8200)}, "image_size must be (height, width) in pixels, 1 to 8192 each"),
        ({"image_size": (True, 64)}, "image_size must be (height, width) in pixels, 1 to 8192 each"),
        ({"save_dir": "o\udcff"}, r"save_dir must be UTF-8 text; it is 'o\udcff'"),
        ({"save_dir": "a\0"}, "save_dir must be a string without NUL"),
        ({"save_dir": "x" * 300}, "save_dir must be a path whose parts are at most 255 bytes long"),
        ({"sample_name": "\ud800"}, "sample_name must be UTF-8 text"),
        ({"reference_path": ["a.png", "\udcff.png"]}, "reference_path[1] must be UTF-8 text"),
        ({"image": "\udcff.png"}, "image must be UTF-8 text"),
        ({"prompt": "x" * 100_001}, "prompt[0] must be at most 100000 characters"),
        ({"prompt_path": 3}, "prompt_path must be a string; it is 3"),
        ({"seed": 2**70}, "seed must be "),
        ({"seed": 1.5}, "seed must be an integer; it is 1.5"),
        ({"steps_until": 10**9}, "steps_until must be at most 10000"),
        ({"guidance_interval": (0.8, 0.1)}, "guidance_interval must be two rising numbers from 0 to 1"),
        ({"guidance_interval": (0, "1")}, "guidance_interval must be two rising numbers from 0 to 1"),
        ({"refined": {"a": 3}}, "refined.a must be a string; it is 3"),
        ({"cache_table": {"halves": "2x"}}, "cache_table.halves must be of the form"),
        ({"cache_table": {"halvs": "2"}}, "unknown setting 'cache_table.halvs'; did you mean 'halves'?"),
        ({"strength": 1.5}, "strength must be at most 1; it is 1.5"),
        ({"verbose": None}, "verbose must be an integer; it is None"),
        ({"memory": "smal"}, "memory 'smal' is not known; choose one of auto, fast, balanced, low"),
    ],
)
def test_wrong_values_of_inference(values, problem):
    with pytest.raises(ConfigError) as failure:
        settings(**values)
    assert str(failure.value).startswith(f"s.py: {problem}") and "\n" not in str(failure.value)


def test_whole_numbers_and_tuples_are_put_right():
    found = settings(
        num_frames=17.0, image_size=[64.0, 64], seed=3.0, fps=24.0,
        scheduler={"type": "rflow", "num_sampling_steps": 3.0, "cfg_scale": 7},
        vae={"type": "OpenSoraVAE_V1_2", "micro_batch_size": 4.0, "shift": [0.5, 1]},
        model={"type": "STDiT3", "patch_size": [1, 2.0, 2], "mlp_ratio": 4},
    )  # fmt: skip
    assert (found.num_frames, found.image_size, found.seed, found.fps) == (17, (64, 64), 3, 24)
    assert found.scheduler == {"type": "rflow", "num_sampling_steps": 3, "cfg_scale": 7}
    assert found.vae == {"type": "OpenSoraVAE_V1_2", "micro_batch_size": 4, "shift": (0.5, 1)}
    assert found.model == {"type": "STDiT3", "patch_size": (1, 2, 2), "mlp_ratio": 4}
    whole = (found.num_frames, found.seed, *found.image_size, found.scheduler["num_sampling_steps"])
    assert all(type(one) is int for one in (*whole, found.vae["micro_batch_size"], *found.model["patch_size"]))


def test_a_wrong_value_is_refused_without_torch(tmp_path):
    program = "import sys\nfrom opensora.config.settings import InferenceSettings as S\n"
    program += "from opensora.config import read_config\n"
    program += "try:\n    S.from_config(read_config('c.py'), 'c.py')\nexcept ValueError as error:\n    print(error)\n"
    program += "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    (tmp_path / "c.py").write_text("num_frames = 17\nmodel = dict(type='STDiT3', depth=2.5)\n")
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True)
    assert done.stdout.decode().splitlines() == ["c.py: model.depth must be an integer; it is 2.5", "[]"]


@pytest.mark.parametrize(
    ("stated", "problem"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1; it is 0"),
        ({"hidden_size": 10**12}, "hidden_size must be at most 65536; it is 1000000000000"),
        ({"model_max_length": -5}, "model_max_length must be at least 1; it is -5"),
        ({"input_sq_size": "x"}, "input_sq_size must be an integer; it is 'x'"),
        ({"mlp_ratio": "4"}, "mlp_ratio must be a number; it is '4'"),
        ({"qk_norm": "yes"}, "qk_norm must be True or False; it is 'yes'"),
        ({"patch_size": {"a": 1}}, "patch_size must be a tuple"),
        ({"depth": None}, "depth must be an integer; it is None"),
        ({"hidden_size": 30, "num_heads": 4}, "hidden_size 30 must be a multiple of num_heads 4"),
        ({"hidden_size": 65_536, "depth": 256, "num_heads": 16}, "parameters; at most 1e+13 are built"),
    ],
)
def test_wrong_config_json_of_a_model(tmp_path, stated, problem):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "STDiT3", "other": 1, **TINY_STDIT3, **stated}))
    with pytest.raises(WeightsError) as failure:
        builder.build_model({"type": "STDiT3"}, tmp_path)
    assert str(failure.value).startswith(f"{tmp_path}/config.json: ") and problem in str(failure.value)


@pytest.mark.parametrize(
    "sizes", ["x", [1, 2], [[1, 2]], [[1, 2, "3"]], [[1, 2, 0]], {"a": 1}, None, [[1, 2, 3]] * 10_001]
)
def test_wrong_trained_sizes(tmp_path, sizes):
    (tmp_path / "config.json").write_text(json.dumps({**TINY_STDIT3, "trained_sizes": sizes}))
    with pytest.raises(WeightsError, match=rf"^{tmp_path}/config\.json: trained_sizes[^\n]* must be [^\n]*$"):
        builder.trained_sizes(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("config.json", {"num_layers": 10**6}, "num_layers must be at most 256"),
        ("config.json", {"d_model": 10**9}, "d_model must be at most 65536"),
        ("config.json", {"vocab_size": 10**12}, "vocab_size must be at most 10000000"),
        ("config.json", {"d_ff": "x"}, "d_ff must be an integer; it is 'x'"),
        ("config.json", {"num_heads": 0}, "num_heads must be at least 1"),
        ("config.json", {"relative_attention_num_buckets": 3}, "relative_attention_num_buckets must be at least 4"),
        ("config.json", {"relative_attention_max_distance": 8}, "must be more than relative_attention_num_buckets / 4"),
        ("config.json", {"layer_norm_epsilon": 0}, "layer_norm_epsilon must be above 0"),
        ("config.json", {"feed_forward_proj": "gated-silu"}, "choose one of relu, gated-gelu"),
        ("config.json", {"d_model": 65_536, "d_ff": 1_000_000, "num_layers": 256}, "parameters; at most 1e+13"),
        ("tokenizer_config.json", {"extra_ids": 10**9}, "extra_ids must be at most 1000"),
        ("tokenizer_config.json", {"extra_ids": "100"}, "extra_ids must be an integer; it is '100'"),
    ],
)
def test_wrong_config_json_of_a_text_encoder(tmp_path, file, changes, problem):
    folder = make_tiny_t5(tmp_path / "t5")
    path = folder / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes, "unknown": [1]}))
    with pytest.raises(WeightsError) as failure:
        builder.build_text_encoder({"type": "t5"}, folder, None)
    assert str(failure.value).startswith(f"{path}: ") and problem in str(failure.value)


@pytest.mark.parametrize(
    ("stated", "problem"),
    [
        ({"hidden_size": 10**9}, "hidden_size must be at most 65536"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "text_config.num_hidden_layers must be at most 256"),
        ({"text_config": 3}, "text_config must be a dict; it is 3"),
        ({"text_config": {"vocab_size": "x"}}, "text_config.vocab_size must be an integer"),
    ],
)
def test_wrong_config_json_of_clip(tmp_path, stated, problem):
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(WeightsError) as failure:
        builder.build_text_encoder({"type": "clip"}, tmp_path, None)
    assert str(failure.value) == f"{tmp_path}/config.json: {problem}" or problem in str(failure.value)


@pytest.mark.parametrize(
    "section",
    [
        {"type": "VideoAutoencoderKL", "block_out_channels": (32,)},
        {"type": "VideoAutoencoderKLTemporalDecoder", "block_out_channels": (32, 64)},
        {"type": "VAE_Temporal", "temporal_downsample": (True,)},
        {"type": "VAE_Temporal", "filters": 8, "num_groups": 3},
        {"type": "STDiT3", "num_heads": 7},
        {"type": "STDiT2", "hidden_size": 64, "num_heads": 4},
        {"type": "STDiT3", "hidden_size": 64, "mlp_ratio": 0.001},
        {"type": "PixArt", "patch_size": (1, 3, 3)},
        {"type": "iddpm", "timestep_respacing": "1," * 400},
        {"type": "iddpm", "num_sampling_steps": 2000},
    ],
)
def test_what_does_not_fit_together_is_one_line(section):
    """Also where a section leaves the other half to the builder's defaults."""
    import torch

    with torch.device("meta"), pytest.raises(OpenSoraError, match=r"^[^\n]+$"):
        registry.build(section)


@pytest.mark.parametrize("changes", [{"hidden_size": 49_152, "num_heads": 64}, {"depth": 256, "mlp_ratio": 1e3}])
def test_a_model_beyond_the_memory_is_refused_before_it_is_made(monkeypatch, changes):
    """Where training gives initial values; also a small one, when little is free."""
    for free, sizes in ((2**34, changes), (2**10, {"hidden_size": 32, "num_heads": 2})):
        monkeypatch.setattr(builder, "free_on_host", lambda free=free: free)
        with pytest.raises(ConfigError, match=r"^STDiT3 of these sizes takes [\d,]+ GiB, and \d+ GiB are free; "):
            builder.build_model({"type": "STDiT3", "strict": False, "depth": 1, **sizes}, None)


@pytest.mark.parametrize(
    "value", [[1] * 10**5, {"a": {"b": "c" * 10**5}}, 10**5000, float("nan"), b"\xff" * 999], ids=range(5)
)
def test_values_are_shown_in_one_short_line(value):
    with pytest.raises(ConfigError, match=r"^[^\n]{1,200}$"):
        settings(seed=value)


def test_nests_without_end_are_refused():
    deep: dict[str, Any] = {}
    for _ in range(5_000):
        deep = {"a": deep}
    for name in ("model", "refined", "num_frames", "zzz"):
        with pytest.raises(ConfigError, match="nested too deep"):
            settings(**{name: deep})
