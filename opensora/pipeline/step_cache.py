"""The step cache of a request: its settings, its calibration for `--cache auto`, and its record in a recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from opensora.acceleration import quantization, trial
from opensora.acceleration.flash_attention import use_attention
from opensora.acceleration.precision import inference_dtype
from opensora.acceleration.step_cache import calibration
from opensora.acceleration.step_cache.cached_sampling import Cache
from opensora.acceleration.step_cache.table import CacheTable
from opensora.config.settings import InferenceSettings
from opensora.errors import ConfigError

logger = logging.getLogger("opensora")


def from_settings(settings: InferenceSettings) -> Cache:
    """The step cache of the settings; "auto" is exact until it is calibrated. Raises ConfigError."""
    table = None if settings.cache_table is None else CacheTable.from_dict(settings.cache_table)
    if settings.cache == "table" and table is None:
        raise ConfigError("cache 'table' needs a cache_table, as recipes hold it; use --cache auto to find one")
    method = "none" if settings.cache == "auto" else settings.cache
    return Cache(method, table if method == "table" else None, settings.cache_threshold, settings.guidance_interval)


def warn_slow_options(settings: InferenceSettings, device: torch.device, dtype: torch.dtype) -> None:
    """Warns about each speed option that is slower on this device than the default; it is used nevertheless.

    Raises ConfigError for an option that the device does not support.
    """
    quantization.check(settings.linear, device, dtype)
    with torch.random.fork_rng(devices=[]):
        if settings.linear != "exact":
            _warn_if_slower("linear", settings.linear, trial.linear(settings.linear, device, dtype), "exact layers")
        if dtype == torch.bfloat16 and settings.cpu_dtype == "bf16" and dtype != inference_dtype(device, "bf16"):
            _warn_if_slower("cpu-dtype", "bf16", trial.products(dtype, torch.float32, device), "fp32")
        if settings.attention:
            switch = partial(use_attention, settings.attention, device)
            _warn_if_slower(
                "attention", settings.attention, trial.attention(switch, device, dtype), "PyTorch's own attention"
            )


def _warn_if_slower(flag: str, choice: str, ratio: float, usual: str) -> None:
    if ratio > trial.SLOWER:
        warning = "--%s %s takes %.1f times as long as %s here, by a moment's trial; remove it to be faster"
        logger.warning(warning, flag, choice, ratio, usual)


def calibration_prompts(settings: InferenceSettings) -> list[str]:
    """The prompts of the calibration; none without one."""
    if settings.cache != "auto":
        return []
    if settings.cache_prompts:
        return list(settings.cache_prompts)
    classes = (settings.text_encoder or {}).get("num_classes")
    number = len(calibration.PROMPTS)
    return [str(i * classes // number) for i in range(number)] if classes else list(calibration.PROMPTS)


def recipe_settings(settings: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
    """The settings to record in a recipe, so that a replay needs no calibration."""
    settings = {**settings, "cache_psnr": False, "cache_prompts": None}
    if settings["cache"] != "auto":
        return settings
    table = None if cache.table is None else cache.table.to_dict()
    return {**settings, "cache": "none" if table is None else "table", "cache_table": table}


def psnr(frames: np.ndarray, exact: np.ndarray) -> float:
    """The peak signal-to-noise ratio in dB of frames uint8, infinite if they are identical."""
    error = float(np.mean((frames.astype(np.float64) - exact) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)
