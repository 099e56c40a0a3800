"""How often the stages of curation are right, on rendered footage whose truth is known.

    python benchmarks/curation_truth.py --scenes 200 --seed 0

Prints a table of precision, recall and F1, and what was confused. `--folder` keeps the footage for the next run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora.curation.clip import Clip
from opensora.curation.footage.films import FPS
from opensora.curation.footage.folder import TRUTH, FootageSettings, write_faults, write_footage
from opensora.curation.stages.camera import Camera
from opensora.curation.stages.duplicates import Duplicates
from opensora.curation.stages.health import Health
from opensora.curation.stages.motion import Motion
from opensora.curation.stages.scenes import Scenes
from opensora.curation.stages.text import Text
from opensora.curation.tables import near_duplicates
from opensora.curation.tables.context import Context
from opensora.curation.tables.scratch import scratch
from opensora.curation.tables.stream import TableStream
from opensora.datasets.video import Span
from opensora.errors import MediaError

NEAR = 2  # frames between a cut and its truth
DIFFERENT = 1.1  # ratio of two speeds from which their order counts
FAULTS_FOLDER = "faults"


class Score(NamedTuple):
    """Right findings, wrong ones, and what was missed."""

    right: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float:
        return self.right / max(self.right + self.wrong, 1)

    @property
    def recall(self) -> float:
        return self.right / max(self.right + self.missed, 1)

    @property
    def f1(self) -> float:
        return 2 * self.right / max(2 * self.right + self.wrong + self.missed, 1)

    def row(self, name: str) -> str:
        """A row of a table in Markdown."""
        shares = f"{self.precision:.3f} | {self.recall:.3f} | {self.f1:.3f}"
        return f"| {name} | {self.right} | {self.wrong} | {self.missed} | {shares} |"


def measure(folder: Path, scenes: int, seed: int, size: tuple[int, int] = (144, 256)) -> Iterator[str]:
    """Renders footage into `folder`, unless it is there; yields a line for each thing that the stages find in it."""
    films, faults = footage(folder, FootageSettings(scenes, seed, *size))
    clips = [(line, scene, clip) for line in films for scene, clip in scenes_of(folder, line)]
    originals = [(scene, clip) for line, scene, clip in clips if line["copy_of"] is None]
    yield "| | right | wrong | missed | precision | recall | F1 |\n|---|---|---|---|---|---|---|"
    for name, score in change_scores(folder, films).items():
        yield score.row(name)
    yield duplicate_score(clips).row("near duplicates")
    yield text_score(originals).row("text")
    named = Counter((scene["cmotion"], Camera().process(clip)["cmotion"]) for _, scene, clip in clips)
    yield confusion("camera words", named)
    broken = Counter((line["fault"], fault_of(Clip(str(folder / FAULTS_FOLDER / line["path"])))) for line in faults)
    yield confusion("faults", broken + Counter(("none", fault_of(clip)) for _, clip in originals))
    yield f"pairs of motion scores in order: {motion_order([(speed(scene), clip) for scene, clip in originals]):.4f}"


def footage(folder: Path, settings: FootageSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of truth of films and of files with faults, rendered if need be."""
    if not (folder / TRUTH).exists():
        write_footage(folder, settings)
    films = [json.loads(line) for line in (folder / TRUTH).read_text(encoding="utf-8").splitlines()]
    target = folder / FAULTS_FOLDER
    if not (target / TRUTH).exists():
        target.mkdir(exist_ok=True)
        lines = write_faults(target, settings, max(settings.scenes // 8, 1))
        (target / TRUTH).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    faults = [json.loads(line) for line in (target / TRUTH).read_text(encoding="utf-8").splitlines()]
    return [line for line in films if line["fault"] is None], faults


def scenes_of(folder: Path, line: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Clip]]:
    """The scenes of a film, and their clips."""
    path = str(folder / line["path"])
    times = [*Clip(path).times(), None]
    for scene in line["scenes"]:
        start, end = times[scene["start"]], times[scene["end"]]
        yield scene, Clip(path, Span(start, end))  # type: ignore[arg-type]  # the last time is None


def change_scores(folder: Path, films: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """The scores of cuts, fades and dissolves: a found one counts if its frames meet those of a true one."""
    totals: Counter[tuple[str, str]] = Counter()
    for line in films:
        found = Scenes().changes(Clip(str(folder / line["path"])))
        for kind in ("cut", "fade", "dissolve"):
            left = [change for change in found if change.kind == kind]
            for true in (one for one in line["transitions"] if one["kind"].split()[0] == kind):
                near = [one for one in left if one.start <= true["end"] + NEAR and true["start"] <= one.end + NEAR]
                totals[kind, "right" if near else "missed"] += 1
                if near:
                    left.remove(near[0])
            totals[kind, "wrong"] += len(left)
    return {
        kind: Score(*(totals[kind, name] for name in Score._fields)) for kind in ("cut", "fade", "dissolve")
    }  # fmt: skip


def duplicate_score(clips: Sequence[tuple[dict[str, Any], dict[str, Any], Clip]]) -> Score:
    """The score of near duplicates among the scenes of films and of their copies."""
    rows, truth = [], {}
    for line, scene, clip in clips:
        number = line["scenes"].index(scene)
        rows.append([f"{line['path']}:{number}", Duplicates().process(clip)["phash"], line["copy_of"] is None])
        if line["copy_of"]:
            truth[f"{line['path']}:{number}"] = f"{line['copy_of']}:{number}"
    table = TableStream("footage", ("path", "phash", "num_frames"), rows)  # originals first
    with scratch() as store:
        marked = [(row[0], row[-1]) for row in near_duplicates.mark(table, Context(store)).rows]
    found = {name: of for name, of in marked if of}
    right = sum(truth.get(str(name)) == of for name, of in found.items())
    return Score(right, len(found) - right, len(truth) - right)


def text_score(clips: Sequence[tuple[dict[str, Any], Clip]]) -> Score:
    """The score of scenes with a text, by their middle frames."""
    seen = Counter((bool(scene["text"]), bool(Text(samples=1).process(clip)["ocr"])) for scene, clip in clips)
    return Score(seen[True, True], seen[False, True], seen[True, False])


def fault_of(clip: Clip) -> str:
    """The fault that the stage health sees in a clip."""
    try:
        found = Health().process(clip)
    except MediaError:
        return "truncated"
    if found["bars"]:
        top, left, *_ = map(int, found["bars"].split())
        return "letterbox" if top > left else "pillarbox"
    if found["black"] > 0.05:
        return "black"
    if found["frozen"] > 0.4:
        return "frozen"
    return "fps" if found["real_fps"] < 0.75 * clip.frames_per_second() else "none"


def speed(scene: dict[str, Any]) -> float:
    """The mean absolute displacement of the picture by the camera, per second, in widths."""
    right, down, growth, roll = scene["move"]
    y, x = np.mgrid[-0.5:0.5:32j, -0.5:0.5:32j] * [[[9 / 16]], [[1]]]
    turn = np.radians(roll)
    return float(np.abs([growth * x + turn * y - right, growth * y - turn * x - down]).mean())


def motion_order(speeds: Sequence[tuple[float, Clip]]) -> float:
    """The share of pairs of scenes with clearly different speeds whose motion scores have the same order."""
    scored = [(true, float(Motion().process(clip)["flow"])) for true, clip in speeds]
    order = [
        (one[0] > other[0]) == (one[1] > other[1])
        for one, other in combinations(scored, 2)
        if max(one[0], other[0]) > DIFFERENT * min(one[0], other[0])
    ]
    return float(np.mean(order))


def confusion(title: str, found: Counter[tuple[str, str]]) -> str:
    """The share that is right, and how often each truth was taken for what."""
    right = sum(count for (true, named), count in found.items() if true == named) / found.total()
    lines = [f"  {true} -> {named}: {count}" for (true, named), count in sorted(found.items())]
    return "\n".join([f"{title}: {right:.3f} of {found.total()}", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where footage is kept; rendered if it is empty")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(f"{args.scenes} scenes, seed {args.seed}", f"(frames at {FPS} fps)")
        for line in measure(args.folder or Path(temporary), args.scenes, args.seed):
            print(line, flush=True)


if __name__ == "__main__":
    main()
