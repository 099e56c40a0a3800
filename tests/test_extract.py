"""Videos and captions encoded once: what is written, what a resumed run does, what is noticed as stale."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opensora.checkpoints import builder
from opensora.datasets.datasets import VariableVideoTextDataset, VideoTextDataset, to_model_range
from opensora.errors import ConfigError, MediaError
from opensora.training.feature_extraction import extract as module
from opensora.training.feature_extraction.extract import ExtractSettings, extract
from tests.features import BUCKETS, TextEncoder, Vae, contents, make_rows, settings, use, write_rows
from tests.full import count, some
from tests.ranks import fork_server


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    return make_rows(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def table(clips: list[tuple], tmp_path: Path) -> Path:
    return write_rows(tmp_path / "table.csv", clips)


@pytest.fixture(scope="module")
def finished(clips: list[tuple], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        use(patch)
        return extract(settings(write_rows(folder / "table.csv", clips), folder / "features", crops=2))


@pytest.fixture
def whole(finished: Path, tmp_path: Path) -> Path:
    """The features of an uninterrupted run of one rank."""
    return shutil.copytree(finished, tmp_path / "whole")


def run(table: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Vae, TextEncoder]:
    """Encodes with new encoders, which know afterwards what they were given."""
    hashes = {name: changes.pop(f"{name}_hash") for name in ("vae", "text_encoder") if f"{name}_hash" in changes}
    vae, text = changes.pop("by", None) or Vae(), TextEncoder()
    text.model_max_length = changes.pop("max_length", text.model_max_length)
    vae.micro_frame_size = changes.pop("micro_frame_size", None)
    with monkeypatch.context() as patch:
        use(patch, vae, text, hashes)
        extract(settings(table, folder, crops=2, **changes))
    return vae, text


def test_latents_are_those_of_the_epoch(whole: Path, table: Path) -> None:
    plan = json.loads((whole / "plan.json").read_text())
    dataset, vae, seen = VariableVideoTextDataset(table, seed=7, as_uint8=True), Vae(), set()
    for part in plan["latents"]:
        shard = load_file(whole / part["file"])
        dataset.set_epoch(part["crop"])
        for place, row in enumerate(shard["row"].tolist()):
            sample = dataset["-".join(map(str, (row, *part["size"])))]
            video = to_model_range(sample["video"])[None]
            assert torch.equal(shard["latents"][place], vae.encode(video, sample=False)[0].half())
            if part["size"][0] > 1:
                last = vae.encode(video[:, :, -1:], sample=False)[0, :, 0]
                assert torch.equal(shard["last"][place], last.half())
            assert shard["fps"][place] == sample["fps"]
            seen.add((part["crop"], row))
        assert len(shard["row"]) <= 3 and shard["latents"].dtype == torch.float16
    assert {crop for crop, _ in seen} == {0, 1} and len(seen) > 12
    assert len({tuple(part["bucket"]) for part in plan["latents"]}) > 4


def test_texts_are_kept_without_padding(whole: Path, clips: list[tuple]) -> None:
    for file in sorted((whole / "text").glob("*.safetensors")):
        shard = load_file(file)
        texts = shard["text"].split(shard["length"].tolist())
        for row, text in zip(shard["row"].tolist(), texts, strict=True):
            letters = "".join(chr(round(float(code) * 128)) for code in text[:, 0])
            assert letters == clips[row][1]


def test_nothing_is_encoded_twice(whole: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(whole)
    vae, text = run(table, whole, monkeypatch)
    assert vae.clips == 0 and text.texts == []
    assert contents(whole) == before


@pytest.mark.parametrize("stop_after", [0, 4, 11])
@some(2)
def test_interrupted_and_resumed(
    stop_after: int, whole: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        run(table, folder, monkeypatch, by=Vae(stop_after))
    part, complete = contents(folder), contents(whole)
    assert set(part) < set(complete)
    _, text = run(table, folder, monkeypatch)
    assert contents(folder) == complete and text.texts == []
    assert all(contents(folder)[name] == made for name, made in part.items())


def slowly(table: Path, folder: Path) -> None:
    """What is killed: the same work, with pauses. The last bits of scaled frames depend on the number of threads."""
    torch.set_num_threads(1)
    fast = Vae.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vae, "encode", lambda *args, **more: (time.sleep(0.02), fast(*args, **more))[1])
        use(patch)
        extract(settings(table, folder, crops=2))


def num_files(folder: Path) -> int:
    """How many files a folder has at a moment in which others may be written, renamed and deleted there."""
    return sum(len(files) for _, _, files in os.walk(folder))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_killed_at_any_moment(table: Path, tmp_path: Path) -> None:
    context = fork_server()

    def start(folder: Path) -> multiprocessing.Process:
        process = context.Process(target=slowly, args=(table, folder))
        process.start()
        return process

    folder, whole = tmp_path / "killed", tmp_path / "uninterrupted"
    start(whole).join(250)
    done, kills = 0, 0
    for _ in range(count(1, 30)):
        process = start(folder)
        deadline, before = time.monotonic() + 120, num_files(folder)
        while process.is_alive() and num_files(folder) < before + 1 + kills % 3 and time.monotonic() < deadline:
            time.sleep(0.003)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
        held = {name: made for name, made in contents(folder).items() if not Path(name).name.startswith(".")}
        assert held.items() <= contents(whole).items()
        assert len(held) >= done
        done = len(held)
    assert kills >= count(1, 4)
    start(folder).join(250)
    left = {name for name in contents(folder) if Path(name).name.startswith(".")}
    assert not left
    assert contents(folder) == contents(whole)


def test_ranks_divide_the_shards(whole: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, clips, texts = tmp_path / "ranks", [], []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        vae, text = run(table, folder, monkeypatch)
        clips.append(vae.clips)
        texts += text.texts
    assert contents(folder) == contents(whole)
    assert len(texts) == len(set(texts)) == 12 and min(clips) > 0


def test_rows_at_the_end_leave_whole_shards_alone(
    whole: Path, clips: list[tuple], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name for name in contents(whole) if name.endswith("safetensors")}
    write_rows(table, [*clips, *make_rows(tmp_path / "more", 3, first=12)])
    vae, text = run(table, whole, monkeypatch)
    assert before <= set(contents(whole)) and vae.clips < 12
    assert sorted(text.texts) == ["clip 12", "clip 13!", "clip 14!!"]
    folder = tmp_path / "new"
    run(table, folder, monkeypatch)
    for part in json.loads((whole / "plan.json").read_text())["latents"]:
        assert contents(folder)[part["file"]] == contents(whole)[part["file"]]


def test_more_crops_keep_the_first(whole: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: made for name, made in contents(whole).items() if name.endswith("safetensors")}
    use(monkeypatch)
    extract(settings(table, whole, crops=3))
    after = contents(whole)
    assert before.items() <= after.items() and any(name.startswith("latents/crop2") for name in after)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"vae_hash": "other"}, "vae"),
        ({"text_encoder_hash": "other"}, "text_encoder"),
        ({"dtype": "bf16"}, "dtype"),
        ({"save_dtype": "bf16"}, "save_dtype"),
        ({"seed": 8}, "seed"),
        ({"bucket_config": {"144p": {1: (1.0, 2)}}}, "sizes"),
        ({"bucket_config": {**BUCKETS, "240p": {9: (0.5, 3)}}}, "sizes"),
        ({"max_length": 20}, "model_max_length"),
        ({"micro_frame_size": 17}, "micro_frame_size"),
    ],
)
def test_features_of_another_configuration_are_refused(
    change: dict, name: str, whole: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(whole)
    with pytest.raises(ConfigError, match=f"was encoded with another {name}; remove it or name another"):
        run(table, whole, monkeypatch, **change)
    assert contents(whole) == before


def test_other_batch_sizes_are_no_other_features(whole: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {name: {frames: (keep, 5) for frames, (keep, _) in part.items()} for name, part in BUCKETS.items()}
    vae, _ = run(table, whole, monkeypatch, bucket_config=more)
    assert vae.clips == 0
    assert {part["batch_size"] for part in json.loads((whole / "plan.json").read_text())["latents"]} == {5}


def test_changed_files_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(tmp_path / "own")
    table, folder = write_rows(tmp_path / "table.csv", rows), tmp_path / "features"
    run(table, folder, monkeypatch)
    os.utime(rows[0][0])
    vae, _ = run(table, folder, monkeypatch)
    assert vae.clips == 0, "the same content with another time is no change"
    before = contents(folder)
    make_rows(tmp_path / "own", 1, seed=1)
    with pytest.raises(ConfigError, match=r"stale, the first because .*0.mp4 has changed .* replace_stale=True"):
        run(table, folder, monkeypatch)
    assert contents(folder) == before
    vae, text = run(table, folder, monkeypatch, replace_stale=True)
    changed = {name for name, made in contents(folder).items() if before[name] != made}
    assert 0 < vae.clips <= 6 and text.texts == []
    assert 0 < len(changed) <= 2 and all(name.split("/")[-1].startswith("000000000-") for name in changed)
    run(table, folder, monkeypatch)


def test_changed_captions_are_noticed(
    whole: Path, clips: list[tuple], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(table, [*clips[:5], (clips[5][0], "new", *clips[5][2:]), *clips[6:]])
    with pytest.raises(ConfigError, match="the caption of row 5 has changed"):
        run(table, whole, monkeypatch)
    vae, text = run(table, whole, monkeypatch, replace_stale=True)
    assert "new" in text.texts and len(text.texts) == 3 and vae.clips == 0


def test_broken_files_are_left_out_and_listed(
    clips: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [*clips[:3], (tmp_path / "broken.mp4", "never seen", *clips[3][2:]), *clips[4:]]
    table, folder = write_rows(tmp_path / "table.csv", rows), tmp_path / "features"
    run(table, folder, monkeypatch, bucket_config={"144p": {1: (1.0, 4), 9: (1.0, 4)}})
    listed = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["row"], Path(one["path"]).name) for one in listed] == [(3, "broken.mp4")]
    shards = [load_file(folder / part["file"]) for part in json.loads((folder / "plan.json").read_text())["latents"]]
    assert all(len(shard["row"]) == len(shard["latents"]) == len(shard["fps"]) for shard in shards)
    assert sorted({row for shard in shards for row in shard["row"].tolist()}) == [*range(3), *range(4, 12)]
    vae, _ = run(table, folder, monkeypatch, bucket_config={"144p": {1: (1.0, 4), 9: (1.0, 4)}})
    assert vae.clips == 0


def test_too_many_broken_files_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(tmp_path / f"{number}.mp4", "broken", 20, 144, 256) for number in range(4)]
    [row[0].write_bytes(b"no video") for row in rows]
    with pytest.raises(MediaError, match="cannot be read, over the limit"):
        run(write_rows(tmp_path / "table.csv", rows), tmp_path / "features", monkeypatch)


@pytest.mark.parametrize(
    ("there", "texts", "changes", "words"),
    [
        (0, ["x"] * 4, {}, "none of its 4 files exists"),
        (2, ["x"] * 4, {}, "2 of 4 files do not exist: .*over the limit of 1"),
        (1, ["x"] * 4, {"start_index": 1}, "none of its 3 files exists"),
        (4, [""] * 4, {}, "4 of 4 texts are empty"),
        (4, ["x", " ", "x", ""], {}, "2 of 4 texts are empty: .*over the limit of 1"),
        (4, ["x", "x", "x", ""], {"start_index": 3}, "1 of 1 texts are empty"),
    ],
)
def test_what_a_table_lacks_is_told_before_anything_is_made(
    there: int, texts: list[str], changes: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(tmp_path / f"{number}.mp4", text, 20, 144, 256) for number, text in enumerate(texts)]
    [row[0].touch() for row in rows[:there]]
    with pytest.raises((ConfigError, MediaError), match=words):
        run(write_rows(tmp_path / "table.csv", rows), tmp_path / "features", monkeypatch, **changes)
    assert not (tmp_path / "features").exists()


def test_one_size_without_buckets(clips: list[tuple], table: Path, tmp_path: Path, monkeypatch) -> None:
    section = {"type": "VideoTextDataset", "data_path": str(table), "num_frames": 9, "image_size": (64, 64)}
    run(table, tmp_path / "fixed", monkeypatch, dataset=section, bucket_config=None, batch_size=2, save_dtype="fp32")
    [folder] = (tmp_path / "fixed" / "latents" / "crop1").iterdir()
    dataset = VideoTextDataset(**{k: v for k, v in section.items() if k != "type"}, seed=7, as_uint8=True)
    dataset.set_epoch(1)
    assert folder.name == "fixed_9f_64x64"
    rows = []
    for file in sorted(folder.iterdir()):
        shard = load_file(file)
        for row, latents in zip(shard["row"].tolist(), shard["latents"], strict=True):
            expected = Vae().encode(to_model_range(dataset[row]["video"])[None], sample=False)[0]
            torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0)
            rows.append(row)
    assert rows == list(range(12))


def test_parts_can_be_left_out(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, _ = run(table, tmp_path / "texts", monkeypatch, save_video_features=False)
    assert vae.clips == 0 and not (tmp_path / "texts" / "latents").exists()
    _, text = run(table, tmp_path / "videos", monkeypatch, save_text_features=False, save_last_frames=False)
    assert text.texts == [] and not (tmp_path / "videos" / "text").exists()
    shards = [load_file(file) for file in (tmp_path / "videos" / "latents").rglob("*.safetensors")]
    assert shards and not any("last" in shard for shard in shards)
    run(table, tmp_path / "some", monkeypatch, start_index=2, end_index=6, bucket_config={"144p": {1: (1.0, 1)}})
    [only] = (tmp_path / "some" / "latents" / "crop0").rglob("*.safetensors")
    assert load_file(only)["row"].tolist() == [4]


def test_numbers_that_do_not_fit_are_refused(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"beyond what fp16 can hold.*save_dtype='bf16'"):
        run(table, tmp_path / "features", monkeypatch, by=Vae(factor=1e6))
    run(table, tmp_path / "bf16", monkeypatch, by=Vae(factor=1e6), save_dtype="bf16")


def test_shards_stay_moderate(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 2**15)  # two clips of 9 frames at 144p
    folder = tmp_path / "features"
    run(table, folder, monkeypatch, bin_size=100)
    for file in (folder / "latents").rglob("*.safetensors"):
        tensors = load_file(file)
        held = tensors["latents"].nbytes
        assert held <= 2**15 or len(tensors["row"]) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dataset": None}, "a section dataset"),
        ({"dataset": {"type": "Clips"}}, "dataset type 'Clips' is not known"),
        ({"dataset": {"type": "VideoTextDataset"}}, "go together"),
        ({"bucket_config": None}, "go together"),
        ({"vae": None}, "a section vae"),
        ({"text_encoder": None}, "a section text_encoder"),
        ({"bucket_config": {"2k": {51: (1.0, 1)}}}, "none of the 12 rows has a bucket"),
        ({"start_index": 12}, "no rows from 12 on"),
    ],
)
def test_mistakes_are_told(
    changes: dict, problem: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = changes.get("dataset")
    if section:
        changes = {**changes, "dataset": {**section, "data_path": str(table)}}
    with pytest.raises(ConfigError, match=problem):
        run(table, tmp_path / "features", monkeypatch, **changes)
    assert not (tmp_path / "features").exists()


def test_captions_are_needed_for_texts(tmp_path: Path, clips: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "bare.csv"
    table.write_text("path,num_frames,height,width\n" + "\n".join(f"{r[0]},{r[2]},{r[3]},{r[4]}" for r in clips))
    with pytest.raises(ConfigError, match=r"no column text.*save_text_features=False"):
        run(table, tmp_path / "features", monkeypatch)
    run(table, tmp_path / "features", monkeypatch, save_text_features=False)


@pytest.mark.parametrize("changes", [{"save_dtype": "int8"}, {"crops": 0}, {"bin_size": 0},
                                     {"save_text_features": False, "save_video_features": False}])  # fmt: skip
def test_settings_are_checked(changes: dict) -> None:
    with pytest.raises(ConfigError):
        ExtractSettings(**changes)


def test_published_configuration(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import runpy

    use(monkeypatch)
    asked: list[Any] = []
    load = builder.load_component
    monkeypatch.setattr(builder, "load_component", lambda *args: (asked.append(args), load(*args))[1])
    script = Path(__file__).parents[1] / "scripts" / "misc" / "extract_feat.py"
    flags = ["--data-path", str(table), "--save-dir", str(tmp_path / "f"), "--device", "cpu"]
    options = ["--cfg-options", "num_workers=2", "crops=1"]
    monkeypatch.setattr(sys, "argv", ["extract_feat.py", "opensora-v1-2/misc/extract", *flags, *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0 and capsys.readouterr().out.strip() == str(tmp_path / "f")
    assert {args[0]["type"] for args in asked} == {"OpenSoraVAE_V1_2", "t5"}
    plan = json.loads((tmp_path / "f" / "plan.json").read_text())
    assert plan["latents"] and plan["text"]
