"""The commands of the five published documents, as they are written there, on tiny stand-ins.

What the documents leave to the reader (`CKPT_PATH`, `$path_to_dit_dir`) is filled in; settings that make it quick are
appended; programs run within this process. `OPENSORA_AS_WRITTEN=1` starts torchrun with as many processes as a document
says. `NOT_RUN` has the others, each with its reason.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from opensora import registry
from opensora.datasets.synthetic.render import make_clip
from opensora.datasets.video import write_video
from tests import fake_wandb, zoo
from tests import test_documents as documents
from tests.checkpoints import use_cache
from tests.full import some

ROOT = Path(__file__).parents[1]
V1_2, V1_1 = "configs/opensora-v1-2/inference/sample.py", "configs/opensora-v1-1/inference/sample.py"
ONE, TWO, EIGHT = (
    "torchrun --standalone --nproc_per_node 1", "torchrun --standalone --nproc_per_node 2",
    "torchrun --nnodes=1 --nproc_per_node=8",
)  # fmt: skip
STDIT, TRAINED = "configs/opensora/inference/16x256x256.py", "outputs/001-STDiT-XL-2/epoch12-global_step2000"
LONG = f"python scripts/inference-long.py {V1_1} --ckpt-path CKPT_PATH --num-frames 32"
GCU = (
    "--device gcu --ckpt-path-dit $path_to_dit_dir --ckpt-path-t5 $path_to_t5_dir --ckpt-path-vae2d $path_to_vae2d_dir "
    "--ckpt-path-vae3d $path_to_vae3d_dir --num-frames 2s --resolution 144p --sample-name 2s-gcu-144p "
    '--aspect-ratio 9:16 --prompt "a beautiful waterfall."'
)
SEARCH = f"{ONE} scripts/misc/search_bs.py configs/opensora-v1-2/misc/bs.py --data-path YOUR_SEARCH_CSV"
# Document, and a command of it.
COMMANDS = (
    ("000", f"python scripts/inference.py {V1_2} --resolution 480p --aspect-ratio 9:16"),
    ("000", f"python scripts/inference.py {V1_2} --image-size 480 853"),
    ("000", f"python scripts/inference.py {V1_1} --ckpt-path CKPT_PATH --prompt-path assets/texts/t2i_samples.txt "
            "--num-frames 1 --image-size 1024 1024"),
    ("000", f'python scripts/inference.py {V1_1} --ckpt-path CKPT_PATH --prompt "A beautiful sunset over the city" '
            "--num-frames 1 --image-size 1024 1024"),
    ("000", f'python scripts/inference.py {V1_1} --ckpt-path CKPT_PATH --prompt "A beautiful sunset over the city" '
            "--num-frames 16 --image-size 480 854"),
    ("000", LONG + " --image-size 240 426 --sample-name image-cond --prompt 'A breathtaking sunrise scene."
            '{"reference_path": "assets/images/condition/wave.png","mask_strategy": "0"}\''),
    ("000", LONG + " --image-size 240 426 --sample-name connect --prompt 'A breathtaking sunrise scene."
            '{"reference_path": "assets/images/condition/sunset1.png;assets/images/condition/sunset2.png",'
            '"mask_strategy": "0;0,1,0,-1,1"}\''),
    ("000", "python scripts/inference.py configs/dit/inference/1x256x256-class.py --ckpt-path DiT-XL-2-256x256.pt"),
    ("000", "python scripts/inference.py configs/latte/inference/16x256x256-class.py "
            "--ckpt-path Latte-XL-2-256x256-ucf101.pt"),
    ("000", f"{ONE} scripts/inference.py configs/pixart/inference/1x256x256.py --ckpt-path PixArt-XL-2-256x256.pth"),
    ("000", f"{ONE} scripts/inference.py configs/pixart/inference/1x512x512.py --ckpt-path PixArt-XL-2-512x512.pth"),
    ("000", f"{ONE} scripts/inference.py configs/pixart/inference/1x1024MS.py --ckpt-path PixArt-XL-2-1024MS.pth"),
    ("000", f"{ONE} scripts/inference.py {STDIT} --ckpt-path {TRAINED}/ema.pt"),
    ("000", f"{ONE} scripts/inference.py {STDIT} --ckpt-path {TRAINED}"),
    ("000", f"{TWO} scripts/inference.py {STDIT} --ckpt-path {TRAINED}"),
    ("000", f"{EIGHT} scripts/train.py configs/opensora/train/64x512x512.py --data-path YOUR_CSV_PATH "
            "--load YOUR_PRETRAINED_CKPT"),
    ("000", f"WANDB_API_KEY=YOUR_WANDB_API_KEY {EIGHT} scripts/train.py configs/opensora/train/64x512x512.py "
            "--data-path YOUR_CSV_PATH --wandb True"),
    ("000", SEARCH),
    ("000", f"{SEARCH} --resolution 240p"),
    ("001", f"python scripts/inference.py {STDIT} --prompt_path ./assets/texts/t2v_samples.txt "
            "--ckpt-path ./path/to/your/ckpt.pth"),
    ("002", "python scripts/inference.py --help"),
    ("003", f"python3 demo_open_sora.py {GCU}"),
    ("003", "python3 demo_open_sora.py -h"),
    ("003", f"python3 benchmark_open_sora.py {GCU} --benchmark-save-path ./benchmark/report-opensora-v1.2.json "
            "--warmup-count 3 --eval-count 5"),
    ("003", "python3 benchmark_open_sora.py -h"),
)  # fmt: skip
NOT_RUN = {
    "video extending, long video generation and video editing (000)": "their references are on other people's servers",
    "pip3 install -r requirements.txt (003)": ".ci/run installs the same, in a fresh environment",
    "./TopsRider_{filename}.run -y -C torch-gcu-2 (003)": "another vendor's installer",
}
PLACEHOLDERS = {
    "CKPT_PATH": "weights/OpenSora-STDiT-v2-stage3",
    "./path/to/your/ckpt.pth": "weights/OpenSora-v1-HQ-16x256x256.pth",
    "$path_to_dit_dir": "weights/OpenSora-STDiT-v3",
    "$path_to_t5_dir": "weights/t5-v1_1-xxl",
    "$path_to_vae2d_dir": "weights/pixart_sigma_sdxlvae_T5_diffusers",
    "$path_to_vae3d_dir": "weights/OpenSora-VAE-v1.2",
    "YOUR_CSV_PATH": "videos.csv",
    "YOUR_SEARCH_CSV": "images.csv",  # there it is a path of the authors' machine
    "gcu": "cpu",  # tests/test_devices.py runs both programs on a stand-in for that device
}
# Flags whose numbers only make a stand-in slow, and what they become.
SMALLER = {"--num-frames": {"32": "16"}, "--warmup-count": {"3": "0"}, "--eval-count": {"5": "1"}}
ONE_PROMPT = ("--start-index", "0", "--end-index", "1")
TRAINING = (
    "--dtype", "fp32", "--cfg-options", "dataset.num_frames=4", "dataset.image_size=(32,32)", "batch_size=1",
    "num_workers=0", "max_steps=1", "epochs=1", "ckpt_every=1", "log_every=1", *documents.SMALL_MODEL,
)  # fmt: skip
ARGUMENTS = {
    "scripts/inference.py": (*ONE_PROMPT, *documents.INFERENCE),
    "scripts/inference-long.py": documents.INFERENCE,
    "scripts/train.py": TRAINING,
    "scripts/misc/search_bs.py": documents.SEARCH,
    "demo_open_sora.py": documents.INFERENCE,
    "benchmark_open_sora.py": documents.INFERENCE,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the root of the repository, with what the documents tell their reader to bring."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("assets", "configs", "scripts", "opensora"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "weights").mkdir()
    for name in ("OpenSora-STDiT-v2-stage3", "OpenSora-STDiT-v3", "OpenSora-VAE-v1.2", "t5-v1_1-xxl"):
        documents.WEIGHTS[name](folder / "weights" / name)
    documents.WEIGHTS["OpenSora-v1-HQ-16x256x256.pth"](folder / "weights/OpenSora-v1-HQ-16x256x256.pth")
    vae_2d = folder / "weights/pixart_sigma_sdxlvae_T5_diffusers/vae"
    vae_2d.mkdir(parents=True)
    zoo.make_vae(vae_2d)
    zoo.dit(folder / "DiT-XL-2-256x256.pt", "label_1000")
    zoo.latte(folder / "Latte-XL-2-256x256-ucf101.pt", "label_101")
    for name, kind in (("256x256", "PixArt"), ("512x512", "PixArt"), ("1024MS", "PixArtMS")):
        zoo.pixart(folder / f"PixArt-XL-2-{name}.pth", kind)
    zoo.stdit_training(folder / TRAINED)
    write_video(make_clip(0, 0, 17, 144, 256).video, folder / "wave.mp4", 24)
    rows = ["wave.mp4,a wave,17,144,256"] * 8
    (folder / "videos.csv").write_text("\n".join(["path,text,num_frames,height,width", *rows, ""]))
    picture = "assets/images/condition/wave.png,a wave,1,360,640"
    (folder / "images.csv").write_text("\n".join(["path,text,num_frames,height,width", picture, ""]))
    (folder / "wandb.py").write_text((ROOT / "tests/fake_wandb.py").read_text())
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.fill_hub_cache(tmp_path_factory.mktemp("published_hub"))


@pytest.fixture
def here(prepared: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to work in, with models of full size made small."""
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb)  # gone again after the test
    use_cache(hub, monkeypatch)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))  # of other processes
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    large = {name: {**registry.VARIANTS.get(name, {}), **zoo.SMALL} for name in registry.MODELS if "/" in name}
    monkeypatch.setattr(registry, "VARIANTS", large)
    return folder


