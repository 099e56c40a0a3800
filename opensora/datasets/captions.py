"""Scores and camera motion in captions, in the wording that Open-Sora 1.2 was trained on."""

from __future__ import annotations

from opensora.errors import ConfigError


def append_score(
    prompt: str, aes: float | None = None, flow: float | None = None, camera_motion: str | None = None
) -> str:
    """Appends ` aesthetic score: 6.5.`, the motion score and the camera motion to a prompt.

    Skips those that are None or in the prompt already. Raises ConfigError for a score that is not a number.
    """
    for label, value in (("aesthetic score", aes), ("motion score", flow), ("camera motion", camera_motion)):
        if value is None or f"{label}:" in prompt:
            continue
        try:
            prompt += f" {label}: {value}." if label == "camera motion" else f" {label}: {value:.1f}."
        except (TypeError, ValueError):
            raise ConfigError(f"{label} {value!r} is not a number; give one such as 6.5") from None
    return prompt
