"""The whole inference program with stand-in networks, against what the reference's programs did with the same flags."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora import registry
from opensora.checkpoints import builder
from opensora.checkpoints.summary import Summary
from opensora.datasets.video import read_image, read_video
from opensora.errors import OpenSoraError
from opensora.models.text_encoder.cleaning import preprocess
from opensora.pipeline import batching, generation
from opensora.pipeline.pipeline import VideoPipeline
from opensora.pipeline.prompts import prepare
from opensora.schedulers.common import SamplerState
from opensora.utils.config_utils import parse_inference_args
from tests.parity.cases import ROOT

FACTS = json.loads((ROOT / "data" / "inference_flow.json").read_text())
MEDIA = ROOT / "data" / "datasets.media"
CASES = [("v1.2.0", case) for case in FACTS["cases"]] + [("v1.1.0", case) for case in FACTS["v1.1.0"]["cases"]]


def runs_here(version: str, case: dict) -> bool:
    """Whether a case that failed in the reference works here.

    1.1 had no default overlap, and did not clip references; any ratio takes the nearest of the table (quirk A1).
    """
    if version == "v1.1.0":
        return case["error"] in ("AttributeError", "RuntimeError")
    given = dict(zip(case["argv"], case["argv"][1:], strict=False))
    return re.fullmatch(r"[1-9]\d*:[1-9]\d*", given.get("--aspect-ratio", "")) is not None


def reads_json_here(version: str, case: dict) -> bool:
    """Whether the reference took a JSON tail for words: the plain program of 1.1. Here one program does all."""
    return version == "v1.1.0" and case["program"] == "inference" and any("{" in text for text in case["argv"])


def slices_here(case: dict) -> slice:
    """Which of the prompts of the command line are made: the reference ignores the slice, or renumbers what is left."""
    given = {name: int(value) for name, value in zip(case["argv"], case["argv"][1:], strict=False) if "index" in name}
    return slice(given.get("--start-index"), given.get("--end-index")) if "--prompt" in case["argv"] else slice(None)


class Networks:
    """Stand-ins that note what they are asked for; the autoencoder compresses time as the one of the version."""

    def __init__(self, chunked: bool) -> None:
        self.chunked = chunked
        self.texts: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.shapes: list[list[int]] = []
        self.lengths: list[int] = []
        self.out_channels, self.in_channels, self.output_dim, self.model_max_length = 4, 4, 8, 300
        self.patch_size, self.group = (1, 2, 2), (17, 5) if chunked else (1, 1)
        self.config = {"caption_channels": 8, "model_max_length": 300}

    def get_latent_size(self, size: Sequence[int | None]) -> list[int | None]:
        frames, *sides = size
        chunks, rest = divmod(frames, 17)
        latent = 5 * chunks + -(-rest // 4) if self.chunked else frames
        return [latent, *(side and side // 8 for side in sides)]

    def get_pixel_frames(self, latent_frames: int) -> int:
        if self.chunked and latent_frames % 5:
            raise ValueError(f"{latent_frames} latent frames are not a multiple of 5")
        return latent_frames // 5 * 17 if self.chunked else latent_frames

    def encode_text(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        self.texts += texts
        return torch.full((1, 1, 1, 8), float(self.texts.index(texts[0]))), torch.ones(1, 1)

    def encoded(self, pieces: Iterable[Tensor]) -> Tensor:
        x = torch.cat(list(pieces), dim=2)
        self.shapes.append(list(x.shape))
        return torch.zeros(1, 4, *self.get_latent_size(x.shape[2:]))

    def decoded(self, z: Tensor, num_frames: int) -> Iterator[Tensor]:
        self.lengths.append(num_frames)
        yield torch.zeros(1, 3, num_frames, z.shape[3] * 8, z.shape[4] * 8)

    def null_caption(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, x_mask: Tensor | None = None) -> Tensor:
        raise AssertionError("the stand-in sampler asks no model")

    def steps(
        self, model: Any, noise: Tensor, cond: dict, null: Any, *, edit: Tensor | None = None, **_: Any
    ) -> Iterator[SamplerState]:
        sizes = {name: value.tolist() for name, value in cond.items() if name != "y"}
        edit = torch.ones(noise.shape[:3:2]) if edit is None else edit
        shape = [1, *noise.shape[1:]]
        for y, given in zip(cond["y"], edit, strict=True):
            text = self.texts[int(y.flatten()[0])]
            self.calls.append({"prompt": text, "z": shape, "mask": given.tolist(), "sizes": sizes})
        yield SamplerState(1, 1, noise, noise)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Networks:
    version, _ = request.param
    made = Networks(chunked=version == "v1.2.0")
    summary = Summary(Path("x"), 1, 1, ("fp32",), "0" * 64)
    text_encoder = SimpleNamespace(encode=made.encode_text, output_dim=8, model_max_length=300)
    parts = {"find_weights": Path("x"), "build_text_encoder": text_encoder, "build_model": made}
    parts |= {"load_model_weights": summary, "load_text_encoder_weights": summary, "trained_sizes": []}
    for name, value in parts.items():
        monkeypatch.setattr(builder, name, lambda *_, value=value, **__: value)
    for needs_modules in ("check_inputs", "choose_memory_plan", "record_speed"):
        monkeypatch.setattr(generation, needs_modules, lambda *_, **__: None)
    monkeypatch.setattr(batching, "is_batch_invariant", lambda *_: False)
    build = registry.build

    def stand_in(section: dict) -> Any:
        real = build(section)
        return SimpleNamespace(steps=made.steps, supports_edit=True, num_steps=1, num_branches=real.num_branches)

    monkeypatch.setattr(registry, "build", stand_in)
    return made


def arguments(case: dict, tmp_path: Path) -> list[str]:
    """The recorded command line with paths of this machine."""
    (tmp_path / "prompts.txt").write_text(case.get("prompts_file", ""))
    replaced = (("<media>", str(MEDIA)), ("<prompts.txt>", str(tmp_path / "prompts.txt")))
    argv = [case["config"], *case["argv"], "--save-dir", str(tmp_path / "out"), "--device", "cpu"]
    for mark, path in replaced:
        argv = [argument.replace(mark, path) for argument in argv]
    return argv


@pytest.mark.parametrize(
    ("networks", "version", "case"),
    [((version, None), version, case) for version, case in CASES],
    indirect=["networks"],
    ids=[f"{version}-{case['name']}" for version, case in CASES],
)
def test_flow(networks: Networks, version: str, case: dict, tmp_path: Path) -> None:
    argv, out = arguments(case, tmp_path), tmp_path / "out"
    out.mkdir()
    old = case.get("files_already_in_save_dir", [])
    for name in old:
        (out / name).write_bytes(b"kept")

    def run() -> None:
        for _ in VideoPipeline(parse_inference_args(argv)).generate():
            pass

    if ("error" in case and not runs_here(version, case)) or reads_json_here(version, case):
        with pytest.raises((OpenSoraError, SystemExit)):
            run()
        assert not networks.calls and not networks.shapes  # refused before any work
        return
    run()
    if "error" in case:
        assert networks.calls and saved(out, old)
        return
    calls, files = expected(case, version, old)
    assert [call["prompt"] for call in networks.calls] == [call["prompt"] for call in calls]
    for call, wanted in zip(networks.calls, calls, strict=True):
        assert call["z"] == wanted["z"]
        assert call["mask"] == pytest.approx(wanted["mask"])
        for name, value in call["sizes"].items():
            assert value == pytest.approx(wanted["sizes"][name], rel=2**-8)  # recorded in bfloat16 (quirk R1)
    assert sorted(networks.shapes) == sorted(case["reference_encodes"])
    assert saved(out, old) == files
    assert all((out / name).read_bytes() == b"kept" for name in old)


def expected(case: dict, version: str, old: list[str]) -> tuple[list[dict], list[dict]]:
    """The recorded calls, one a sample (ours are made one by one), and files, as far as we do the same."""
    calls = []
    for call in case["sample_calls"]:
        mask = call["mask"] or ["1 " * call["z_shape"][2]] * len(call["prompts"])
        for row, prompt in enumerate(call["prompts"]):
            sizes = {name: [values[row]] for name, values in call["additional_args"].items()}
            shape = [1, *call["z_shape"][1:]]
            calls.append({"prompt": prompt, "z": shape, "mask": [*map(float, mask[row].split())], "sizes": sizes})
    files = [{**entry, "file": numbered(entry["file"], version)} for entry in case["saved"]]
    part = slices_here(case)
    if part != slice(None):
        prompts = len(files) if version == "v1.2.0" else part.stop - part.start
        names = [f"sample_{index:04d}.mp4" for index in range(part.start or 0, part.stop or prompts)]
        calls = calls[part] if version == "v1.2.0" else calls
        files = [{**entry, "file": name} for entry, name in zip(files, names, strict=False)]
    if "--prompt-as-path" in case["argv"]:  # what exists is kept, whatever wrote it, and told apart by its suffix
        made = {name.removesuffix(".mp4") for name in old if name.endswith(".mp4")}
        texts = case["argv"][case["argv"].index("--prompt") + 1 :]
        template_call, template_file = calls[0], files[0]
        words = [text for text in texts if text not in made]
        by_text = {call["prompt"].split(" aesthetic")[0]: call for call in calls}
        calls = [by_text.get(preprocess(t), {**template_call, "prompt": prepared(case, t)}) for t in words]
        files = [{**template_file, "file": f"{text.replace('/', '_')}.mp4"} for text in words]
    for entry in files:
        if entry["frames"] == 1:
            del entry["fps"]
    return calls, sorted(files, key=lambda entry: entry["file"])


def prepared(case: dict, text: str) -> str:
    """A prompt as the configuration of a case has it encoded."""
    return prepare(text, aes=6.5 if "v1-2" in case["config"] else None)


def saved(folder: Path, old: list[str]) -> list[dict[str, Any]]:
    """What a run wrote into a folder, in the form of the recording."""
    found = []
    for path in sorted(folder.glob("*")):
        entry: dict[str, Any] = {"file": path.name, "frames": 1}
        if path.name in old or path.suffix not in (".mp4", ".png"):
            continue
        if path.suffix == ".mp4":
            frames, entry["fps"] = read_video(path)
            entry |= {"frames": len(frames), "height_width": list(frames.shape[1:3])}
        else:
            entry["height_width"] = list(read_image(path).shape[:2])
        found.append(entry)
    return found


def numbered(name: str, version: str) -> str:
    """A recorded file name as we write it: 1.1 did not pad numbers, and a slash in a prompt makes no folder."""
    name = name.replace("/", "_")
    return re.sub(r"^(\w+_)(\d+)", lambda m: f"{m[1]}{int(m[2]):04d}", name) if version == "v1.1.0" else name
