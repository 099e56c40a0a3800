"""The models that configurations can name, with size, conditioning, autoencoder and configuration. Light to import."""

from __future__ import annotations

from typing import NamedTuple

T5, CLIP, CLASSES = "T5-v1.1-XXL text", "CLIP text", "class numbers"
SD_VAE, SDXL_VAE, VAE_1_2 = "SD autoencoder", "SDXL autoencoder", "OpenSoraVAE_V1_2"
HALF = 2  # bytes per weight


class ModelInfo(NamedTuple):
    """A model: registry name, parameter count, output, conditioning, autoencoder, and a configuration to start from."""

    name: str
    parameters: int
    output: str
    conditioning: str
    autoencoder: str
    config: str


MODELS = (
    ModelInfo("embedded", 13_416_768, "video", "shipped T5 text", "shipped", "embedded/inference/sample.py"),
    ModelInfo("STDiT3-XL/2", 1_207_643_972, "video, image", T5, VAE_1_2, "opensora-v1-2/inference/sample.py"),
    ModelInfo("STDiT3-3B/2", 3_182_211_572, "video, image", T5, VAE_1_2, "opensora-v1-2/inference/sample.py"),
    ModelInfo("STDiT2-XL/2", 767_452_100, "video, image", T5, SD_VAE, "opensora-v1-1/inference/sample.py"),
    ModelInfo("STDiT-XL/2", 759_620_768, "video, image", T5, SD_VAE, "opensora/inference/16x256x256.py"),
    ModelInfo("STDiT-XL/2x2", 759_676_096, "video", T5, SD_VAE, "opensora/inference/16x256x256.py"),
    ModelInfo("PixArt-XL/2", 610_856_096, "image, video", T5, SD_VAE, "pixart/inference/1x512x512.py"),
    ModelInfo("PixArt-1B/2", 1_607_256_176, "image", T5, SDXL_VAE, "pixart/inference/1x20481B.py"),
    ModelInfo("PixArtMS-XL/2", 611_349_152, "image", T5, SD_VAE, "pixart/inference/1x1024MS.py"),
    ModelInfo("PixArt-Sigma-XL/2", 610_856_096, "image", T5, SDXL_VAE, "pixart/inference/1x2048MS.py"),
    ModelInfo(
        "DiT-XL/2", 675_600_800, "image, video", f"{CLIP} or {CLASSES}", SD_VAE, "dit/inference/1x256x256-class.py"
    ),
    ModelInfo("DiT-XL/2x2", 675_656_128, "video", f"{CLIP} or {CLASSES}", SD_VAE, "dit/inference/16x256x256.py"),
    ModelInfo(
        "Latte-XL/2", 675_600_800, "video", f"{CLIP} or {CLASSES}", SD_VAE, "latte/inference/16x256x256-class.py"
    ),
    ModelInfo("Latte-XL/2x2", 675_656_128, "video", f"{CLIP} or {CLASSES}", SD_VAE, "latte/inference/16x256x256.py"),
)


def table() -> str:
    """The models as a plain-text table."""
    titles = ("model", "parameters", "weights", "output", "conditioning", "autoencoder", "configuration")
    rows = [titles]
    for entry in MODELS:
        size = f"{entry.parameters * HALF / 2**30:.2f} GiB"
        config = f"configs/{entry.config}"
        number = f"{entry.parameters / 1e6:,.0f} M"
        rows.append((entry.name, number, size, entry.output, entry.conditioning, entry.autoencoder, config))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "Weights in bf16 or fp16. T5-v1.1-XXL adds 4,762 M parameters (8.87 GiB)."])
