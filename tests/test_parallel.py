"""Ranks: how they are laid out, what they tell one another, sharded parameters, and generation on several of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.checkpoints import builder
from opensora.config.settings import InferenceSettings
from opensora.datasets import video
from opensora.datasets.video import read_video
from opensora.distributed import fsdp
from opensora.distributed.collectives import all_gather_objects, all_reduce_mean, broadcast_object
from opensora.distributed.fsdp import local_shard, shard
from opensora.distributed.process_group import RankLayout, start
from opensora.errors import ConfigError
from opensora.pipeline import decode
from opensora.pipeline.loaded_models import LoadedModels
from opensora.pipeline.pipeline import VideoPipeline
from opensora.pipeline.recipe import frames_digest
from opensora.training.ema import EMA
from tests.full import count
from tests.ranks import ends, run
from tests.test_sequence import full, loss_of, make
from tests.tiny import make_tiny_stdit3, make_tiny_t5, make_tiny_vae

CPU = torch.device("cpu")
T5 = {"type": "t5", "shardformer": True}
MAIN = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for name, make_part in {"model": make_tiny_stdit3, "vae": make_tiny_vae, "text_encoder": make_tiny_t5}.items():
        make_part(folder / name)
    pixels = torch.randint(0, 256, (80, 72, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    video.write_image(pixels.numpy(), folder / "first.png")
    return folder


def test_a_process_alone_is_one_rank():
    layout = start(CPU)
    assert layout == RankLayout() and layout.is_main and not torch.distributed.is_initialized()
    assert (layout.data_rank, layout.data_size, layout.sequence_rank) == (0, 1, 0)
    assert (
        broadcast_object("a", layout) == "a"
        and all_gather_objects("a", layout) == ["a"]
        and all_reduce_mean(torch.ones(()), layout) == 1
    )


@pytest.mark.parametrize(("ranks", "size"), [(1, 2), (4, 3)])
def test_sequences_that_ranks_do_not_fill(monkeypatch, ranks, size):
    launched = {"WORLD_SIZE": ranks, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29400}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=f"sp_size {size} does not divide the number of ranks, {ranks}; start a mult"):
        start(CPU, size)


def test_ranks_lie_in_a_grid():
    places = [(one.data_rank, one.sequence_rank) for one in (RankLayout(rank, 6, 3) for rank in range(6))]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] and RankLayout(0, 6, 3).data_size == 2


def on_two_ranks(weights: Path) -> dict[str, Any]:
    layout = start(CPU, 2)
    found: dict[str, Any] = {
        "shared": broadcast_object(f"of {layout.rank}", layout),
        "gathered": all_gather_objects(layout.rank, layout),
        "mean": all_reduce_mean(torch.tensor([1.0, 2.0]) * layout.rank, layout),
    }
    found |= average_and_clip(layout)
    encoder = builder.build_text_encoder(T5, weights / "text_encoder", torch.float32)
    builder.load_text_encoder_weights(encoder, T5, weights / "text_encoder", CPU, layout)
    found["text"] = encoder.encode(["a red circle", "waves of the sea at dawn"])[0]
    found["held"] = sum(local_shard(p).numel() for p in encoder.model.parameters()) / sum(
        p.numel() for p in encoder.model.parameters()
    )
    return found


def average_and_clip(layout: RankLayout) -> dict[str, Any]:
    """Two steps of a model with an average of its weights."""
    model = make("STDiT3")
    shard(model, layout)
    ema, parameters = EMA(model, 0.5), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(2):
        loss_of(model, "STDiT3", step, slice(2)).backward()
        norm = fsdp.clip_grad_norm(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    return {"norm": norm, "average": {name: full(tensor) for name, tensor in ema.state_dict().items()}}


def test_two_ranks(weights):
    layout, expected = RankLayout(), average_and_clip(RankLayout())
    encoder = builder.build_text_encoder(T5, weights / "text_encoder", torch.float32)
    builder.load_text_encoder_weights(encoder, T5, weights / "text_encoder", CPU, layout)
    expected["text"] = encoder.encode(["a red circle", "waves of the sea at dawn"])[0]
    for found in run(2, on_two_ranks, weights):
        assert found["shared"] == "of 0" and found["gathered"] == [0, 1]
        assert found["mean"].tolist() == [0.5, 1.0]
        assert 0.5 <= found["held"] < 0.55
        for name in ("norm", "average", "text"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)


def generate(weights: Path, outputs: Path, **changes: Any) -> list[Tensor]:
    """The clips of a request as they are decoded, and its files in `outputs`."""
    settings = InferenceSettings(
        model={"type": "STDiT3", "from_pretrained": str(weights / "model")},
        vae={"type": "VideoAutoencoderPipeline", "from_pretrained": str(weights / "vae")},
        text_encoder={**T5, "from_pretrained": str(weights / "text_encoder")},
        scheduler={"type": "rflow", "num_sampling_steps": 2, "cfg_scale": 4.0, "use_timestep_transform": True},
        image_size=(80, 72), save_dir=str(outputs),
        verbose=0, device="cpu", **changes,
    )  # fmt: skip
    clips: list[Tensor] = []
    convert, decode.to_uint8 = decode.to_uint8, lambda clip: clips.append(clip) or convert(clip)
    try:
        made = list(VideoPipeline(settings).generate())
    finally:
        decode.to_uint8 = convert
    assert len(made) == (0 if int(os.environ.get("RANK", "0")) else len(settings.prompt))
    return clips


def generate_all(weights: Path, outputs: Path, how: str = "auto") -> list[Tensor]:
    """Clips in float32, one with a given image; chained ones, each decoding the next one's beginning, in float64."""
    red, changes = ["a red circle"], {"guidance_ranks": how}
    chained = generate(weights, outputs / "chained", num_frames=34, prompt=red, loop=2, dtype="float64", **changes)
    two, short = [*red, "waves of the sea at dawn"], {"num_frames": 17, "dtype": "fp32", **changes}
    given = generate(weights, outputs / "given", prompt=red, image=str(weights / "first.png"), **short)
    return [*generate(weights, outputs / "single", prompt=two, **short), *given, *chained]


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory) -> tuple[list[Tensor], Path]:
    """What one rank makes: 25 patches a frame, which neither 2 nor 3 ranks divide."""
    folder = tmp_path_factory.mktemp("alone")
    return generate_all(weights, folder), folder