def words_of(command: str) -> tuple[int, list[str]]:
    """How many processes a command starts, and its words from the program on, placeholders filled in."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words.pop(0)
    if words[0] != "torchrun":
        return 1, words[1:]
    begin = next(number for number, word in enumerate(words) if word.endswith(".py"))
    count = re.search(r"--nproc_per_node[ =](\d+)", " ".join(words[:begin]))
    return int(count[1]), words[begin:]


def quickened(words: Sequence[str]) -> list[str]:
    """A command with fewer frames and steps, and with what `ARGUMENTS` appends."""
    program, *given = [
        SMALLER.get(before, {}).get(word, word) for before, word in zip(["", *words], words, strict=False)
    ]
    if {"-h", "--help"} & {*given}:
        return [program, *given]
    more = [*ARGUMENTS[program]]
    if program == "scripts/inference.py" and "--prompt" in given:
        more = more[len(ONE_PROMPT) :]
    return [program, *given, *more]


def run(processes: int, words: Sequence[str]) -> int:
    """The exit code of a program: within this process, or under torchrun on small models."""
    if not os.environ.get("OPENSORA_AS_WRITTEN"):
        return documents.run(words[0], words[1:])
    small = [f"model.{name}={value}" for name, value in zoo.SMALL.items()]
    options = [] if any(word.startswith("model.depth") for word in words) else small
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join((str(Path.cwd()), str(ROOT)))
    ended = subprocess.run([*launcher, *words, *options], capture_output=True, text=True, timeout=600, env=environment)
    print(ended.stdout)
    print(ended.stderr, file=sys.stderr)
    return ended.returncode


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=lambda value: value[:90])
@some(16)
def test_published_command(
    document: str, command: str, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, words = words_of(command)
    words = quickened(words)
    if "YOUR_PRETRAINED_CKPT" in words:  # what an earlier run left
        first = [word for word in words if word not in ("--load", "YOUR_PRETRAINED_CKPT")]
        assert documents.run(first[0], first[1:]) == 0, capsys.readouterr().err[:3000]
        [checkpoint] = (here / "outputs").glob("*STDiT-XL-2/epoch*-global_step1")
        words = [str(checkpoint) if word == "YOUR_PRETRAINED_CKPT" else word for word in words]
        words = ["max_steps=2" if word == "max_steps=1" else word for word in words]
    code = run(processes, words)
    printed, told = capsys.readouterr()
    assert code in (0, None), f"{command}: {told[:3000]}"
    if words[0] in ("scripts/inference.py", "scripts/inference-long.py") and "--help" not in words:
        made = [Path(line) for line in printed.splitlines() if line.endswith((".mp4", ".png"))]
        assert made and all(path.stat().st_size for path in made)


def test_every_command_is_run_or_has_a_reason() -> None:
    """Those with an address in them are the ones that need a network."""
    assert not [command for _, command in COMMANDS if "://" in command]
    assert all(NOT_RUN.values())
