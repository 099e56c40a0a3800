"""Files with random mistakes: each ends in a right result, or in one line and a status other than 0, soon and small.

60 are tried, 2,000 with OPENSORA_FULL=1; `OPENSORA_TEST_SEED` says which (0). Failures are shrunk by hypothesis.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from opensora.config import find_config, read_config
from opensora.datasets.synthetic.render import make_clip
from opensora.datasets.video import write_image, write_video
from tests.full import count
from tests.wrong_inputs import exchanged
from tests.wrong_inputs.mutations import as_config, as_json, damaged, mutated

SECONDS, MEGABYTES, CHARACTERS = 5.0, 500.0, 2000
NUMBER, SEED = count(60, 2000), int(os.environ.get("OPENSORA_TEST_SEED", 0))
SMALL = ["--image-size", "16", "24", "--num-frames", "5", "--steps", "2", "--seed", "1"]
ENOUGH = 20  # files, among which some have no mistake
PROMPT = "a red circle moving right on a black background"
Run = Callable[[list[str], Path], dict[str, Any]]


class Kind(NamedTuple):
    """How wrong files of one kind are made out of right ones, and what is done with them.

    make: draws a case into a folder that holds a copy of `base`, and gives the arguments of the command
    """

    base: str
    make: Callable[[st.DataObject, Path], list[str]]


def some_bytes(data: st.DataObject, file: Path) -> None:
    file.write_bytes(data.draw(damaged(file.read_bytes()), label=file.name))


def some_json(data: st.DataObject, file: Path, value: Any = None) -> None:
    """Mistakes in what a JSON file says, or in its bytes."""
    if data.draw(st.integers(0, 4), label="bytes?") == 0:
        return some_bytes(data, file)
    value = json.loads(file.read_text()) if value is None else value
    file.write_bytes(as_json(data.draw(mutated(value), label=file.name)))


def configuration(data: st.DataObject, folder: Path) -> list[str]:
    config = read_config(find_config("embedded")) | {"image_size": (16, 24), "num_frames": 5}
    (folder / "own.py").write_bytes(as_config(config))
    if data.draw(st.integers(0, 4), label="bytes?") == 0:
        some_bytes(data, folder / "own.py")
    else:
        (folder / "own.py").write_bytes(as_config(data.draw(mutated(config), label="own.py")))
    return ["plan", "--model", "own.py", PROMPT]


def json_of_a_prompt(data: st.DataObject, folder: Path) -> list[str]:
    told = {"reference_path": "first.png;last.png", "mask_strategy": "0;0,1,0,-1,1"}
    changed = as_json(data.draw(mutated(told), label="JSON")).decode()
    line = PROMPT + changed if data.draw(st.booleans(), label="whole?") else f"|0|{PROMPT}|1|{PROMPT}{changed}"
    content = line.encode()
    (folder / "prompts.txt").write_bytes(data.draw(damaged(content)) if data.draw(st.integers(0, 4)) == 0 else content)
    return ["plan", "--prompt-path", "prompts.txt", *SMALL]


def recipe(data: st.DataObject, folder: Path) -> list[str]:
    some_json(data, folder / "sample_0000.json")
    return ["replay", "sample_0000.json", "--save-dir", "again"]


def recipe_in_a_video(data: st.DataObject, folder: Path) -> list[str]:
    (folder / "sample_0000.json").unlink()
    some_bytes(data, folder / "sample_0000.mp4")
    return ["replay", "sample_0000.mp4", "--save-dir", "again"]


def draft(data: st.DataObject, folder: Path) -> list[str]:
    from safetensors.torch import load_file, save_file

    from opensora.pipeline import draft as drafts

    [file] = folder.glob("*.draft.safetensors")
    if data.draw(st.booleans(), label="bytes?"):
        some_bytes(data, file)
    else:  # a hash without a key keeps nobody from changing a file
        tensors, text = load_file(file), drafts.read_metadata(file)[drafts.KEY]
        text = as_json(data.draw(mutated(json.loads(text)), label="draft")).decode()
        save_file(tensors, file, {drafts.KEY: text, drafts.DIGEST: drafts._digest(text, tensors)})
    return ["continue", file.name]


def table(data: st.DataObject, folder: Path) -> list[str]:
    name = data.draw(st.sampled_from(("videos.csv", "videos.jsonl", "videos.parquet")))
    if name == "videos.jsonl" and data.draw(st.booleans(), label="values?"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        lines = [as_json(row) for row in data.draw(mutated(rows), label="rows") or []]
        (folder / name).write_bytes(b"\n".join(lines))
    else:
        some_bytes(data, folder / name)
    return ["buckets", name, "buckets.py", "--save-dir", "buckets"]


def state(data: st.DataObject, folder: Path) -> list[str]:
    [checkpoint] = folder.glob("outputs/*/epoch*")
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files), label="file")
    (some_json if file.suffix == ".json" else some_bytes)(data, file)
    return ["resume", "outputs", str(checkpoint.relative_to(folder))]


def weights(data: st.DataObject, folder: Path) -> list[str]:
    name = data.draw(st.sampled_from(("model.safetensors", "model.pt")))
    file = folder / "weights" / name
    content = file.read_bytes()
    if name == "model.safetensors" and data.draw(st.booleans(), label="header?"):
        size = int.from_bytes(content[:8], "little")
        header = as_json(data.draw(mutated(json.loads(content[8 : 8 + size])), label="header"))
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    else:
        some_bytes(data, file)
    return ["inspect", f"weights/{name}"]


def config_json(data: st.DataObject, folder: Path) -> list[str]:
    some_json(data, folder / "stdit3/config.json")
    return ["plan", "--ckpt-path", "stdit3", PROMPT, *SMALL]


def media(data: st.DataObject, folder: Path) -> list[str]:
    name = data.draw(st.sampled_from(("clip.mp4", "clip.gif", "clip.mkv", "first.png")))
    some_bytes(data, folder / "media" / name)
    return ["table", "media", "made.csv"]


KINDS = {
    "configuration": Kind("plain", configuration),
    "JSON of a prompt": Kind("plain", json_of_a_prompt),
    "recipe": Kind("made", recipe),
    "recipe in a video": Kind("made", recipe_in_a_video),
    "draft": Kind("draft", draft),
    "table": Kind("tables", table),
    "state of a training run": Kind("run", state),
    "weights": Kind("weights", weights),
    "config.json": Kind("weights", config_json),
    "media": Kind("shots", media),
    **{name: Kind(*made) for name, made in exchanged.MAKERS.items()},
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command in a folder, in a fork of a process that has imported everything."""
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.wrong_inputs.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    assert server.stdout.readline() == "ready\n"

    def run(arguments: list[str], folder: Path) -> dict[str, Any]:
        server.stdin.write(json.dumps([str(folder), *arguments]) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait(60)


@pytest.fixture(scope="session")
def bases(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with right files of every kind."""
    root = tmp_path_factory.mktemp("right")
    for name in ("plain", "made", "draft", "tables", "run", "weights", "shots/media"):
        (root / name).mkdir(parents=True)
    clip = make_clip(0, 0, 9, 32, 48).video
    for name in ("plain", "shots/media"):
        write_image(clip[0], root / name / "first.png")
        write_image(clip[-1], root / name / "last.png")
    write_video(clip, root / "shots/media/clip.mp4", 8)
    remux(root / "shots/media/clip.mp4", root / "shots/media/clip.mkv")
    save_gif(clip, root / "shots/media/clip.gif")
    done = run(["generate", PROMPT, "--save-dir", ".", *SMALL], root / "made")
    assert done["status"] == 0, done["told"]
    done = run(["generate", PROMPT, "--save-dir", ".", "--draft", *SMALL], root / "draft")
    assert done["status"] == 0, done["told"]
    make_tables(root / "tables")
    done = run(["make a run", "outputs"], root / "run")
    assert done["status"] == 0, done["told"]
    embedded = find_embedded()
    shutil.copytree(embedded / "stdit3", root / "weights/stdit3")
    (root / "weights/weights").mkdir()
    done = run(["make weights", "weights"], root / "weights")
    assert done["status"] == 0, done["told"]
    exchanged.make_bases(root, run)
    return root


def find_embedded() -> Path:
    import opensora

    return Path(opensora.__file__).parent / "embedded"


def remux(source: Path, target: Path) -> None:
    import av

    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.size:
                packet.stream = stream
                new.mux(packet)


def save_gif(frames: Any, target: Path) -> None:
    from PIL import Image

    first, *rest = map(Image.fromarray, frames)
    first.save(target, save_all=True, append_images=rest, duration=100)


def make_tables(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"path": f"clips/{n}.mp4", "text": f"clip, {n}", "num_frames": 20 + n, "height": 144, "width": 256, "fps": 24.0}
        for n in range(12)
    ]
    lines = [",".join(rows[0])] + [",".join(f'"{cell}"' for cell in row.values()) for row in rows]
    (folder / "videos.csv").write_text("\n".join(lines) + "\n")
    (folder / "videos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "videos.parquet")
    (folder / "buckets.py").write_text(
        'model = dict(type="STDiT3")\ndataset = dict(type="VariableVideoTextDataset")\n'
        'bucket_config = {"144p": {1: (1.0, 2), 17: (1.0, 2)}}\n'
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
def test_wrong_inputs_end_in_one_line(name: str, run: Run, bases: Path, tmp_path: Path) -> None:
    kind, counts = KINDS[name], {"right": 0, "refused": 0, "seconds": 0.0, "megabytes": 0.0}
    share = max(NUMBER // len(KINDS), 1)

    @seed(SEED)
    @settings(
        max_examples=share, deadline=None, database=None, print_blob=False, suppress_health_check=[*HealthCheck],
    )  # fmt: skip
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        outside = tmp_path / "case"
        shutil.rmtree(outside, ignore_errors=True)
        folder = outside / "in"
        shutil.copytree(bases / kind.base, folder)
        arguments = kind.make(data, folder)
        done = run(arguments, folder)
        check(done, folder)
        counts["refused" if done["status"] else "right"] += 1
        for measure in ("seconds", "megabytes"):
            counts[measure] = max(counts[measure], done[measure])

    try_one()
    assert counts["right"] or share < ENOUGH, f"{name}: every file was refused, right ones too"
    print(f"{name}: {counts}")


def check(done: dict[str, Any], folder: Path) -> None:
    """Raises AssertionError unless a command ended as it should."""
    told = done["told"]
    assert "Traceback" not in told and "Traceback" not in done["printed"], told[-3000:]
    assert done["seconds"] <= SECONDS, f"{done['seconds']} s: {told[-500:]}"
    assert done["megabytes"] <= MEGABYTES, f"{done['megabytes']} MB: {told[-500:]}"
    assert done["status"] in (0, 1, 2), (done["status"], told[-1000:])
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    if done["status"] == 0:
        assert done["printed"] and not errors, told[-1000:]
    else:  # `different: ...` is what replay has to say of another video
        said = errors or [line for line in done["printed"].splitlines() if line.startswith("different: ")]
        assert len(said) == 1 and len(said[0]) <= CHARACTERS, told[-3000:]
    everything = [path for path in folder.parent.rglob("*") if folder not in (path, *path.parents)]
    assert not everything, f"outside of the folder: {everything}"
    litter = list(folder.rglob(".*"))
    assert not litter, f"left behind: {litter}"