def assert_same_clips(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize(("ranks", "how"), [(3, "auto"), (2, "auto"), (2, "together"), (4, "auto")][: count(1, 4)])
def test_ranks_generate_the_same_video(weights, alone, tmp_path, ranks, how):
    main, *others = run(ranks, generate_all, weights, tmp_path, how)
    assert not any(others), "only the main rank decodes"
    assert_same_clips(main, alone[0])
    made, expected = ({path.relative_to(folder) for path in folder.rglob("*")} for folder in (tmp_path, alone[1]))
    assert made == expected and len(made) == 11


def torchrun(program: Path | str, *argv: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*map(str, (*command, *argv))], capture_output=True, text=True, timeout=400, env=environment, cwd=MAIN
    )


CONFIG = """
num_frames = 17
image_size = (80, 72)
dtype = "fp32"
model = dict(type="STDiT3", from_pretrained="{0}/model")
vae = dict(type="VideoAutoencoderPipeline", from_pretrained="{0}/vae")
text_encoder = dict(type="t5", from_pretrained="{0}/text_encoder")
scheduler = dict(type="rflow", num_sampling_steps=2, cfg_scale=4.0, use_timestep_transform=True)
"""


PROGRAM = """
import runpy, sys
import torch
from opensora.pipeline import decode

def kept(piece, pieces=[], beside=sys.argv[0] + ".pt", convert=decode.to_uint8):  # the script has another sys.argv[0]
    pieces.append(piece)
    torch.save(pieces, beside)
    return convert(piece)

decode.to_uint8 = kept
runpy.run_path("scripts/inference.py", run_name="__main__")
"""


@pytest.mark.parametrize("ranks", [2, 3][: count(1, 2)])
def test_the_program_under_torchrun(weights, alone, tmp_path, ranks):
    """scripts/inference.py, which leaves its clip beside the program; that with a given image, of one rank."""
    program, config = tmp_path / "inference.py", tmp_path / "sample.py"
    program.write_text(PROGRAM)
    config.write_text(CONFIG.format(weights))
    argv = ["--prompt", "a red circle", "--device", "cpu", "--image", weights / "first.png"]
    ended = torchrun(program, config, *argv, "--save-dir", tmp_path / "out", ranks=ranks)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{tmp_path}/out/sample_0000.mp4\n"
    assert ended.stderr.count("model  ") == 1, "one rank alone tells what it reads"
    pieces = torch.load(program.with_suffix(".py.pt"))
    assert_same_clips(pieces, alone[0][2 * len(pieces) : 3 * len(pieces)])  # those of two clips come before it
    frames, _ = read_video(tmp_path / "out/sample_0000.mp4")
    assert frames.shape == (17, 80, 72, 3) and frames_digest(frames)


def unlucky(weights: Path, outputs: Path) -> None:
    """A request of which one rank cannot read the weights."""
    own = LoadedModels._load_weights

    def fill(self: LoadedModels, part: str, *others: Any) -> Any:
        if part == "model" and os.environ["RANK"] == "1":
            raise ConfigError("rank 1 has no luck")
        return own(self, part, *others)

    LoadedModels._load_weights = fill
    generate(weights, outputs, num_frames=17, prompt=["x"])


def test_an_error_of_one_rank_ends_all(weights, tmp_path):
    ended = ends(2, unlucky, weights, tmp_path / "out")
    assert [end.code for end in ended] == [1, 1]
    told = "".join(end.stderr for end in ended)
    assert told.count("error: rank 1 has no luck\n") == told.count("error:") == 1, told
    assert "opensora/" not in told, "no traceback"
    assert not (tmp_path / "out").exists()
