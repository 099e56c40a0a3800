"""Every command of the documents is understood as it stands, and does its job with tiny stand-ins for the weights.

A block runs if it has a verb that no block before it has run, and with OPENSORA_FULL=1 every block does. The first
section of `WALK_THROUGH` runs as a whole.
A block of commands starts in a folder of its own that holds what the documents name: weights, prompts, pictures, an
earlier training run. The blocks of a document in `IN_ORDER` go on from one another. A program that has no row in
`SMALLER` fails the test.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

from opensora import cli, registry
from opensora.checkpoints import builder
from opensora.cli.verbs import VERBS, make_parser
from opensora.config import model_zoo, read_config
from opensora.config.settings import InferenceSettings, TrainSettings, check_trainable
from opensora.datasets.synthetic.render import make_clip
from opensora.datasets.video import write_image, write_video
from opensora.pipeline.conditioning import place_media
from opensora.pipeline.job import Job
from opensora.pipeline.job_spec import JobSpec
from opensora.pipeline.loaded_models import LoadedModels
from opensora.training.result import TrainResult
from tests import zoo
from tests.checkpoints import use_cache
from tests.full import FULL
from tests.gguf_files import tiny_t5_gguf
from tests.lora_files import embedded_lora
from tests.tiny import make_tiny_t5, make_tiny_vae

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
DOCUMENTS += sorted(ROOT.glob("configs/**/README.md"))
IN_ORDER = ("docs/data_processing.md", "docs/lora.md", "docs/training.md", "docs/weight_files.md")
WALK_THROUGH = "docs/data_processing.md"  # its first section with commands always runs as a whole

# What makes the environment and looks at the repository as a whole: `.ci/run` runs these, in these words.
RUN_BY_CI = (
    "python -m venv .venv",
    ". .venv/bin/activate",
    "pip install -c constraints.txt -e .",
    'pip install -c constraints.txt -e ".[dev]"',
    "python -m pytest -q",
    "ruff check .",
    "mypy",
    "ruff format --check .",
)

# Program -> what is appended to its commands, so that they finish at once. Settings after --cfg-options come last.
INFERENCE = ("--cfg-options", "image_size=(32, 48)", "scheduler.num_sampling_steps=2")
PLANNING = ("--cfg-options", "image_size=(32, 48)")
FEWER = {"--steps-until": "1", "--scenes": "4"}  # flags with a number that has to fit these
FEWER_STEPS = {"max_steps=400": "max_steps=4", "max_steps=600": "max_steps=6"}  # of a run that goes on
TRAINING = ("--batch-size", "1", "--dtype", "fp32", "--cfg-options", "dataset.num_clips=2", "max_steps=2")
SMALL_CLIPS = ("dataset.image_size=(16, 16)", "dataset.num_frames=5", "dataset.sizes=None", "dataset.continued=None")
SMALL_FRAMES = ("model.vae_2d.block_out_channels=(8, 8, 8, 8)", "model.vae_2d.norm_num_groups=4")
SMALL_TIME = ("model.vae_temporal.filters=8", "model.vae_temporal.num_groups=4")
SMALL_MODEL = tuple(f"model.{k}={v}" for k, v in zoo.SMALL.items())
SEARCH = (
    "--dtype", "fp32", "--base-step-time", "60",
    "--cfg-options", "bucket_config={'144p': {1: (1, 1)}, '240p': {1: (1, 1)}}", "untimed_steps=0", "active_steps=1",
    *SMALL_MODEL,
)  # fmt: skip
FINETUNING = (
    "--cfg-options", "batch_size=1", "num_workers=0", "max_steps=2", "log_every=1", "ckpt_every=2", "validate_every=2",
    "sample_every=2", "scheduler.num_sampling_steps=2",
)  # fmt: skip
EXTRACTION = ("--dtype", "fp32", "--cfg-options", "num_workers=0")
SMALL_BUCKETS = "bucket_config={'144p': {1: (1.0, 1), 17: (1.0, 1)}}"
# Configuration -> what is appended to the settings of its commands, unless they search for just that.
SETTINGS_OF = {
    "embedded/train/finetune_buckets": SMALL_BUCKETS,
    "configs/opensora-v1-2/misc/extract.py": SMALL_BUCKETS,
}
ON_TWO = ("--cfg-options", "batch_size=1", "num_workers=0", "max_steps=1", "validate_every=0")
SMALLER = {
    "opensora generate": INFERENCE,
    "opensora plan": PLANNING,
    "opensora continue": (),
    "opensora replay": (),
    "opensora inspect": (),
    "opensora convert": (),
    "opensora export": (),
    "opensora models": (),
    "opensora table": (),
    "opensora buckets": (),
    "opensora data": (),
    "opensora train": FINETUNING,
    "opensora extract": EXTRACTION,
    "opensora benchmark": ("--warmup-count", "0", "--eval-count", "1", *INFERENCE),
    "opensora doctor": (),
    "torchrun -m opensora train": ON_TWO,
    "torchrun scripts/train.py": ON_TWO,
    "demo_open_sora.py": INFERENCE,
    "benchmark_open_sora.py": ("--warmup-count", "0", "--eval-count", "1", *INFERENCE),
    "scripts/inference.py": INFERENCE,
    "scripts/inference-long.py": INFERENCE,
    "scripts/train_text_encoder.py": ("--steps", "1"),
    "scripts/train_vae.py": (*TRAINING, *SMALL_CLIPS, *SMALL_FRAMES, *SMALL_TIME),
    "scripts/train.py": (*TRAINING, *SMALL_CLIPS, "compile=False", *(f"model.{k}={v}" for k, v in zoo.SMALL.items())),
    "scripts/misc/export.py": (),
    "scripts/misc/reproduce_embedded.py": ("--outputs", "outputs/fresh"),
    "scripts/misc/eval_conditioning.py": ("--num", "1", "--sizes", "17x16x24", "--jobs", "text"),
    "scripts/misc/extract_feat.py": EXTRACTION,
    "scripts/misc/search_bs.py": SEARCH,
    "opensora search-bs": SEARCH,
    "scripts/misc/lora_clips.py": ("--num", "3", "--known", "2"),
    "scripts/misc/eval_lora.py": ("--num-prompts", "1", *INFERENCE),
    "scripts/misc/eval_embedded.py": ("--num-prompts", "2", "--from-scenes", "--reconstruction", "1"),
}

# Program -> the verb that it is a door to, or None where only the full run has the time.
VERB_OF = {
    "demo_open_sora.py": "generate",
    "benchmark_open_sora.py": "benchmark",
    "scripts/inference.py": "generate",
    "scripts/inference-long.py": "generate",
    "scripts/train.py": "train",
    "scripts/train_vae.py": "train-vae",
    "scripts/misc/export.py": "export",
    "scripts/misc/extract_feat.py": "extract",
    "scripts/misc/search_bs.py": "search-bs",
    "scripts/misc/reproduce_embedded.py": None,  # tests/test_export.py runs its stages
    "scripts/misc/eval_embedded.py": None,
    "torchrun -m opensora train": None,  # tests/test_training_ranks.py trains on two
    "torchrun scripts/train.py": None,
}
WITHOUT_VERB = {"scripts/misc/lora_clips.py", "scripts/misc/eval_lora.py"}  # docs/lora.md runs them
RUN_BY_PREPARED = {"train", "train-vae"}
RUN_ELSEWHERE = {"serve"}  # tests/serving

# What the documents call a file -> what makes it.
WEIGHTS = {
    "OpenSora-STDiT-v3": zoo.stdit3,
    "OpenSora-STDiT-v2-stage3": zoo.stdit2,
    "OpenSora-v1-HQ-16x256x256.pth": zoo.stdit,
    "OpenSora-VAE-v1.2": make_tiny_vae,
    "sd-vae-ft-ema": zoo.make_vae,
    "t5-v1_1-xxl": make_tiny_t5,
    "PixArt-XL-2-256x256.pth": zoo.pixart,
    "PixArt-XL-2-512x512.pth": zoo.pixart,
    "PixArt-XL-2-1024-MS.pth": lambda file: zoo.pixart(file, "PixArtMS"),
    "PixArt-Sigma-XL-2-2K-MS.pth": lambda file: zoo.pixart(file, text_length=300),
    "DiT-XL-2-256x256.pt": lambda file: zoo.dit(file, "label_1000"),
    "dit-text.pt": lambda file: zoo.dit(file, "text"),
    "Latte-XL-2-256x256-ucf101.pt": lambda file: zoo.latte(file, "label_101"),
    "latte-text.pt": lambda file: zoo.latte(file, "text"),
    "t5-v1_1-xxl-encoder-Q8_0.gguf": tiny_t5_gguf,
    "my-lora.safetensors": embedded_lora,
}
TORCHRUN = {"--standalone": 1, "--nproc_per_node": 2}  # its flags in the documents, and how many words each takes
PROMPTS = ("a red circle moving right on a black background", "a lighthouse in the rain", "a boat on a lake at dawn")
CLIP_FRAMES = 51


class Block(NamedTuple):
    """The commands of one fenced block, each as its words."""

    place: str
    commands: list[list[str]]
    section: int = 0  # number of the heading before it


def split(text: str) -> list[list[str]]:
    """The commands of a block: comments dropped, continued lines joined, `&&` taken apart. AssertionError otherwise."""
    commands = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        commands.append([])
        for word in words:
            operator = bool(word) and set(word) <= set("|&;<>()")
            assert not operator or word == "&&", f"{line}: only && may join commands"
            if word == "&&":
                commands.append([])
            else:
                commands[-1].append(word)
    return [command for command in commands if command]


def blocks() -> Iterator[Block]:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(?:bash|sh|shell|console)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start(1)) + 1
            section = len(re.findall(r"^## ", text[: match.start()], re.MULTILINE))
            yield Block(f"{document.relative_to(ROOT).as_posix()}:{line}", split(match[1]), section)


def jobs() -> Iterator[Block]:
    """The blocks, those of a document in `IN_ORDER` as a single one."""
    for place in IN_ORDER:
        own = [block for block in BLOCKS if block.place.startswith(f"{place}:")]
        assert own, f"{place} has no commands"
        yield Block(place, [command for block in own for command in block.commands])
    yield from (block for block in BLOCKS if block.place.rpartition(":")[0] not in IN_ORDER)


def chosen(blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks that run. Without FULL these are blocks with a new verb, in order the first command of each verb."""
    seen = {*RUN_BY_PREPARED, None}
    for block in blocks:
        commands = [command for command in block.commands if command not in BY_CI]
        if FULL:
            yield block
        elif block.place == WALK_THROUGH:
            own = [one for one in BLOCKS if one.place.startswith(f"{WALK_THROUGH}:")]
            yield Block(WALK_THROUGH, [one for part in own if part.section == own[0].section for one in part.commands])
        elif block.place in IN_ORDER:
            yield Block(block.place, first_of_each(commands))
        elif not {verb_of(command) for command in commands} <= seen:
            yield block
        else:
            continue
        seen |= {verb_of(command) for command in commands}


