"""Settings and spellings of older versions, translated to the current ones."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from opensora.errors import ConfigError

# Published settings that this code does not read, with the value that asks for nothing: others cause a warning.
OF_NO_EFFECT: dict[str, Any] = {
    "base": None, "base_step_time": None, "bin_size": None, "cal_stats": False, "discriminator_factor": 1,
    "discriminator_loss_type": "hinge", "discriminator_start": -1, "end_index": None, "generator_factor": 0.5,
    "generator_loss_type": "hinge", "gradient_penalty_loss_weight": None, "lecam_loss_weight": None,
    "log_stats_every": 100, "log_time": False, "logvar_init": 0.0, "model_max_length": None,
    "num_bucket_build_workers": 1, "num_eval_timesteps": None, "num_samples": None,
    "save_compressed_text_features": False, "save_dir": None, "save_text_features": False, "start_index": 0,
    "text_encoder_model_max_length": 300, "text_encoder_output_dim": 4096, "vae_out_channels": 4,
}  # fmt: skip
# `section.key` or `key` -> key, `section.key=value` -> value.
LEGACY = {
    "model.enable_flashattn": "enable_flash_attn",
    "scheduler.type=dmp-solver": "dpm-solver",
    "multi_resolution=True": "PixArtMS", "multi_resolution=False": None,
    **{f"mask_ratios.mask_{part}{place}": f"{part or 'quarter_'}{place}"
       for part in ("", "quarter_", "image_") for place in ("random", "head", "tail", "head_tail")},
    "mask_ratios.mask_no": "identity", "mask_ratios.mask_random": "random",
}  # fmt: skip


def upgrade(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Replaces the spellings of `LEGACY`, and numbers of frames written as text, in all sections."""
    upgraded: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            value = upgrade(value, f"{path}.")
        elif isinstance(value, str | bool):
            value = LEGACY.get(f"{path}={value}", value)
        if key == "num_frames" and isinstance(value, str):
            with suppress(ValueError):
                value = int(value)
        upgraded[LEGACY.get(path) or key] = value
    return upgraded


def move_data_settings(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Moves the top-level data settings of Open-Sora 1.0 into a section `dataset`.

    Raises ConfigError, beginning with `source`, for settings that are no longer supported.
    """
    config = dict(config)
    if "data_path" not in config or "dataset" in config:
        return config
    if config.pop("root", None) is not None:
        problem = "setting 'root' is no longer supported; write whole paths into the table of data_path"
        raise ConfigError(f"{source}: {problem}")
    if config.pop("use_image_transform", False) not in (False, None) and config.get("num_frames") != 1:
        problem = "use_image_transform reads images; set num_frames = 1 with it, or remove it"
        raise ConfigError(f"{source}: {problem}")
    names = ("data_path", "num_frames", "frame_interval", "image_size")
    config["dataset"] = {"type": "VideoTextDataset", **{n: config.pop(n) for n in names if n in config}}
    return config
