"""benchmark_open_sora.py and demo_open_sora.py: the flags of the accelerator guide, and reports of every model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmark_open_sora
import demo_open_sora
from opensora.cli import main
from opensora.cli.accelerator_guide import PUBLISHED, guide_parser, guide_settings
from opensora.config import find_config, read_config
from opensora.datasets.video import read_video
from opensora.errors import ConfigError, MediaError, WeightsError
from tests.full import count, some
from tests.tiny import make_tiny_stdit3, make_tiny_t5, make_tiny_vae
from tests.zoo import MODELS, flags, make_parts

SMALL = ["--image-size", "16", "32", "--num-frames", "5", "--num-sampling-steps", "2", "--verbose", "0"]
PROMPTS = {"t5": "a red car", "clip": "a red car", "classes": "7"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_parts(tmp_path_factory.mktemp("parts"))


def report_of(folder: Path, *argv: str) -> dict:
    file = folder / "benchmark" / "report.json"
    counts = ["--warmup-count", "1", "--eval-count", "2", "--benchmark-save-path", str(file)]
    assert benchmark_open_sora.main([*SMALL, *counts, *argv]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def check(report: dict) -> None:
    assert report["eval_count"] == 2 and report["warmup_count"] == 1
    assert report["peak_memory_bytes"] > 2**20 and report["parameters"] > 1000
    for stage in ("text", "denoise", "decode", "total"):
        assert len(report["seconds"][stage]["all"]) == 2
        assert report["seconds"][stage]["least"] <= report["seconds"][stage]["median"]
    seconds = {stage: found["median"] for stage, found in report["seconds"].items()}
    assert seconds["denoise"] > 0 and seconds["decode"] > 0
    assert seconds["total"] >= 0.9 * (seconds["denoise"] + seconds["decode"])
    assert report["seconds"]["denoise"]["flops"] > 1e5 and report["seconds"]["decode"]["flops"] > 1e5


def test_reports_on_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = report_of(tmp_path, "--prompt", "a red circle", "--sample-name", "small")
    check(report)
    assert report["model"] == "STDiT3" and report["device"] == "cpu" and report["sample_name"] == "small"
    assert (report["num_frames"], report["height"], report["width"]) == (5, 16, 32)
    shown = capsys.readouterr().out
    assert "GFLOP" in shown and str(tmp_path / "benchmark" / "report.json") in shown


def test_work_counts_steps(tmp_path: Path) -> None:
    two = report_of(tmp_path)["seconds"]["denoise"]["flops"]
    four = report_of(tmp_path, "--num-sampling-steps", "4")["seconds"]["denoise"]["flops"]
    assert four == pytest.approx(2 * two)


@pytest.mark.parametrize("model", list(MODELS)[:: count(3, 1)])
@some(2)
def test_reports_on_every_model(model: str, parts: dict[str, Path], tmp_path: Path) -> None:
    config, make = MODELS[model]
    settings = read_config(find_config(config))
    text = settings["text_encoder"]["type"]
    frames = ["--num-frames", "1" if "1x" in config else "16"]
    weights = flags(make(tmp_path), parts, settings["vae"]["type"], text)
    report = report_of(tmp_path, "--config", config, "--prompt", PROMPTS[text], *frames, *weights)
    check(report)
    assert report["model"] == settings["model"]["type"]


def test_the_command_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [make_tiny_stdit3(tmp_path / "dit"), make_tiny_t5(tmp_path / "t5"), make_tiny_vae(tmp_path / "vae3d")]
    (tmp_path / "vae2d").mkdir()
    weights = [("dit", folders[0]), ("t5", folders[1]), ("vae3d", folders[2]), ("vae2d", tmp_path / "vae2d")]
    guide = ["--device", "cpu", *(word for part, path in weights for word in (f"--ckpt-path-{part}", str(path)))]
    guide += ["--sample-name", "2s-144p", "--aspect-ratio", "9:16", "--prompt", "a beautiful waterfall."]
    small = ["--resolution", "144p", "--num-frames", "2s", "--num-sampling-steps", "1", "--verbose", "0"]
    small += ["--cfg-options", "model.hidden_size=32", "model.depth=2", "model.num_heads=2", "image_size=(16, 24)"]
    assert demo_open_sora.main([*guide, *small]) == 0
    [made] = (tmp_path / "samples").rglob("2s-144p_0000.mp4")
    assert read_video(made)[0].shape == (51, 16, 24, 3)
    count = ["--warmup-count", "0", "--eval-count", "1", "--benchmark-save-path", "benchmark/report.json"]
    assert benchmark_open_sora.main([*guide, *count, *small]) == 0
    report = json.loads((tmp_path / "benchmark" / "report.json").read_text())
    assert report["num_frames"] == 51 and report["model"] == "STDiT3-XL/2"


def settings_of(*argv: str):
    return guide_settings(guide_parser("test").parse_args(list(argv)))


def test_weights_lead_to_the_published_configuration(tmp_path: Path) -> None:
    asked = settings_of("--ckpt-path-dit", "here", "--resolution", "144p", "--num-frames", "2s")
    published = read_config(find_config(PUBLISHED))
    assert asked.model == {**published["model"], "from_pretrained": "here"}
    assert asked.vae == published["vae"] and asked.text_encoder == published["text_encoder"]
    assert (asked.resolution, asked.num_frames, asked.image_size) == ("144p", "2s", None)
    assert settings_of().model["from_pretrained"] == "embedded:stdit3"


def test_half_of_an_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--ckpt-path-vae3d"):
        settings_of("--ckpt-path-vae2d", str(tmp_path))
    with pytest.raises(WeightsError, match="vae2d: no such file or folder"):
        settings_of("--ckpt-path-vae2d", str(tmp_path / "nothing.pt"), "--ckpt-path-vae3d", str(tmp_path))


@pytest.mark.parametrize(("flag", "value"), [("--eval-count", "0"), ("--warmup-count", "-1")])
def test_counts_that_make_no_sense_are_refused(flag: str, value: str, tmp_path: Path) -> None:
    report = ["--benchmark-save-path", str(tmp_path / "report.json")]
    with pytest.raises(ConfigError, match=flag.strip("-").replace("-", "_")):
        benchmark_open_sora.main([*SMALL, *report, flag, value])


def test_a_folder_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="is a folder"):
        benchmark_open_sora.main(
            [*SMALL, "--eval-count", "1", "--warmup-count", "0", "--benchmark-save-path", str(tmp_path)]
        )


@pytest.mark.parametrize(
    ("flags", "compiled", "recorded"),
    [
        (("--compile", "--graphs"), 1, 1),
        (("--compile", "--memory", "low"), 0, 0),
        ((), 0, 0),
        (("--compile",), 1, 0),
        (("--graphs",), 0, 1),
    ][: count(2, 5)],
)
def test_it_compiles_and_records_as_generation_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], compiled: int, recorded: int
) -> None:
    """The two are told apart by what is done with the model, not by what the report says."""
    done: list[str] = []
    monkeypatch.setattr("opensora.pipeline.loaded_models.compile_blocks", lambda model: done.append("compiled"))
    monkeypatch.setattr("opensora.pipeline.loaded_models.check_graphs", lambda device: None)
    monkeypatch.setattr("opensora.pipeline.loaded_models.CapturedModel", lambda model: done.append("recorded") or model)
    report = report_of(tmp_path, *flags)
    assert (done.count("compiled"), done.count("recorded")) == (compiled, recorded)
    assert (report["compile"], report["graphs"]) == ("--compile" in flags, "--graphs" in flags)
    check(report)


@pytest.mark.parametrize("flags", [("--compile",), ("--graphs",), ("--compile", "--graphs")])
def test_the_verb_is_the_same_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr("opensora.pipeline.benchmark.run_benchmark", lambda *args: seen.append(args) or {})
    monkeypatch.setattr("opensora.pipeline.benchmark.table_of", str)
    counts = ["--warmup-count", "1", "--eval-count", "2", "--benchmark-save-path", str(tmp_path / "report.json")]
    assert main(["benchmark", "a red circle", *SMALL, *counts, *flags]) == 0
    assert benchmark_open_sora.main(["--prompt", "a red circle", *SMALL, *counts, *flags]) == 0
    assert seen[0][:3] == seen[1][:3] and seen[0][1:3] == (1, 2) and seen[0][0].compile == ("--compile" in flags)
