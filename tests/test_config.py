"""Reading configurations safely, and the settings made from them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
import types
from pathlib import Path

import pytest

from opensora.cli.flags import boolean
from opensora.config import find_config, load_config, model_zoo, read_config
from opensora.config.settings import InferenceSettings, SearchSettings, TrainSettings
from opensora.errors import ConfigError
from opensora.utils.config_utils import parse_inference_args, parse_train_args

SAMPLE = "configs/opensora-v1-2/inference/sample.py"
MODEL = {"type": "STDiT3-XL/2"}


def read(folder: Path, text: str, name: str = "config.py") -> dict:
    (folder / name).write_text(text)
    return read_config(folder / name)


def test_reads_plain_values(tmp_path):
    text = '"""About."""\n_side = 16\nsize = (2 * _side, -_side // 2)\nmodel = dict(type="A" + "B", size=size)\n'
    text += 'table = {"a": {1: (0.5, None)}}\nscale = 2 / 3\nlr = 10**-4\nnames = ["a"] * 2\n'
    assert read(tmp_path, text) == {
        "size": (32, -8),
        "model": {"type": "AB", "size": (32, -8)},
        "table": {"a": {1: (0.5, None)}},
        "scale": 2 / 3,
        "lr": 1e-4,
        "names": ["a", "a"],
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import os", "an import"),
        ("from os import path", "an import"),
        ("x = open('f')", "a call"),
        ("x = dict([('a', 1)])", "a call"),
        ("x = __import__('os')", "a call"),
        ("print(1)", "a call"),
        ("x = [i for i in (1, 2)]", "a comprehension"),
        ("x = ().__class__", "attribute access"),
        ("x = (1, 2)[0]", "indexing"),
        ("x = f'{1}'", "an f-string"),
        ("x = lambda: 1", "a function"),
        ("x = {**{}}", "in a dict"),
        ("x = 1 << 3", "this operator"),
        ("def f(): pass", "a function"),
        ("for i in (1,): pass", "`For`"),
        ("x, y = 1, 2", "plain names"),
        ("x = y", "not assigned before"),
        ("x = 9**9**9", "too large"),
        ("x = 10.0**1000", "cannot be computed"),
        ("x = (-1)**0.5", "needs numbers"),
        ("x = 1 / 0", "cannot be computed"),
        ("x = 'a' * 10**9", "more than"),
        ("x = '%999999999d' % 1", "needs numbers"),
        ("x = 'a' + 1", "needs numbers"),
        ("x = {[]: 1}", "dict key"),
        ("x = " + "(" * 150 + "1" + ")" * 150 + "\ny = (", "not valid Python"),
        ("x = " + "-" * 5000 + "1", "cannot be|not valid"),
        ("a = [1]\n" + "a = [a]\n" * 60, "levels deep"),
        ("a = [1] * 10\n" + "a = [a, a, a, a, a, a, a, a]\n" * 20, "more than"),
        ("a = 2\n" + "a = a * a\n" * 100, "too large"),
        ("x = 0x" + "f" * 5000, "too large"),
        ("#" * 1_000_001, "larger than"),
    ],
    ids=lambda text: text[:30],
)
def test_refuses_programs_and_bombs(tmp_path, text, problem):
    with pytest.raises(ConfigError, match=problem) as failure:
        read(tmp_path, text)
    assert "config.py" in str(failure.value)


def test_error_says_line_and_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.py:2: an import is not allowed .*--trust-config"):
        read(tmp_path, "x = 1\nimport os\n")


def test_bases_are_merged(tmp_path):
    (tmp_path / "sub").mkdir()
    read(tmp_path, "model = dict(type='A', depth=2)\nvae = dict(type='V', a=1)\nseed = 1\n", "base.py")
    read(tmp_path, "extra = 5\n", "other.py")
    text = "_base_ = ['../base.py', '../other.py']\nmodel = dict(depth=4)\nvae = dict(_delete_=True, type='W')\n"
    assert read(tmp_path, text, "sub/child.py") == {
        "model": {"type": "A", "depth": 4},
        "vae": {"type": "W"},
        "seed": 1,
        "extra": 5,
    }


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ("'config.py'", "back to itself"),
        ("3", "_base_"),
        ("'gone.py'", r"gone\.py: cannot be read \(No such file"),
        ("'/dev/zero'", "/dev/zero: is not a regular file"),
    ],
)
def test_wrong_bases(tmp_path, base, problem):
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path, f"_base_ = {base}\n")


def test_names_of_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = find_config(SAMPLE)
    assert find_config("opensora-v1-2/inference/sample") == expected
    assert find_config(expected) == expected
    with pytest.raises(ConfigError, match=r"did you mean 'opensora-v1-2/inference/sample\.py'"):
        find_config("opensora-v1-2/inference/samples.py")


def test_unknown_setting_is_an_error():
    with pytest.raises(ConfigError, match=r"^sample\.py: unknown setting 'num_frame'; did you mean 'num_frames'\?$"):
        InferenceSettings.from_config({"num_frame": 1}, "sample.py")
    with pytest.raises(ConfigError, match=r"sample\.py: setting 'model' is missing"):
        InferenceSettings.from_config({"num_frames": 1}, "sample.py")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; it is 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer; it is 1.5"),
        ({"num_frames": "-1"}, "num_frames must be at least 1"),
        ({"fps": 0}, "fps must be at least"),
        ({"fps": float("nan")}, "fps must be a finite number; it is nan"),
        ({"dtype": "fp8"}, r"dtype 'fp8' is not known; did you mean 'fp32'\? choose one of bf16, bfloat16"),
        ({"image_size": 256}, r"image_size must be \(height, width\)"),
        ({"image_size": (0, 256)}, r"image_size must be \(height, width\)"),
        ({"scheduler": {"type": "rflow", "num_sampling_steps": 0}}, "num_sampling_steps must be at least 1"),
        ({"scheduler": {}}, "scheduler needs a type"),
        ({"watermark": "False"}, "watermark must be True or False, or the text"),
        ({"prompt": 1}, "prompt must be a list of strings"),
        ({"prompt": ["a", 1]}, r"prompt\[1\] must be a string; it is 1"),
    ],
)
def test_inference_settings_are_checked(setting, message):
    with pytest.raises(ConfigError, match=f"^s.py: .*{message}"):
        InferenceSettings.from_config({"model": MODEL, "num_frames": 1, **setting}, "s.py")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"plugin": "ddp"}, "choose one of zero2, zero2-seq"),
        ({"lr_schedule": "linear"}, "choose one of constant, cosine"),
        ({"wandb": "False"}, "wandb must be True or False; it is 'False'"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas"),
        ({"ema_decay": 1.5}, "ema_decay must be at most 1; it is 1.5"),
        ({"data_path": "a.csv", "root": "/data"}, "'root' is no longer supported"),
    ],
)
def test_train_settings_are_checked(setting, message):
    with pytest.raises(ConfigError, match=f"^s.py: .*{message}"):
        TrainSettings.from_config({"model": MODEL, **setting}, "s.py")


def test_legacy_spellings():
    old = {
        "model": {"type": "STDiT-XL/2", "enable_flashattn": True},
        "scheduler": {"type": "dmp-solver", "num_sampling_steps": 20},
        "num_frames": "16",
        "dtype": "bfloat16",
        "reference_path": ["a.png", None],
    }
    settings = InferenceSettings.from_config(old, "old.py")
    assert settings.model == {"type": "STDiT-XL/2", "enable_flash_attn": True}
    assert settings.scheduler["type"] == "dpm-solver"
    assert (settings.num_frames, settings.dtype, settings.reference_path) == (16, "bf16", ["a.png", ""])


def test_data_settings_of_1_0_move_into_dataset():
    old = {"model": MODEL, "num_frames": 64, "frame_interval": 2, "image_size": (512, 512), "root": None}
    old |= {"data_path": "a.csv", "use_image_transform": False, "mask_ratios": {"mask_no": 0.9, "mask_image_head": 0.1}}
    settings = TrainSettings.from_config(old, "old.py")
    data = {"type": "VideoTextDataset", "data_path": "a.csv", "num_frames": 64, "frame_interval": 2}
    assert settings.dataset == data | {"image_size": (512, 512)}
    assert settings.mask_ratios == {"identity": 0.9, "image_head": 0.1}


def test_inference_command_line():
    argv = [
        SAMPLE,
        "--prompt",
        "a",
        "b",
        "--mask-strategy",
        "-1,0",
        "0",
        "--vae_path",
        "v.pt",
        "--cfg",
        "4",
        "--offline",
    ]
    argv += ["--cfg-options", "model.depth=3", "align=None", "camera_motion=pan left", "--text-encoder-path", "t5"]
    settings = parse_inference_args(argv)
    assert settings.prompt == ["a", "b"] and settings.mask_strategy == ["-1,0", "0"]
    assert settings.model["depth"] == 3 and settings.align is None and settings.camera_motion == "pan left"
    assert (settings.vae["from_pretrained"], settings.text_encoder["from_pretrained"]) == ("v.pt", "t5")
    assert settings.scheduler["cfg_scale"] == 4.0 and settings.offline and not settings.preview
    assert settings.output_fps == 24


def test_train_command_line():
    train = "configs/opensora-v1-2/train/stage1.py"
    assert parse_train_args([train, "--wandb", "True", "--device", "cpu"]).device == "cpu"
    assert parse_train_args([train, "--wandb"]).wandb and not parse_train_args([train, "--wandb", "False"]).wandb
    assert parse_train_args([train, "--data-path", "d.csv"]).dataset["data_path"] == "d.csv"
    assert parse_train_args([train, "--cfg-options", "max_steps=3"]).max_steps == 3
    with pytest.raises(ConfigError, match="unknown setting 'max_step'"):
        parse_train_args([train, "--cfg-options", "max_step=3"])


def test_switches_in_the_file_stay(tmp_path):
    read(tmp_path, "prompt_as_path = True\nnum_frames = 1\nmodel = dict(type='STDiT3')\n")
    assert parse_inference_args([str(tmp_path / "config.py")]).prompt_as_path


@pytest.mark.parametrize(
    ("text", "value"), [("TRUE", True), ("y", True), ("1", True), ("No", False), ("f", False), ("0", False)]
)
def test_boolean(text, value):
    assert boolean(text) is value


@pytest.mark.parametrize("text", ["on", "", "2", " true"])
def test_not_boolean(text):
    with pytest.raises(argparse.ArgumentTypeError):
        boolean(text)


def test_data_path_without_dataset():
    with pytest.raises(ConfigError, match=r"--data-path sets dataset\.data_path, but the configuration has no dataset"):
        parse_inference_args([SAMPLE, "--data-path", "d.csv"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--image-size", "256", "256", "--resolution", "480p"], "image_size"),
        (["--fps", "12"], "--save-fps"),
        (["--image-size", "256", "256"], ""),
        (["--fps", "12", "--save-fps", "12"], ""),
    ],
)
def test_says_which_setting_wins(caplog, argv, message):
    with caplog.at_level(logging.WARNING, logger="opensora"):
        parse_inference_args([SAMPLE, *argv])
    assert message in caplog.text and bool(message) == bool(caplog.text)


def test_trusted_configuration_needs_mmengine(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("size = len('abc')\n")
    try:
        import mmengine  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"pip install 'opensora\[mmengine\]'"):
            read_config(path, trust=True)
    else:
        assert read_config(path, trust=True) == {"size": 3}


LAUGHS = {f"b{n}.py": f"_base_ = ['b{n + 1}.py'] * 10\n" for n in range(9)} | {"b9.py": "seed = 1\n"}
WIDE = {
    "b0.py": "_base_ = [" + "'one.py', " * 99 + "]\n",
    "one.py": "_base_ = ['two.py'] * 99\n",
    "two.py": "seed = 1\n",
}
CHAIN = {f"b{n}.py": f"_base_ = 'b{n + 1}.py'\n" for n in range(40)} | {"b40.py": "seed = 1\n"}
HEAVY = {"b0.py": "_base_ = ['big.py'] * 20\n", "big.py": "#" * 60_000 + "\n"}
VALUES = {"b0.py": "_base_ = ['big.py'] * 4\n", "big.py": "x = 'a' * 300_000\n"}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (LAUGHS, "based on more than 100 files"),
        (WIDE, "based on more than 100 files"),
        (CHAIN, "_base_ leads through more than 20 files"),
        (HEAVY, "larger than"),
        (VALUES, "more than 1,000,000 values"),
        ({"b0.json": '{"_base_": ["b0.json"]}'}, "back to itself"),
    ],
    ids=["laughs", "wide", "chain", "heavy", "values", "json"],
)
def test_one_budget_for_a_file_and_its_bases(tmp_path, files, problem):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=problem):
        read_config(tmp_path / next(iter(files)))
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        (r"'a\0b.py'", "_base_ must be a string without NUL"),
        (r"'a\ud800b.py'", "_base_ must be UTF-8 text"),
        (r"['ok.py', '\udcff.py']", r"_base_\[1\] must be UTF-8 text"),
        ("'a' * 5000", "_base_ must be at most 4096 characters"),
        ("'a' * 300", "parts are at most 255 bytes"),
        ("['b.py', 3]", r"_base_\[1\] must be a string; it is 3"),
        ("{'a': 1}", "_base_ must be"),
        ("None", "_base_ must be"),
        ("'pipe'", "is not a regular file"),
        ("'.'", "is not a regular file|cannot be read"),
    ],
)
def test_bases_that_name_no_file(tmp_path, base, problem):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=rf"^[^\n]*{problem}[^\n]*$"):
        read(tmp_path, f"_base_ = {base}\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = " + "(" * 250 + "1" + ")" * 250, "too many nested|too deep"),
        ("x = " + "[" * 150 + "]" * 150, "levels deep"),
        ("x = " + "-" * 90_000 + "1", "nested too deep"),
        ("x = 1" + " + 1" * 20_000, "nested too deep"),
        ("x = 1\0", "null bytes"),
        ("x = (y := 3)", "config.py:1: `:=` is not allowed"),
        ("prompt = ['a %s' % 'b']", "config.py:1: arithmetic needs numbers, not str; .*--trust-config"),
        ("x = 1 if True else 2", "a condition"),
        ("x = {1, 2}", "a set"),
        ("x = b'a'", "a value other than a string"),
        ("x = 1\nx += 1", "config.py:2: an assignment with an operator"),
        ("x = [*[1]]", r"`\*` is not allowed"),
        ("x = " + "9" * 5000, "not valid Python: .*4300"),
    ],
    ids=lambda text: text[:30],
)
def test_programs_past_the_parser(tmp_path, text, problem):
    with pytest.raises(ConfigError, match=rf"^[^\n]*({problem})[^\n]*$") as failure:
        read(tmp_path, text)
    assert "config.py" in str(failure.value)


def test_texts_that_are_not_utf8_are_no_configuration(tmp_path):
    (tmp_path / "c.py").write_bytes(b"x = '\xff\xfe'\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_config(tmp_path / "c.py")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"_base_": ["base.py"], "num_frames": 17, "model": {"depth": 4}}'),
        ("a.yaml", "_base_: base.py\nnum_frames: 17\nmodel:\n  depth: 4\n"),
        ("a.YML", "_base_: [base.py]\nnum_frames: 17\nmodel: {depth: 4}\n"),
    ],
)
def test_json_and_yaml(tmp_path, name, text):
    read(tmp_path, "model = dict(type='STDiT3', depth=2)\nseed = 3\n", "base.py")
    assert read(tmp_path, text, name) == {"model": {"type": "STDiT3", "depth": 4}, "num_frames": 17, "seed": 3}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", "[1]", "must map names to values"),
        ("a.json", "{num_frames: 17}", "cannot be read as JSON"),
        ("a.json", '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 50 levels"),
        ("a.json", '{"x": ' + "1" * 5_000 + "}", "5000 digits"),
        ("a.yaml", "- 1\n", "must map names to values"),
        ("a.yaml", "1: 2\n", "must map names to values"),
        ("a.yaml", "a: [\n", "cannot be read as YAML"),
        ("a.yaml", "a: !!python/object/apply:os.system [ls]\n", "cannot be read as YAML"),
        ("a.yaml", "a: &a [x]\nb: [*a, *a]\n", "aliases are not read"),
        ("a.yaml", "a: 2001-01-01\n", "a value of type date"),
        ("a.yaml", "a: " + "[" * 20_000, "nested too deep|cannot be read as YAML"),
        ("a.yml", "#" * 100_001, "larger than"),
    ],
    ids=lambda text: text[:30],
)
def test_wrong_json_and_yaml(tmp_path, name, text, problem):
    with pytest.raises(ConfigError, match=rf"^[^\n]*a\.[a-z]+: [^\n]*({problem})[^\n]*$"):
        read(tmp_path, text, name)


@pytest.mark.parametrize("name", ["run.py", "run.json", "run.yaml"])
def test_placeholders_of_mmengine(tmp_path, name):
    lines = {
        "a": "{{ fileDirname }}/out", "b": "{{fileBasename}}", "c": "x_{{ fileBasenameNoExtension }}_y",
        "d": "{{  fileExtname  }}", "e": "{{ other }} and {x}", "f": "{{ fileBasename }}{{ fileExtname }}",
    }  # fmt: skip
    text = json.dumps(lines)
    if name.endswith(".py"):
        text = "".join(f"{key} = {value!r}\n" for key, value in lines.items())
    suffix = Path(name).suffix
    assert read(tmp_path, text, name) == {
        "a": f"{tmp_path.as_posix()}/out", "b": name, "c": "x_run_y", "d": suffix, "e": "{{ other }} and {x}",
        "f": f"{name}{suffix}",
    }  # fmt: skip


def test_placeholders_take_part_in_bases(tmp_path):
    """Each file has its own, and one may stand in _base_."""
    read(tmp_path, "who = '{{ fileBasename }}'\n", "base.py")
    read(tmp_path, "_base_ = '{{ fileDirname }}/base.py'\nme = '{{ fileBasename }}'\n")
    assert read_config(tmp_path / "config.py") == {"who": "base.py", "me": "config.py"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.py", "save_dir = '{{$HOME:out}}'"),
        ("config.py", "save_dir = 'runs/{{ $USER : me }}/out'"),
        ("config.py", "num_frames = {{'$FRAMES:17'}}"),
        ("config.py", "num_frames = {{$FRAMES:17}}"),
        ("config.json", '{"save_dir": "{{$HOME:out}}"}'),
        ("config.yaml", "save_dir: '{{$HOME:out}}'"),
        ("config.py", "x = '{{ _base_.model }}'"),
    ],
)
def test_the_environment_is_not_read(tmp_path, monkeypatch, name, text):
    monkeypatch.setenv("HOME", "SECRET")
    with pytest.raises(ConfigError, match=r"^[^\n]*config\.[^\n]*--trust-config[^\n]*$") as failure:
        read(tmp_path, text, name)
    assert "SECRET" not in str(failure.value)


def test_misspelt_placeholder(tmp_path):
    with pytest.raises(ConfigError, match=r"'\{\{ fileDirName \}\}' is not known; did you mean 'fileDirname'\?"):
        read(tmp_path, "x = '{{ fileDirName }}'")


@pytest.mark.parametrize(
    "failure", [ValueError("no\nsuch"), SystemExit(3), KeyError("a"), OSError(), RuntimeError("x")]
)
def test_trusted_configuration_that_fails(tmp_path, monkeypatch, failure):
    def fromfile(path: str) -> None:
        raise failure

    module = types.ModuleType("mmengine.config")
    module.Config = types.SimpleNamespace(fromfile=fromfile)
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.config", module)
    with pytest.raises(ConfigError, match=r"^c\.py: failed when it was run as a program \([^\n]*\)$"):
        read_config("c.py", trust=True)


@pytest.mark.parametrize("entry", model_zoo.MODELS, ids=lambda entry: entry.name)
def test_every_name_that_models_prints_is_a_configuration(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, path = load_config(entry.name)
    assert path.as_posix().endswith(entry.config)
    assert entry.name in (config["model"]["type"], "embedded")
    published = read_config(path)["model"]
    same = published["type"] == entry.name or entry.name == "embedded"
    assert config["model"] == (published if same else {"type": entry.name})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("opensora-v1-2", "opensora-v1-2/inference/sample.py"),
        ("opensora-v1-1", "opensora-v1-1/inference/sample.py"),
        ("opensora-v1.2", "opensora-v1-2/inference/sample.py"),
        ("configs/opensora-v1-2/", "opensora-v1-2/inference/sample.py"),
        ("dit", "dit/inference/16x256x256.py"),
        ("pixart", "pixart/inference/16x256x256.py"),
        ("embeded", "embedded"),
        ("stdit3-xl/2", "STDiT3-XL/2"),
        ("STDiT3-XL", "STDiT3-XL/2"),
        ("opensora-v1-2/inference/smaple", "opensora-v1-2/inference/sample"),
    ],
)
def test_near_names_of_configurations(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"did you mean '{re.escape(near)}'\?$"):
        find_config(name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a\0b", "without NUL"),
        ("a\udcff.py", "UTF-8 text"),
        ("a" * 300, "255 bytes"),
        ("a/" * 3000, "at most 4096"),
        ("/dev/zero", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("folder", "is a folder"),
    ],
)
def test_names_that_are_no_configuration(name, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    with pytest.raises(ConfigError, match=rf"^[^\n]*{problem}[^\n]*$"):
        find_config(name)


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        (InferenceSettings, {"cal_stats": True, "log_time": True}, "cal_stats, log_time"),
        (InferenceSettings, {"num_workers": 8}, "num_workers"),
        (InferenceSettings, {"dataset": {"type": "ShapeClips"}}, "dataset"),
        (TrainSettings, {"num_bucket_build_workers": 16}, "num_bucket_build_workers"),
        (TrainSettings, {"save_dir": "x", "discriminator_factor": 0.5}, "save_dir, discriminator_factor"),
        (InferenceSettings, {"cal_stats": False, "log_stats_every": 100, "num_workers": 4, "outputs": None}, ""),
        (TrainSettings, {"num_bucket_build_workers": 1, "start_index": 0, "num_workers": 8}, ""),
        (SearchSettings, {"base_step_time": 3.0}, ""),
    ],
)
def test_what_has_no_effect_is_said(caplog, kind, given, named):
    """In one line, unless it asks for nothing."""
    with caplog.at_level(logging.WARNING, logger="opensora"):
        kind.from_config({"model": MODEL, **({"num_frames": 1} if kind is InferenceSettings else {}), **given}, "c.py")
    assert caplog.messages == ([f"c.py: no effect here: {named}"] if named else [])


@pytest.mark.parametrize("value", [True, 1, "yes"])
def test_images_are_asked_for_by_their_number_of_frames(value):
    """`use_image_transform` of 1.0 said that rows are images, which num_frames = 1 says here."""
    old = {"model": MODEL, "data_path": "a.csv", "use_image_transform": value}
    for frames in ({}, {"num_frames": 16}):
        with pytest.raises(ConfigError, match=r"^c\.py: use_image_transform reads images; set num_frames = 1"):
            TrainSettings.from_config({**old, **frames}, "c.py")
    assert TrainSettings.from_config({**old, "num_frames": 1}, "c.py").dataset["num_frames"] == 1
