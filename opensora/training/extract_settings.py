"""Which features are encoded, and where they go: settings that a command line needs without loading any library."""

from __future__ import annotations

from dataclasses import dataclass

from opensora.errors import ConfigError
from opensora.settings import TrainSettings, setting


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(TrainSettings):
    """What is encoded, and where it goes. Settings of training have no effect but those of the data set."""

    model: dict | None = None
    save_dir: str = setting("features", "folder for the features")
    start_index: int = setting(0, "first row of the table to encode", least=0)
    end_index: int | None = setting(None, "the row to stop before")
    crops: int = setting(1, least=1)  # spans of each clip, drawn as in so many epochs
    bin_size: int = setting(250, least=1)  # samples of a shard, at most
    save_video_features: bool = True
    save_text_features: bool = True
    save_compressed_text_features: bool = True  # they always are: padding is not stored
    save_last_frames: bool = True
    save_dtype: str = "fp16"
    replace_stale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_dtype not in ("fp16", "bf16", "fp32"):
            raise ConfigError(f"save_dtype {self.save_dtype!r} is not known; choose one of fp16, bf16, fp32")
        if not (self.save_video_features or self.save_text_features):
            raise ConfigError("save_video_features and save_text_features are both off; there is nothing to encode")