def verb_of(command: list[str]) -> str | None:
    program, _ = program_of(command)
    return VERB_OF.get(program, program.removeprefix("opensora "))


def first_of_each(commands: Iterable[list[str]]) -> list[list[str]]:
    """The first command of each verb."""
    first: dict[str | None, list[str]] = {}
    for command in commands:
        first.setdefault(verb_of(command), command)
    first.pop(None, None)
    return list(first.values())


def links(document: Path) -> list[str]:
    """The targets of the links and pictures that stay in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8"))
    return [target for target in targets if "://" not in target]


def anchors(document: Path, level: str = "#+") -> list[str]:
    """The anchors of a document's headings."""
    titles = re.findall(rf"^{level} (.*)", document.read_text("utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


BLOCKS = list(blocks())
BY_CI = [shlex.split(command) for command in RUN_BY_CI]
COMMANDS = [
    pytest.param(command, id=f"{block.place} {' '.join(command[:2])}")
    for block in BLOCKS
    for command in block.commands
    if command not in BY_CI
]


def program_of(command: Sequence[str]) -> tuple[str, list[str]]:
    """The row of `SMALLER` that a command has, and its arguments. AssertionError when it has none."""
    if command[0] == "torchrun":
        return _under_torchrun(command)
    name = command[1] if command[0] == "python" else " ".join(command[:2])
    assert name in SMALLER, f"no test knows how to run {shlex.join(command)!r}"
    return name, list(command[2:])


def _under_torchrun(command: Sequence[str]) -> tuple[str, list[str]]:
    """The same for a program that is started on several ranks."""
    flags, words = [], list(command[1:])
    while words and words[0] in TORCHRUN:
        flags += words[: TORCHRUN[words[0]]]
        words = words[TORCHRUN[words[0]] :]
    size = 3 if words[:1] == ["-m"] else 1
    name, known = " ".join(["torchrun", *words[:size]]), ["--standalone", "--nproc_per_node", "2"]
    assert name in SMALLER and flags == known, f"no test knows how to run {shlex.join(command)!r}"
    return name, words[size:]


def run(name: str, arguments: Sequence[str]) -> int:
    """The exit code of a program, run within this process."""
    if name.startswith("opensora "):
        return cli.main([name.removeprefix("opensora "), *arguments])
    if name == "scripts/misc/reproduce_embedded.py":
        return reproduce(arguments)
    if name.startswith("torchrun "):
        return run_on_two(name.split()[1:], arguments)
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def run_on_two(program: Sequence[str], arguments: Sequence[str]) -> int:
    """The exit code of a program on two ranks, which tell what they have to say to this process's stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment)
    print(ended.stdout)
    print(ended.stderr, file=sys.stderr)
    return ended.returncode


def run_small(name: str, arguments: Sequence[str]) -> int:
    """The same with what `SMALLER` appends; settings go to those that the command has."""
    *flags, options = [list(part) for part in _cut(SMALLER[name])]
    given, given_options = _cut(arguments)
    given = [FEWER.get(before, word) for before, word in zip(["", *given], given, strict=False)]
    given += ["--workers", "0"] if given[:1] == ["curate"] and "--executor" not in given else []  # starts no process
    if SMALLER[name] is not SEARCH:
        options += [SETTINGS_OF[word] for word in given if word in SETTINGS_OF]
    options += [FEWER_STEPS[option] for option in given_options if option in FEWER_STEPS]
    return run(name, [*given, *flags[0], *(["--cfg-options", *given_options, *options] if options else [])])


def _cut(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments without --cfg-options and its values, and these values."""
    words = list(arguments)
    if "--cfg-options" not in words:
        return words, []
    begin = words.index("--cfg-options")
    end = next((i for i, word in enumerate(words) if i > begin and word.startswith("--")), len(words))
    return words[:begin] + words[end:], words[begin + 1 : end]


def reproduce(arguments: Sequence[str]) -> int:
    """All stages of the embedded model in miniature; what they export goes to the working folder, not the package."""
    module = load_script("scripts/misc/reproduce_embedded.py")
    module.EMBEDDED = Path("exported")
    module.run = lambda command: run_small(command[0], command[1:])
    return module.main(list(arguments))


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the root of the repository, with everything that the documents name."""
    folder = tmp_path_factory.mktemp("documents")
    for name in ("assets", "configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    part = "opensora/embedded/text_encoder"
    shutil.copytree(ROOT / part, folder / part)
    (folder / "weights").mkdir()
    for name, make in WEIGHTS.items():
        make(folder / "weights" / name)
    zoo.stdit_training(folder / "outputs/001-STDiT-XL-2/epoch12-global_step2000")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    clip = make_clip(0, 0, CLIP_FRAMES, 64, 96).video
    write_video(clip, folder / "clip.mp4", 24)
    write_image(clip[0], folder / "first.png")
    write_image(clip[-1], folder / "last.png")
    write_video(make_clip(0, 0, 17, 144, 256).video, folder / "wave.mp4", 24)
    make_own_videos(folder / "my-videos")
    (folder / "videos.csv").write_text("path,text,num_frames,height,width\nwave.mp4,a wave,17,144,256\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("opensora.training.autoencoder.STATISTICS_CLIPS", 2)
        assert run_small("scripts/train_vae.py", ["configs/embedded/train/vae_2d.py"]) == 0
        assert run_small("scripts/train_vae.py", ["configs/embedded/train/vae_temporal.py"]) == 0
        assert run_small("scripts/train.py", ["configs/embedded/train/stdit3.py"]) == 0
    return folder


def make_own_videos(folder: Path) -> None:
    """What somebody might have: clips with and without texts, some pictures, and a file that is no video."""
    folder.mkdir()
    for number in range(10):
        clip = make_clip(1, number, 20, 144, 256)
        write_video(clip.video, folder / f"clip_{number}.mp4", 24)
        if number:
            (folder / f"clip_{number}.txt").write_text(f"{clip.text}\n")
    for number in range(4):
        write_image(make_clip(2, number, 1, 144, 256).video[0], folder / f"a_picture_{number}.png")
    (folder / "broken.mp4").write_bytes(b"not a video")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.fill_hub_cache(tmp_path_factory.mktemp("documents_hub"))


def use(folder: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this the working folder, with models of full size made small below what a section says."""
    monkeypatch.chdir(folder)
    use_cache(hub, monkeypatch)
    large = {name: {**registry.VARIANTS.get(name, {}), **zoo.SMALL} for name in registry.MODELS if "/" in name}
    monkeypatch.setattr(registry, "VARIANTS", large)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(
        "opensora.pipeline.prompt_refiner.refine_texts", lambda texts, where: {text: text for text in texts}
    )


@pytest.fixture
def here(prepared: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own for a block."""
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder, symlinks=True)
    use(folder, hub, monkeypatch)
    return folder


@pytest.fixture(scope="module")
def written(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a command before another one writes."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("written") / "here", symlinks=True)
    for name in ("my-videos.csv", "my-diagonals.csv", "training.csv"):
        (folder / name).touch()
    (folder / "outputs/finetune/ema").mkdir(parents=True)
    (folder / "my-lora/diagonal").mkdir(parents=True)
    for name in ("my-videos", "my-diagonals"):
        (folder / "features" / name).mkdir(parents=True)
    assert cli.main(["export", "embedded", str(folder / "weights/shapes"), "--to", "hub"]) == 0
    return folder


def check_request(settings: InferenceSettings) -> int:
    """All that can be said about a request without reading a weight: sizes, prompts, references, masks, loops."""
    job = Job(JobSpec(settings), LoadedModels(settings))
    assert job.requests
    vae = built_autoencoder(json.dumps(settings.vae))
    model = SimpleNamespace(patch_size=(1, 2, 2))  # its checkpoint may be what a command before this one writes
    place_media(job, job.requests, model, vae)
    return 0


@functools.cache
def built_autoencoder(section: str) -> Any:
    section = json.loads(section)
    return builder.build_model(section, builder.find_weights(section, "vae"))


def check_training(settings: TrainSettings) -> TrainResult:
    check_trainable(settings)
    registry.arguments(settings.model)
    return TrainResult(Path("000-a"), 0)


CHECKS = {  # what takes the place of an action
    "cli.verbs.generation.generate": check_request,
    "cli.verbs.generation.benchmark": lambda settings, args: check_request(settings),
    "training.diffusion.train": check_training,
    "training.autoencoder.train_vae": check_training,
    "training.feature_extraction.extract.extract": lambda settings: Path(settings.save_dir),
    "training.batch_size_search.search_report.search_batch_sizes": lambda settings: None,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_is_understood_as_it_stands(
    command: list[str], written: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, arguments = program_of(command)
    name = name.removeprefix("torchrun ").replace("-m opensora", "opensora")
    verb = VERB_OF.get(name, name.removeprefix("opensora "))
    use(written, hub, monkeypatch)
    for action, check in CHECKS.items():
        monkeypatch.setattr(f"opensora.{action}", check)
    if verb in ("generate", "benchmark", "train", "train-vae", "extract", "search-bs"):
        assert run(name, arguments) in (0, None)
    elif verb in VERBS:
        assert make_parser().parse_args([verb, *arguments]).run


@pytest.mark.timeout(900)  # for a document as a whole, on a machine that has other things to do
@pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in chosen(jobs())])
def test_does_its_job_on_stand_ins(block: Block, here: Path, capsys: pytest.CaptureFixture) -> None:
    for command in block.commands:
        if command in BY_CI:
            continue
        name, arguments = program_of(command)
        code = run_small(name, arguments)
        printed, told = capsys.readouterr()
        assert code in (0, None), f"{shlex.join(command)}: {told[-2000:]}"
        if SMALLER[name] is INFERENCE:
            made = [Path(line) for line in printed.splitlines()]
            assert made and all(path.stat().st_size for path in made)
    if block.place == "docs/training.md":
        check_runs(here / "outputs")


def check_runs(outputs: Path) -> None:
    """What the runs of docs/training.md leave, in the files that it names."""
    first = outputs / "finetune/000-STDiT3"
    lines = [json.loads(line) for line in (first / "log.jsonl").read_text().splitlines()]
    steps = 6 if FULL else 2  # it goes on twice
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
    assert [line["step"] for line in lines if "validation/17x64x64/t0.95" in line] == list(range(2, steps + 1, 2))
    assert (first / "latest").resolve().name.endswith(f"global_step{steps}")
    assert len(list((first / "samples").glob("step0000002-*.mp4"))) == 1
    for name in ("finetune", *(("finetune_buckets", "encoded", "two", "together", "temporal") if FULL else ())):
        assert (outputs / name / "ema/model.safetensors").is_file(), name


def test_commands_are_taken_apart() -> None:
    text = "a --b \"c d\" \\\n    e  # not this\n\n# nor this\nf='|0|g;h' && i {j}\n"
    assert split(text) == [["a", "--b", "c d", "e"], ["f=|0|g;h"], ["i", "{j}"]]
    for text in ("a | b", "a > b", "a; b", "(a)", "a & b"):
        with pytest.raises(AssertionError, match="only && may join"):
            split(text)


def test_every_verb_is_run() -> None:
    commands = [command for block in chosen(jobs()) for command in block.commands if command not in BY_CI]
    assert set(VERBS) == {verb_of(command) for command in commands} - WITHOUT_VERB | RUN_BY_PREPARED | RUN_ELSEWHERE


def test_every_document_is_read() -> None:
    fences = {document: re.findall(r"^```(\w*)", document.read_text("utf-8"), re.MULTILINE) for document in DOCUMENTS}
    assert sum(len(block.commands) for block in BLOCKS) > 60
    assert not {language for found in fences.values() for language in found} - {"", "bash", "text", "python"}
    assert len(BLOCKS) == sum(found.count("bash") for found in fences.values())


PROGRAMS = ("lora.md", "python.md", "serving.md")  # their Python is no configuration; tests of their own run it
CONFIGURATIONS = [path for path in DOCUMENTS if "```python" in path.read_text("utf-8") and path.name not in PROGRAMS]


@pytest.mark.parametrize("document", CONFIGURATIONS, ids=str)
def test_configurations_of_the_documents_are_read(document: Path, tmp_path: Path) -> None:
    for text in re.findall(r"^```python\n(.*?)^```$", document.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        file = tmp_path / "config.py"
        file.write_text(text)
        config = read_config(file)
        kind = InferenceSettings if "prompt_path" in config else TrainSettings
        assert kind.from_config(config, document.name).model


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    for target in links(document):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or file.suffix != ".md" or anchor in anchors(file), target


@pytest.mark.parametrize(
    "link",
    ["docs/structure.md#inference-config-demos", "docs/structure.md#training-config-demos", "docs/commands.md",
     "docs/acceleration.md", "docs/config.md", "docs/datasets.md", "opensora/utils/config_utils.py",
     "opensora/datasets/aspect.py", "configs/opensora-v1-1/train/image.py", "configs/opensora-v1-1/train/video.py"],
)  # fmt: skip
def test_what_the_published_documents_link_to_is_there(link: str) -> None:
    path, _, anchor = link.partition("#")
    assert (ROOT / path).is_file()
    assert not anchor or anchor in anchors(ROOT / path)


@pytest.mark.parametrize(
    "command",
    [
        "make all",
        "opensora paint x",
        "python scripts/other.py",
        "python -m other",
        "torchrun --standalone --nproc_per_node 2 scripts/other.py",
        "torchrun --standalone --nproc_per_node 2 -m opensora paint",
        "torchrun",
    ],
)
def test_unknown_programs_fail(command: str) -> None:
    with pytest.raises(AssertionError, match="no test knows how to run"):
        program_of(command.split())


def test_environments_are_made_as_ci_makes_them() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert [command for command in RUN_BY_CI if command not in script] == []
    used = [command for block in BLOCKS for command in block.commands]
    assert [command for command in BY_CI if command not in used] == []


def test_models_of_the_readme_are_those_of_the_program() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    rows = [tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in re.findall(r"^\|.*", text, re.M)]
    listed = [re.split(r"  +", line) for line in model_zoo.table().split("\n\n")[0].splitlines()]
    assert len(listed) > 10
    assert [row for row in listed if tuple(row) not in rows] == []


def test_contents_lead_to_their_sections() -> None:
    document = ROOT / "docs" / "commands.md"
    listed = re.findall(r"^- \[.*\]\(#(.*)\)$", document.read_text("utf-8"), re.MULTILINE)
    assert listed == anchors(document, "##")


def test_stand_ins_are_those_that_the_documents_name() -> None:
    words = {word for block in BLOCKS for command in block.commands for word in command}
    named = {match for word in words for match in re.findall(r"weights/([\w.-]+)", word)}
    assert not [name for name in WEIGHTS if name not in named]
