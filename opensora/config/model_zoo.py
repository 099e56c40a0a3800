"""The models that configurations can name: their size, what they need, where to start. Imports nothing heavy."""

from __future__ import annotations

from typing import NamedTuple

T5, CLIP, CLASSES = "T5-v1.1-XXL text", "CLIP text", "class numbers"
SD_VAE, SDXL_VAE, VAE_1_2 = "SD autoencoder", "SDXL autoencoder", "OpenSoraVAE_V1_2"
HALF = 2  # bytes of a weight


class Entry(NamedTuple):
    """One model: its registry name, parameters, result, what it is told by, its autoencoder, and its first config."""

    name: str
    parameters: int
    makes: str
    told_by: str
    autoencoder: str
    config: str


MODELS = (
    Entry("embedded", 13_416_768, "video", "shipped T5 text", "shipped", "embedded/inference/sample.py"),
    Entry("STDiT3-XL/2", 1_207_643_972, "video, image", T5, VAE_1_2, "opensora-v1-2/inference/sample.py"),
    Entry("STDiT3-3B/2", 3_182_211_572, "video, image", T5, VAE_1_2, "opensora-v1-2/inference/sample.py"),
    Entry("STDiT2-XL/2", 767_452_100, "video, image", T5, SD_VAE, "opensora-v1-1/inference/sample.py"),
    Entry("STDiT-XL/2", 759_620_768, "video, image", T5, SD_VAE, "opensora/inference/16x256x256.py"),
    Entry("STDiT-XL/2x2", 759_676_096, "video", T5, SD_VAE, "opensora/inference/16x256x256.py"),
    Entry("PixArt-XL/2", 610_856_096, "image, video", T5, SD_VAE, "pixart/inference/1x512x512.py"),
    Entry("PixArt-1B/2", 1_607_256_176, "image", T5, SDXL_VAE, "pixart/inference/1x20481B.py"),
    Entry("PixArtMS-XL/2", 611_349_152, "image", T5, SD_VAE, "pixart/inference/1x1024MS.py"),
    Entry("PixArt-Sigma-XL/2", 610_856_096, "image", T5, SDXL_VAE, "pixart/inference/1x2048MS.py"),
    Entry("DiT-XL/2", 675_600_800, "image, video", f"{CLIP} or {CLASSES}", SD_VAE, "dit/inference/1x256x256-class.py"),
    Entry("DiT-XL/2x2", 675_656_128, "video", f"{CLIP} or {CLASSES}", SD_VAE, "dit/inference/16x256x256.py"),
    Entry("Latte-XL/2", 675_600_800, "video", f"{CLIP} or {CLASSES}", SD_VAE, "latte/inference/16x256x256-class.py"),
    Entry("Latte-XL/2x2", 675_656_128, "video", f"{CLIP} or {CLASSES}", SD_VAE, "latte/inference/16x256x256.py"),
)


def table() -> str:
    """The models as a table of text, one a line."""
    titles = ("model", "parameters", "weights", "makes", "told by", "autoencoder", "configuration")
    rows = [titles]
    for entry in MODELS:
        size = f"{entry.parameters * HALF / 2**30:.2f} GiB"
        config = f"configs/{entry.config}"
        number = f"{entry.parameters / 1e6:,.0f} M"
        rows.append((entry.name, number, size, entry.makes, entry.told_by, entry.autoencoder, config))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [*lines, "", "Sizes are those of bf16 or fp16 weights; T5-v1.1-XXL itself has 4,762 M (8.87 GiB)."]
    )
