"""Aesthetic and matching scores by CLIP, from the user's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from opensora.acceleration.device_names import check_device_name, names_cpu
from opensora.curation.clip import Clip
from opensora.curation.stages.stage import Columns, Place, Stage, execution_setting
from opensora.curation.tables.stream import text_of
from opensora.errors import ConfigError

POINTS = (0.1, 0.5, 0.9)  # of the length, where frames are taken
MIDDLE = POINTS.index(0.5)
MAX_CHARACTERS = 10_000  # of a caption; far more than fit into CLIP's tokens


@dataclass(frozen=True)
class Scores(Stage):
    """aes: the mean aesthetic score of three frames, about 1 to 10; match: how well the middle frame fits the caption,
    about 20 to 35 where it does; match_tokens: CLIP's tokens of the caption, of which the first 77 are compared.

    `clip` is a folder of CLIP ViT-L/14 in transformers' layout (openai/clip-vit-large-patch14), `aesthetic` a file of
    the head (sac+logos+ava1-l14-linearMSE.pth); without it there is no aes, without a caption no match. The frames of
    a clip are one batch, so that its scores depend on no other clip. `workers` processes hold a model each.
    """

    clip: str = execution_setting("")
    aesthetic: str = execution_setting("")
    device: str | None = execution_setting(None)
    workers: int | None = execution_setting(None)

    name: ClassVar[str] = "scores"
    columns: ClassVar[tuple[str, ...]] = ("aes", "match", "match_tokens")
    inputs: ClassVar[tuple[str, ...]] = ("text",)

    @property
    def place(self) -> Place:
        return "processor" if names_cpu(self.device) else "accelerator"

    @property
    def num_workers(self) -> int | None:
        return self.workers

    def check(self) -> None:
        if not self.clip:
            raise ConfigError("scores need the weights of CLIP ViT-L/14; name them with --set scores.clip=FOLDER")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"scores.workers must be 1 or more, not {self.workers}")
        check_device_name(self.device)
        self.weights()

    def setup(self) -> None:
        from opensora.checkpoints.scorers import load_scorer

        load_scorer(self.clip, self.aesthetic, self.device)

    def weights(self) -> Mapping[str, str]:
        from opensora.checkpoints.scorers import scorer_hashes

        return scorer_hashes(self.clip, self.aesthetic)

    def process(self, clip: Clip) -> Columns:
        import torch

        from opensora.checkpoints.scorers import load_scorer
        from opensora.datasets.transforms import clip_pixels

        scorer = load_scorer(self.clip, self.aesthetic, self.device)
        wanted: list[int] = []

        def choose(total: int) -> list[int]:
            wanted[:] = [min(int(point * total), total - 1) for point in POINTS]
            return sorted(set(wanted))

        frames, _ = clip.frames(choose, lambda frame: clip_pixels(frame, scorer.image_size))
        by_index = dict(zip(sorted(set(wanted)), frames, strict=True))
        pixels = torch.stack([by_index[index] for index in wanted]).to(scorer.device)
        ids = scorer.tokenizer.encode(text_of((clip.row or {}).get("text")).strip()[:MAX_CHARACTERS])
        has_caption = len(ids) > 2  # beside the tokens of beginning and end
        aes = match = None
        with torch.inference_mode(), _one_thread():
            images = scorer.clip.embed_images(pixels)
            if scorer.head is not None:
                aes = round(float(scorer.head(images).mean()), 4)
            if has_caption:
                kept = ids if len(ids) <= scorer.max_tokens else [*ids[: scorer.max_tokens - 1], ids[-1]]
                text = scorer.clip.embed_text(torch.tensor([kept], device=scorer.device))
                match = round(float(scorer.clip.match(images[MIDDLE : MIDDLE + 1], text)), 4)
        return {"aes": aes, "match": match, "match_tokens": len(ids) if has_caption else None}


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU the last bits of a product may depend on the number of threads, and workers share the cores anyway."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
