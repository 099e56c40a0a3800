"""The data of a run: dealt to ranks, read ahead, taken from tables, and what training refuses before it begins."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opensora import registry
from opensora.config import read_config
from opensora.config.settings import TrainSettings, check_trainable
from opensora.datasets.video import write_image, write_video
from opensora.distributed.process_group import RankLayout
from opensora.errors import ConfigError, MediaError
from opensora.training.data.batch import TrainingBatch
from opensora.training.data.diffusion_data import make_data
from opensora.training.data.held_out import encode_held_out
from opensora.training.data.loader import DataPosition, PrefetchLoader
from opensora.training.data.sources import read_batch, table_source
from opensora.training.diffusion import build_model, check_training, train
from opensora.training.feature_extraction.extract import ExtractSettings, extract
from opensora.training.losses.diffusion import DiffusionLoss
from opensora.training.step import step_generator
from tests.full import FULL, some
from tests.test_encoders import make_clip_folder
from tests.tiny import TINY_STDIT3, make_tiny_t5, make_tiny_vae
from tests.zoo import SMALL, make_vae

CPU = torch.device("cpu")
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("opensora*/train/*.py"))
CONFIGS += sorted(path for kind in ("dit", "latte", "pixart") for path in CONFIGS[0].parents[2].glob(f"{kind}/train/*"))
MODELS = ("STDiT", "STDiT2", "STDiT3", "PixArt", "PixArtMS", "PixArt-Sigma", "DiT", "Latte")
SCHEDULERS = ("rflow", "iddpm", "iddpm-speed")
STEPS = 5  # an epoch and a bit
BUCKETS = {"144p": {1: (1.0, 3), 17: (1.0, 2)}}


class Letters:
    """Epoch e has `lengths[e]` batches; later ones as many as the last."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.read = lengths, []

    def count(self, epoch: int) -> int:
        return self.lengths[min(epoch, len(self.lengths) - 1)]

    def reader(self, epoch: int, index: int) -> Any:
        return lambda: self.read.append((epoch, index)) or (epoch, index)


class TestPrefetchLoader:
    @pytest.mark.parametrize("workers", [0, 3])
    def test_ranks_take_turns_over_the_ends_of_epochs(self, workers: int) -> None:
        loaders = [PrefetchLoader(Letters(3, 0, 4), rank, 2, workers) for rank in range(2)]
        served = [next(loaders[turn % 2]) for turn in range(10)]
        assert served == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1), (3, 2)]
        assert loaders[0].position == loaders[1].position == DataPosition(3, 3)
        [loader.close() for loader in loaders]

    def test_other_numbers_of_ranks_serve_the_rest_of_an_epoch_once(self) -> None:
        place, served = DataPosition(), Counter()
        for ranks, steps in ((2, 7), (1, 8), (3, 20)):
            loaders = [PrefetchLoader(Letters(67), rank, ranks, workers=2) for rank in range(ranks)]
            for loader in loaders:
                loader.go_to(place)
                served.update(next(loader) for _ in range(steps))
                loader.close()
            place = loaders[0].position
        first = {index: times for (epoch, index), times in served.items() if epoch == 0}
        assert first == dict.fromkeys(range(67), 1) and set(served.values()) == {1}

    def test_nothing_is_read_before_its_time(self) -> None:
        source = Letters(9)
        loader = PrefetchLoader(source)
        assert next(loader) == (0, 0) and source.read == [(0, 0)] and loader.waited > 0

    def test_what_fails_is_raised_where_it_is_due(self) -> None:
        class Broken(Letters):
            def reader(self, epoch: int, index: int) -> Any:
                return super().reader(epoch, index) if index < 2 else lambda: 1 / 0

        loader = PrefetchLoader(Broken(5), workers=2)
        assert [next(loader), next(loader)] == [(0, 0), (0, 1)]
        with pytest.raises(ZeroDivisionError):
            next(loader)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of videos, images and a broken file, and tiny encoders."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    for number in range(6):
        frames = rng.integers(0, 255, (20, 16, 24, 3), dtype=np.uint8)
        rows.append((write_video(frames, folder / f"{number}.mp4", 8), f"video {number}", 20, 192, 192))
        rows.append((write_image(frames[0], folder / f"{number}.png"), f"image {number}", 1, 192, 192))
    (folder / "broken.mp4").write_bytes(b"nothing")
    rows.append((folder / "broken.mp4", "broken", 20, 192, 192))
    for name, part in (("table", rows), ("whole", rows[:-1])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "text", "num_frames", "height", "width"), *part])
    with (folder / "plain.csv").open("w", newline="") as file:  # as in 1.0
        csv.writer(file).writerows([row[:2] for row in rows[:-1]])
    make_tiny_vae(folder / "vae"), make_tiny_t5(folder / "t5"), make_vae(folder / "frames")
    make_clip_folder(folder / "clip")
    return folder


