"""Settings and spellings of older documents and versions."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from opensora.errors import ConfigError

# Settings of the documents' other programs, and such as only matter beside one that training cannot follow: accepted,
# and said to have no effect unless they are as here.
OF_NO_EFFECT: dict[str, Any] = {
    "base": None, "base_step_time": None, "bin_size": None, "cal_stats": False, "discriminator_factor": 1,
    "discriminator_loss_type": "hinge", "discriminator_start": -1, "end_index": None, "generator_factor": 0.5,
    "generator_loss_type": "hinge", "gradient_penalty_loss_weight": None, "lecam_loss_weight": None,
    "log_stats_every": 100, "log_time": False, "logvar_init": 0.0, "model_max_length": None,
    "num_bucket_build_workers": 1, "num_eval_timesteps": None, "num_samples": None,
    "save_compressed_text_features": False, "save_dir": None, "save_text_features": False, "start_index": 0,
    "text_encoder_model_max_length": 300, "text_encoder_output_dim": 4096, "vae_out_channels": 4,
}  # fmt: skip
# Spellings of older documents and versions: `section.key` or `key` -> key, `section.key=value` -> value.
LEGACY = {
    "model.enable_flashattn": "enable_flash_attn",
    "scheduler.type=dmp-solver": "dpm-solver",
    "multi_resolution=True": "PixArtMS", "multi_resolution=False": None,
    **{f"mask_ratios.mask_{part}{place}": f"{part or 'quarter_'}{place}"
       for part in ("", "quarter_", "image_") for place in ("random", "head", "tail", "head_tail")},
    "mask_ratios.mask_no": "identity", "mask_ratios.mask_random": "random",
}  # fmt: skip


def modernised(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`config` with the spellings of `LEGACY` replaced and whole numbers of frames as numbers, in its sections too."""
    modern: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            value = modernised(value, f"{path}.")
        elif isinstance(value, str | bool):
            value = LEGACY.get(f"{path}={value}", value)
        if key == "num_frames" and isinstance(value, str):
            with suppress(ValueError):
                value = int(value)
        modern[LEGACY.get(path, key)] = value
    return modern


def gathered(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A training's configuration with the data settings that 1.0 kept at the top level in a section `dataset`.

    Raises ConfigError, which `source` opens, for what is no longer supported.
    """
    config = dict(config)
    if "data_path" not in config or "dataset" in config:
        return config
    if config.pop("root", None) is not None:
        problem = "setting 'root' is no longer supported; write whole paths into the table of data_path"
        raise ConfigError(f"{source}: {problem}")
    if config.pop("use_image_transform", False) not in (False, None) and config.get("num_frames") != 1:
        problem = "use_image_transform reads images; set num_frames = 1 with it, or leave it out"
        raise ConfigError(f"{source}: {problem}")
    names = ("data_path", "num_frames", "frame_interval", "image_size")
    config["dataset"] = {"type": "VideoTextDataset", **{n: config.pop(n) for n in names if n in config}}
    return config
