"""The stages against rendered footage with known truth: a few scenes of what benchmarks/curation_truth.py measures."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.curation_truth import change_scores, duplicate_score, fault_of, footage, scenes_of
from opensora.curation.clip import Clip
from opensora.curation.footage.folder import FootageSettings
from opensora.curation.stages.camera import Camera

SCENES = 40 if os.environ.get("OPENSORA_FULL") else 4


def test_stages_find_what_is_there(tmp_path: Path) -> None:
    films, faults = footage(tmp_path, FootageSettings(SCENES, seed=21, height=96, width=160))
    clips = [(line, scene, clip) for line in films for scene, clip in scenes_of(tmp_path, line)]
    scores = change_scores(tmp_path, films) | {"duplicates": duplicate_score(clips)}
    assert all(score.wrong + score.missed <= 0.02 * score.right for score in scores.values()), scores
    assert {fault_of(Clip(str(tmp_path / "faults" / line["path"]))) for line in faults} == {
        line["fault"] for line in faults
    }
    words = [(scene["cmotion"], Camera().process(clip)["cmotion"]) for _, scene, clip in clips]
    assert sum(true == found for true, found in words) >= 0.95 * len(words), words