def settings(files: Path, table: str = "table", **changes: Any) -> TrainSettings:
    section = dict(type="VideoTextDataset", data_path=str(files / f"{table}.csv"), num_frames=8, image_size=(16, 16))
    base = dict(
        dataset=section, model=dict(type="STDiT3", **TINY_STDIT3), scheduler=dict(type="rflow"), batch_size=2,
        vae=dict(type="VideoAutoencoderPipeline", from_pretrained=str(files / "vae")),
        text_encoder=dict(type="t5", from_pretrained=str(files / "t5"), model_max_length=32),
        dtype="fp32", device="cpu", num_workers=2, log_every=1, max_steps=3, lr=1e-3,
    )  # fmt: skip
    return TrainSettings(**{**base, **changes})


def variable(files: Path, table: str = "table", **changes: Any) -> TrainSettings:
    section = dict(type="VariableVideoTextDataset", data_path=str(files / f"{table}.csv"))
    return settings(files, **{"dataset": section, "bucket_config": BUCKETS, "batch_size": None, **changes})


class Small:
    """A table of `count` tiny images, with texts, in a folder of its own."""

    def __init__(self, folder: Path, files: Path, count: int = 8) -> None:
        self.folder, self.files, self.count, rng = folder, files, count, np.random.default_rng(0)
        for number in range(count):
            write_image(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), folder / f"{number}.png")
        self.write()

    def write(self, text: str = "image 2") -> None:
        texts = [text if number == 2 else f"image {number}" for number in range(self.count)]
        with (self.folder / "table.csv").open("w", newline="") as file:
            rows = [(self.folder / f"{number}.png", text) for number, text in enumerate(texts)]
            csv.writer(file).writerows([("path", "text"), *rows])

    def settings(self, **changes: Any) -> TrainSettings:
        section = dict(type="VideoTextDataset", data_path=str(self.folder / "table.csv"), num_frames=1)
        base = dict(dataset={**section, "image_size": (16, 16)}, batch_size=1, num_workers=0, max_steps=1)
        return settings(self.files, **{**base, "outputs": str(self.folder), "tensorboard": False, **changes})

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in next(self.folder.glob("0*/log.jsonl")).read_text().splitlines()]


