"""Fields that inference and training share, and the types of their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from opensora.config.fields import SettingsBase, one_of, setting
from opensora.config.schema import Name, Pair, Positive, described_as
from opensora.config.sections.common import MAX_SIDE
from opensora.errors import ConfigError

SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"}
DTYPES = one_of("bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32", "float64")
_SIDES = f"(height, width) in pixels, 1 to {MAX_SIDE} each"
ImageSize = Annotated[Pair[Annotated[Positive, Field(le=MAX_SIDE)]], described_as(_SIDES)]


@dataclass(frozen=True, kw_only=True)
class CommonSettings(SettingsBase):
    """Fields of both inference and training. Raises ConfigError for an invalid value."""

    model: dict = setting(doc="diffusion model, or the autoencoder to train", example={"type": "STDiT3-XL/2"})
    vae: dict | None = setting(None, doc="autoencoder", example={"type": "OpenSoraVAE_V1_2"})
    text_encoder: dict | None = setting(None, doc="text encoder", example={"type": "t5"})
    scheduler: dict | None = setting(None, doc="noise schedule and sampler", example={"type": "rflow"})
    dataset: dict | None = setting(None, doc="training data", example={"type": "VideoTextDataset"})
    dtype: str = setting("bf16", "bf16, fp16 or fp32", schema=DTYPES)
    seed: int = setting(1024, "random seed")
    device: str | None = setting(None, "device to run on, such as cpu, cuda or mps", schema=Name, example="cuda")
    offline: bool = setting(False, "do not access the network", nargs=0)
    num_workers: int = setting(4, minimum=0, maximum=1_024, doc="data loading workers")
    resolution: str | None = setting(None, "named resolution, such as 240p or 720p", schema=Name, example="480p")
    image_size: tuple[int, int] | None = setting(None, schema=ImageSize, doc="height and width", example=(256, 256))
    perceptual_loss_weight: float = setting(0.1, minimum=0, doc="autoencoders: weight of the perceptual loss")
    kl_loss_weight: float = setting(1e-6, minimum=0, doc="autoencoders: weight of the KL divergence")

    def section(self, name: str) -> dict[str, Any]:
        """The section `name`. Raises ConfigError if the configuration has none."""
        section = getattr(self, name)
        if section is None:
            raise ConfigError(f"the configuration has no {name}; add {name} = dict(type=..., ...)")
        return section

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dtype", SHORT_DTYPES.get(self.dtype, self.dtype))
