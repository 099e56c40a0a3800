"""Prompt handling equals the recorded tables, but for the quirks P2, P4 and P5, which are mended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensora.errors import ConfigError
from opensora.models.text_encoder.cleaning import preprocess
from opensora.pipeline import prompts
from opensora.pipeline.output_names import save_path_name
from tests.parity.cases import discover

CASES = [case for case in discover("data") if "extract_json" in case.facts or "multi_segment" in case.facts]
TABLES = {"load_prompts", "save_path_name", "append_score", "extract_json", "multi_segment", "merge_prompt"}
TABLES |= {"extract_prompts_loop_batch", "pipeline"}


def rows(table: str) -> list[dict[str, Any]]:
    return [row for case in CASES for row in case.facts.get(table, [])]


def same_or_refused(row: dict[str, Any], function: Callable[[], Any]) -> None:
    """`function` gives row["out"], or refuses where the row records an error."""
    if "error" in row:
        with pytest.raises(ConfigError):
            function()
    else:
        assert function() == row["out"], row


def test_found() -> None:
    assert CASES


def test_kinds_are_known() -> None:
    assert {table for case in CASES for table in case.facts} <= TABLES | {"version", "v1.1.0"}
    older = [case.facts.get("v1.1.0", {}) for case in CASES]
    assert {table for tables in older for table in tables} <= {"per_loop_prompts", "extract_json"}


def test_load_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    for row in rows("load_prompts"):
        file.write_bytes(row["file_content"].encode())
        assert prompts.load_prompts(file, row["start"], row["end"]) == row["out"], row


def test_save_path_name() -> None:
    for row in rows("save_path_name"):
        folder = Path(row["args"]["save_dir"])
        if "out" in row and (Path(row["out"]).parent != folder or len(Path(row["out"]).name.encode()) > 200):
            found = Path(save_path_name(**row["args"]))
            assert found.parent == folder, row  # P4: the name stays inside
            assert len(found.name.encode()) <= 200
        else:
            same_or_refused(row, lambda row=row: save_path_name(**row["args"]))


def test_append_score() -> None:
    for row in rows("append_score"):
        same_or_refused(row, lambda row=row: [prompts.append_score(text, **row["args"]) for text in row["prompts"]])


def is_mended(prompt: str) -> bool:
    """P2: refused once for a second brace or for a tail, although the last object is whole and names known keys."""
    try:
        prompts.split_json(prompt)
    except ConfigError:
        return False
    return prompt.count("{") > 1 or not prompt.rstrip().endswith("}")


def extract_json(
    texts: list[str], references: list[str], mask_strategies: list[str]
) -> tuple[list[str], list[str], list[str]]:
    split = [prompts.split_json(text) for text in texts]
    references = [info.get("reference_path", given) for (_, info), given in zip(split, references, strict=True)]
    masks = [info.get("mask_strategy", given) for (_, info), given in zip(split, mask_strategies, strict=True)]
    return [text for text, _ in split], references, masks


def test_extract_json() -> None:
    for row in rows("extract_json"):
        arguments = (row["prompts"], row["reference"], row["mask_strategy"])
        told = [one for key in ("reference", "mask_strategy") for one in row.get("out", {}).get(key, [])]
        if any(not isinstance(one, str) for one in told):  # P5: what is no text would fail later, or place nothing
            with pytest.raises(ConfigError, match="must be a string"):
                extract_json(*arguments)
        elif "out" in row:
            found = extract_json(*arguments)
            assert found == tuple(row["out"][key] for key in ("prompts", "reference", "mask_strategy")), row
        elif not any(is_mended(prompt) for prompt in row["prompts"]):
            with pytest.raises(ConfigError):
                extract_json(*arguments)


def test_multi_segment() -> None:
    for row in rows("multi_segment"):
        split = row["split"]
        if "error" in split:
            same_or_refused(split, lambda row=row: prompts.split_segments(row["prompt"]))
        else:
            texts, loops = prompts.split_segments(row["prompt"])
            assert (texts, loops) == (split["segments"], split["loop_indices"]), row
            same_or_refused(row["merged"], lambda texts=texts, loops=loops: prompts.merge_segments(texts, loops))
        for answer in row["per_loop"]:
            same_or_refused(answer, lambda row=row, answer=answer: prompts.text_of_loop(row["prompt"], answer["loop"]))


def test_merge_prompt() -> None:
    for row in rows("merge_prompt"):
        same_or_refused(row, lambda row=row: prompts.merge_segments(row["segments"], row["loop_indices"]))


def test_texts_of_a_batch() -> None:
    for row in rows("extract_prompts_loop_batch"):
        texts = row["prompts"]
        same_or_refused(row, lambda row=row, texts=texts: [prompts.text_of_loop(text, row["loop"]) for text in texts])


def test_pipeline() -> None:
    for row in rows("pipeline"):
        scores = {name: row[name] for name in ("aes", "flow", "camera_motion")}

        def run(row: dict[str, Any] = row, scores: dict[str, Any] = scores) -> dict[str, Any]:
            (text,), _, _ = extract_json([row["prompt"]], [""], [""])
            final = prompts.prepare(text, **scores)
            return {"final": final, "per_loop": [prompts.text_of_loop(final, loop) for loop in range(row["loops"])]}

        same_or_refused(row, run)


def test_older_texts_per_loop() -> None:
    """v1.1.0 also refused texts beyond the last loop; those it accepted come out the same."""
    older = [row for case in CASES for row in case.facts.get("v1.1.0", {}).get("per_loop_prompts", [])]
    for row in older:
        if row.get("error") == "AssertionError":
            continue

        def run(row: dict[str, Any] = row) -> list[str]:
            return [preprocess(prompts.text_of_loop(row["prompt"], loop)) for loop in range(row["num_loop"])]

        same_or_refused(row, run)


def test_older_json() -> None:
    """v1.1.0 took any key, and lists; where it found known keys, the answer is the same."""
    for row in [row for case in CASES for row in case.facts.get("v1.1.0", {}).get("extract_json", [])]:
        info = row.get("out", {}).get("info", [])
        if isinstance(info, dict) and set(info) <= set(prompts.JSON_KEYS):
            assert prompts.split_json(row["prompt"]) == (row["out"]["prompt"], info), row