class TestTables:
    def test_batches_are_a_function_of_their_place(self, files: Path) -> None:
        one, other = (table_source(settings(files, "whole"), 1) for _ in range(2))
        assert one.count(0) == 6
        last = one.reader(1, 3)()
        [one.reader(0, index)() for index in range(2)]
        again = other.reader(1, 3)()
        assert last["names"] == again["names"] and torch.equal(last["video"], again["video"])
        assert last["video"].dtype == torch.uint8 and last["video"].shape == (2, 3, 8, 16, 16)
        order = [[one.reader(epoch, index)()["names"] for index in range(6)] for epoch in range(2)]
        assert order[0] != order[1]

    def test_buckets_have_one_size_a_batch(self, files: Path) -> None:
        source = table_source(variable(files), 2)
        sizes = Counter(source.reader(0, index)()["size"] for index in range(source.count(0)))
        assert sizes == {(1, 192, 192): 2, (17, 192, 192): 3}
        batches = [source.reader(0, index)() for index in range(source.count(0))]
        assert all(batch["video"].shape[2:] == batch["size"] for batch in batches)
        assert {fps for batch in batches for fps in batch["fps"].tolist()} == {8, 120}

    def test_broken_files_are_left_out_and_an_empty_batch_weighs_nothing(self, files: Path) -> None:
        source = table_source(settings(files), 1)
        batch = read_batch(source.dataset, [0, 12], (8, 16, 16))
        assert len(batch["video"]) == len(batch["names"]) == 1 and batch["unreadable"][0].row == 12
        empty = read_batch(source.dataset, [12], (8, 16, 16))
        assert empty["weight"] == 0 and empty["names"] == [] and not empty["video"].any() and empty["text"] == [""]

    def test_no_steps_are_refused_with_the_reason(self, files: Path) -> None:
        with pytest.raises(ConfigError, match=r"13 rows of .* do not fill one batch of 5 for each of 3 ranks"):
            table_source(settings(files, batch_size=5), 3)
        with pytest.raises(ConfigError, match="no steps: no bucket has the rows of one batch; the fullest, 144p 17f"):
            table_source(variable(files, bucket_config={"144p": {17: (1.0, 9)}}), 1)
        with pytest.raises(ConfigError, match="VariableVideoTextDataset needs a bucket_config"):
            table_source(variable(files, bucket_config=None), 1)
        with pytest.raises(ConfigError, match="VideoTextDataset needs a batch_size"):
            table_source(settings(files, batch_size=None), 1)

    def test_held_out_clips_are_never_trained_on(self, files: Path, tmp_path: Path) -> None:
        rows = [(tmp_path / f"{number}.png", "", 1, 192, 192) for number in range(40)]
        [path.touch() for path, *_ in rows]
        with (tmp_path / "many.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "text", "num_frames", "height", "width"), *rows])
        for make in (settings, variable):
            source = table_source(make(tmp_path, "many", validate_every=1, validation_samples=3), 1)
            held = {source.dataset.name(key) for one in source.held_out for key in one.keys}
            assert len(held) == 3
            trained = {
                source.dataset.name(key) for epoch in range(3) for keys, _ in source.batches(epoch) for key in keys
            }
            assert not held & trained and len(trained) > 30
            assert not table_source(make(tmp_path, "many"), 1).held_out


class TestWhatIsSaid:
    """What a run will not do is said before it begins."""

    def test_without_validation(self, files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        source = table_source(Small(tmp_path, files, 9).settings(validate_every=1), 1)
        assert not source.held_out and "no validation of 1x16x16 (9 rows): one clip in 10 is held out" in caplog.text

    @pytest.mark.parametrize(
        ("rows", "without", "untrained"),
        [
            ({1: 12, 20: 9}, ["144p 17f 1.00 (9 rows)"], []),
            ({1: 5, 20: 3}, ["144p 1f 1.00 (5 rows)", "144p 17f 1.00 (3 rows)"], []),
            ({1: 2, 20: 30}, ["144p 1f 1.00 (2 rows)"], ["144p 1f 1.00 (2 of 3)"]),
        ],
    )
    def test_of_buckets(
        self, rows: dict[int, int], without: list[str], untrained: list[str], tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        paths = [
            (tmp_path / f"{frames}-{n}.mp4", "x", frames, 192, 192) for frames, c in rows.items() for n in range(c)
        ]
        [path.touch() for path, *_ in paths]
        with (tmp_path / "many.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "text", "num_frames", "height", "width"), *paths])
        table_source(variable(tmp_path, "many", validate_every=1), 1)
        assert all(one in caplog.text for one in (*without, *untrained))
        assert ("not trained on" in caplog.text) == bool(untrained)

    @pytest.mark.parametrize(("broken", "left"), [([0, 1], 1), ([0, 1, 2, 3], 0), ([], 2)])
    def test_held_out_clips_that_cannot_be_read(
        self, files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: list[int], left: int
    ) -> None:
        small = Small(tmp_path, files, 40)
        source = table_source(small.settings(validate_every=1, validation_samples=4, batch_size=2), 1)
        held = [key for one in source.held_out for key in one.keys]
        [Path(source.dataset.name(held[number])).write_bytes(b"nothing") for number in broken]

        def encode(batch: dict[str, Any]) -> TrainingBatch:
            return TrainingBatch(torch.zeros(1), {}, batch["size"], batch["names"], weight=batch["weight"])

        found, unread = encode_held_out(source, encode)
        assert sum(examples.weight > 0 for _, examples in found) == left and len(unread) == len(broken)
        assert ("no validation of 1x16x16: none of the clips" in caplog.text) == (left == 0) == (not found)


class TestTraining:
    @pytest.mark.parametrize("make", [settings, variable])
    def test_a_table_trains(self, files: Path, tmp_path: Path, make: Any) -> None:
        """The broken file is named; nothing depends on how batches are read."""
        ends = []
        for workers in (0, 3):
            asked = make(files, outputs=str(tmp_path / f"{workers}"), num_workers=workers, max_steps=STEPS)
            train(asked)
            lines = [
                json.loads(line) for line in next(tmp_path.glob(f"{workers}/0*/log.jsonl")).read_text().splitlines()
            ]
            ends.append([(line["loss"], line["grad_norm"]) for line in lines])
            named = next(tmp_path.glob(f"{workers}/0*/quarantine.jsonl")).read_text()
            assert len(named.splitlines()) == 1 and "broken.mp4" in named
        assert ends[0] == ends[1] and len(ends[0]) == STEPS

    @pytest.mark.parametrize("row", [0, 3, 7])
    @some(2)
    def test_a_batch_without_a_sample_is_no_step(self, files: Path, tmp_path: Path, row: int) -> None:
        """An epoch of eight batches, one of them without a sample, has seven steps."""
        small = Small(tmp_path, files)
        (tmp_path / f"{row}.png").write_bytes(b"nothing")
        train(small.settings(max_steps=8))
        assert [line["step"] for line in small.log()] == [*range(1, 9)]
        assert all(line["loss"] > 0.1 and line["grad_norm"] > 0 for line in small.log())
        [place] = [json.loads(path.read_text()) for path in tmp_path.glob("000-*/epoch*/running_states.json")]
        assert (place["epoch"], place["index"]) in ((1, 1), (1, 2))

    @pytest.mark.parametrize("gone", [True, False])
    @some(1)
    def test_the_limit_of_broken_files_is_that_of_the_run(self, files: Path, tmp_path: Path, gone: bool) -> None:
        """One file of eight may be broken: not one more in each process."""
        small = Small(tmp_path, files)
        (tmp_path / "1.png").write_bytes(b"nothing")
        train(small.settings(max_steps=7))
        (tmp_path / "4.png").unlink() if gone else (tmp_path / "4.png").write_bytes(b"nothing")
        again = dict(load=str(tmp_path / "000-STDiT3"), max_steps=8 if gone else 14, accept_changes=True)
        with pytest.raises(MediaError, match="2 of 8 files cannot be read, over the limit of 1"):
            train(small.settings(**again))

    def test_too_many_broken_files_stop_the_run(self, files: Path, tmp_path: Path) -> None:
        (tmp_path / "more.csv").write_text("path,text\n" + f"{files / 'broken.mp4'},a\n" * 3 + f"{files / '0.mp4'},b\n")
        asked = settings(tmp_path, "more", outputs=str(tmp_path), batch_size=4)
        parts = {name: getattr(settings(files), name) for name in ("vae", "text_encoder")}
        with pytest.raises(MediaError, match="3 of 4 files cannot be read"):
            train(TrainSettings(**{**vars(asked), **parts}))

    def test_a_changed_table_is_noticed(self, files: Path, tmp_path: Path) -> None:
        first = train(settings(files, "table", outputs=str(tmp_path), max_steps=2)).path.parent
        again = dict(outputs=str(tmp_path), load=str(first / "000-STDiT3"))
        with pytest.raises(
            ConfigError, match=r"the table is another: 1 rows removed: .*broken\.mp4; .*--accept-changes"
        ):
            train(settings(files, "whole", **again))
        assert train(settings(files, "whole", accept_changes=True, **again)).path.name == "ema"

    @pytest.mark.parametrize("change", ["replaced", "mended", "gone", "text"])
    @some(2)
    def test_changed_data_is_named(self, files: Path, tmp_path: Path, change: str) -> None:
        """Files replaced under the same names, with the same sizes and times, and texts that were written anew."""
        whole = Small(tmp_path, files)
        first = train(whole.settings()).path
        stat = (tmp_path / "2.png").stat()
        if change == "text":
            whole.write(text="another text")
        elif change == "gone":
            (tmp_path / "2.png").unlink()
        else:
            content = bytearray((tmp_path / "2.png").read_bytes())
            content[-20] ^= 1
            (tmp_path / "2.png").write_bytes(content)
            os.utime(tmp_path / "2.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        what = {"text": "its cells", "gone": "its file is not there"}.get(change, "its file")
        again = dict(load=str(first.parent / "000-STDiT3"), max_steps=3)
        with pytest.raises(ConfigError, match=rf"the table is another: 1 rows changed: .*2\.png \({what}\); undo that"):
            train(whole.settings(**again))

    @pytest.mark.parametrize(
        ("model", "scheduler"),
        [(model, one) for n, model in enumerate(MODELS) for one in (SCHEDULERS if FULL else [SCHEDULERS[n % 3]])],
    )
    @some(4)
    def test_every_model_learns_with_every_scheduler(self, files: Path, model: str, scheduler: str) -> None:
        """Each has a loss whose gradients reach its first layer."""
        text = "clip" if model in ("DiT", "Latte") else "t5"
        asked = settings(
            files, "whole", model=dict(type=model, **SMALL), scheduler=dict(type=scheduler),
            vae=dict(type="VideoAutoencoderKL", from_pretrained=str(files / "frames")),
            text_encoder=dict(type=text, from_pretrained=str(files / text)),
        )  # fmt: skip
        kind, ratios = check_training(asked)
        data = make_data(asked, CPU, RankLayout())
        made = build_model(asked, data, CPU)[0]
        for parameter in made.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        batch = data.encode(data.source.reader(0, 0)())
        losses = DiffusionLoss(made, kind, ratios)(batch, step_generator(0, 0))
        losses.mean().backward()
        assert losses.shape == (2,) and made.x_embedder.proj.weight.grad.abs().sum() > 0


def test_encoded_features_train(files: Path, tmp_path: Path) -> None:
    asked = variable(files, "whole", bucket_config={"144p": {1: (1.0, 3)}})
    names = {field.name for field in dataclasses.fields(ExtractSettings)}
    given = {name: value for name, value in vars(asked).items() if name in names}
    folder = extract(ExtractSettings(**{**given, "save_dir": str(tmp_path / "features")}))
    section = dict(type="BatchFeatureDataset", data_path=str(folder))
    small = {name: value for name, value in TINY_STDIT3.items() if name != "caption_channels"}
    model = dict(type="STDiT3", skip_y_embedder=True, **small)
    without = dict(vae=None, text_encoder=None, load_text_features=True, load_video_features=True, batch_size=None)
    run = settings(files, dataset=section, model=model, outputs=str(tmp_path), mask_ratios={"random": 1.0}, **without)
    assert train(run).path.name == "ema"
    first = settings(files, dataset=section, outputs=str(tmp_path / "a"), max_steps=2, **without)
    train(first)
    rest = settings(files, dataset=section, outputs=str(tmp_path / "a"), load=str(tmp_path / "a/000-STDiT3"), **without)
    train(rest), train(settings(files, dataset=section, outputs=str(tmp_path / "b"), **without))
    ends = [load_file(tmp_path / name / "ema" / "model.safetensors") for name in "ab"]
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (dict(scheduler=dict(type="dpm-solver")), "scheduler 'dpm-solver' only samples; train with rflow"),
            (dict(scheduler=None), "needs a scheduler"),
            (dict(model=dict(type="STDiT4")), "model type 'STDiT4' is not known; did you mean 'STDiT"),
            (dict(model=dict(type="PixArt"), mask_ratios={"random": 0.5}), "model 'PixArt' cannot be given frames"),
            (dict(mask_ratios={"rondom": 0.5}), "unknown type 'rondom'"),
            (dict(discriminator=dict(type="D")), "discriminator is not supported"),
            (dict(dataset=dict(type="VideoTextDataset")), "data_path is not set"),
            (dict(vae=None), "has no vae; add vae = dict"),
            (dict(load_text_features=True), "a table gives videos and captions, no encoded features"),
            (dict(dataset=dict(type="EncodedDataset")), "give a folder of encoded features with --data-path"),
            (dict(sp_size=2), "sp_size 2 does not divide the number of ranks"),
        ],
    )
    def test_before_any_work(self, files: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            train(settings(files, outputs=str(tmp_path / "runs"), **changes))
        assert not (tmp_path / "runs").exists()

    def test_a_model_of_one_size_on_many(self, files: Path, tmp_path: Path) -> None:
        model = dict(type="PixArt", **SMALL)
        with pytest.raises(ConfigError, match="model 'PixArt' is built for one size"):
            train(variable(files, model=model, outputs=str(tmp_path)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_every_published_configuration_is_accepted(path: Path, files: Path) -> None:
    """It is built with a small model, and lacks nothing but its table."""
    config = read_config(path)
    if config["dataset"]["type"] == "BatchFeatureDataset":
        pytest.skip("on encoded features")
    config["dataset"]["data_path"] = "nowhere.csv"
    config["model"] |= {"from_pretrained": None, **SMALL}
    config["vae"] |= {"from_pretrained": str(files / ("vae" if "V1_2" in config["vae"]["type"] else "frames"))}
    config["vae"].pop("subfolder", None)
    config["text_encoder"] |= {"from_pretrained": str(files / config["text_encoder"]["type"])}
    asked = TrainSettings.from_config(config, path.name)
    check_trainable(asked)
    check_training(asked)
    with pytest.raises(ConfigError, match=r"nowhere\.csv: cannot be read"):
        make_data(asked, CPU, RankLayout())
    assert registry.keywords(asked.model["type"])


def test_data_settings_of_1_0(files: Path, tmp_path: Path) -> None:
    """At the top level, and a table without a header."""
    config = dict(
        data_path=str(files / "plain.csv"), num_frames=4, frame_interval=2, image_size=(16, 16), root=None,
        use_image_transform=False, model=dict(type="STDiT", **SMALL), scheduler=dict(type="iddpm"), batch_size=3,
        vae=dict(type="VideoAutoencoderKL", from_pretrained=str(files / "frames")),
        text_encoder=dict(type="t5", from_pretrained=str(files / "t5"), model_max_length=120),
        mask_ratios={"mask_no": 0.5, "mask_random": 0.5}, device="cpu", dtype="fp32", max_steps=2,
        outputs=str(tmp_path),
    )  # fmt: skip
    assert train(TrainSettings.from_config(config, "old.py")).path.name == "ema"
    assert json.loads((tmp_path / "ema" / "config.json").read_text())["input_size"] == [4, 2, 2]
