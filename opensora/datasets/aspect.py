"""Named resolutions, aspect ratios and durations, and the sizes and frame counts they stand for.

Sizes are (height, width) in pixels, ratios are height:width, so 9:16 is landscape. The tables are those of Open-Sora
1.2, written as a formula plus exceptions; the order of keys decides ties.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection
from fractions import Fraction

from opensora.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

NUM_PIXELS = {
    "144p": 36864, "256": 65536, "240p": 102240, "360p": 230400, "512": 262144, "480p": 409920, "720p": 921600,
    "1024": 1048576, "1080p": 2073600, "2k": 3686400, "2048": 4194304, "2880": 8294400, "4k": 8294400,
}  # fmt: skip
NUM_FRAMES = {
    "1x": 51, "2x": 102, "4x": 204, "8x": 408, "16x": 816,
    "2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816, "image": 1,
}  # fmt: skip
# name -> key of the size tables; "50:27" stands for 2.08 (= 25:12) there, although 50 / 27 is 1.85
ASPECT_RATIOS = {
    "3:8": "0.38", "9:21": "0.43", "12:25": "0.48", "1:2": "0.50", "9:17": "0.53", "27:50": "0.54", "9:16": "0.56",
    "5:8": "0.62", "2:3": "0.67", "3:4": "0.75", "1:1": "1.00", "4:3": "1.33", "3:2": "1.50", "16:9": "1.78",
    "17:9": "1.89", "2:1": "2.00", "50:27": "2.08",
}  # fmt: skip
_KEYS = {Fraction(name.replace(":", "/")): key for name, key in ASPECT_RATIOS.items()}
# entries of the video tables that the rule of `formula_size` does not give: key=HxW
_IRREGULAR = {
    "144p": """
        0.38=117x312 0.43=125x291 0.48=133x277 0.50=135x270 0.53=139x262 0.54=141x260 0.62=151x241 0.75=166x221
        1.33=221x165 1.50=235x156 1.89=263x139 2.00=271x135 2.08=277x132""",
    "240p": "0.54=236x436 0.67=262x393", "480p": "0.48=444x925 1.33=740x555", "720p": "0.54=706x1306",
    "1080p": "0.54=1058x1958", "2k": "0.54=1412x2612", "4k": "0.54=2118x3918",
}  # fmt: skip
# the square families, in sixteenths of the side, and 2880 in blocks of 64 pixels; keys are H / W where not given
_SQUARE = """
    8x32 8x31 8x30 8x29 9x28 9x27 9x26 10x25 10x24 11x23 11x22 11x21 12x21 12x20 13x19 13x18 14x18 14x17 15x17 15x16
    16x16 16x15 17x15 17x14 18x14 18x13 19x13 20x12 21x12 22x11 23x11 24x10 25x10 26x9 27x9 28x9 29x8 30x8 31x8 32x8"""
_SQUARE_2880 = """
    0.25=22x90 0.26=22x87 0.27=22x84 0.28=22x81 25x78 25x75 25x73 28x70 28x67 30x64 30x61 30x59 33x60 33x56 36x53 36x50
    39x50 39x47 42x47 42x45 45x45 45x42 47x42 47x39 50x39 50x36 53x36 56x33 60x33 61x30 64x30 67x28 70x28 73x25 75x25
    78x25 81x22 84x22 87x22 4.0=90x22"""


def formula_size(ratio: float, num_pixels: int) -> tuple[int, int]:
    """(H, W), both even, of about `num_pixels` pixels, with H / W about `ratio`."""
    height = (int(math.sqrt(num_pixels * ratio)) + 1) // 2 * 2
    return height, (int(height / ratio) + 1) // 2 * 2


def _read(table: str, block: int = 1) -> dict[str, tuple[int, int]]:
    sizes = {}
    for entry in table.split():
        key, _, pair = entry.rpartition("=")
        height, width = map(int, pair.split("x"))
        sizes[key or str(round(height / width, 2))] = (height * block, width * block)
    return sizes


def _sizes(resolution: str) -> dict[str, tuple[int, int]]:
    if resolution.isdigit():
        return _read(_SQUARE_2880, 64) if resolution == "2880" else _read(_SQUARE, int(resolution) // 16)
    ratios = {key: float(ratio) for ratio, key in _KEYS.items()} | {"2.08": 25 / 12}
    keys = list(ratios)
    if resolution == "4k":  # its table alone has 0.62 before 0.56
        keys.insert(keys.index("0.56"), keys.pop(keys.index("0.62")))
    sizes = {key: formula_size(ratios[key], NUM_PIXELS[resolution]) for key in keys}
    return sizes | _read(_IRREGULAR.get(resolution, ""))


SIZES = {resolution: _sizes(resolution) for resolution in NUM_PIXELS}
"""resolution -> ratio key -> (H, W), in the order that decides ties between equally near ratios."""


def _plain(value: object) -> str:
    return "".join(str(value).lower().split())


def _unknown(what: str, value: object, choices: Collection[str]) -> ConfigError:
    hint = did_you_mean(_plain(value), choices) or ";"
    return ConfigError(f"{what} {value!r} is not known{hint} choose one of {', '.join(choices)}")


def resolution_name(value: str | int) -> str:
    """The canonical name of a resolution, ignoring case and blanks (`4K`, 512). Raises ConfigError if unknown."""
    name = _plain(value)
    if name not in NUM_PIXELS:
        raise _unknown("resolution", value, NUM_PIXELS)
    return name


def get_num_pixels(resolution: str | int) -> int:
    """The nominal number of pixels of a resolution. Raises ConfigError if unknown."""
    return NUM_PIXELS[resolution_name(resolution)]


def get_num_frames(value: str | float) -> int:
    """The number of frames of a duration ("2s", "4x", "image") or a number. Raises ConfigError for anything else.

    Numbers are truncated (51.9 gives 51); text must be an integer.
    """
    try:
        return NUM_FRAMES.get(_plain(value)) or int(value)
    except (TypeError, ValueError, OverflowError):
        raise _unknown("number of frames", value, ["an integer", *NUM_FRAMES]) from None


def parse_ratio(value: str | float) -> Fraction:
    """The exact height / width of `9:16`, `18:32`, `9x16`, `9/16` or `0.5625`. Raises ConfigError for other text."""
    try:
        parts = [Fraction(_decimal(part)) for part in re.split("[:x×/]", str(value).lower())]
        ratio = parts[0] if len(parts) == 1 else parts[0] / parts[1]
        if ratio > 0 and len(parts) <= 2:
            return ratio
    except (ValueError, ZeroDivisionError):
        pass
    raise _unknown("aspect ratio", value, [*ASPECT_RATIOS, "or any other height:width"])


def get_image_size(resolution: str | int, aspect_ratio: str | float) -> tuple[int, int]:
    """(H, W) of a resolution at the nearest aspect ratio in its table. Raises ConfigError for unknown names."""
    sizes = SIZES[resolution_name(resolution)]
    ratio = parse_ratio(aspect_ratio)
    key = _KEYS.get(ratio, "")
    if key not in sizes:
        key = closest_ratio(float(ratio), 1, resolution)
        if abs(float(key) / float(ratio) - 1) > 0.05:
            log.warning("aspect ratio %s does not exist at %s; using the nearest, %s", aspect_ratio, resolution, key)
    return sizes[key]


def _decimal(text: str) -> str:
    """Checks a plain decimal number; exponents are rejected, as they could be huge. Raises ValueError."""
    if not re.fullmatch(r"\s*(\d{1,12}(\.\d{0,20})?|\.\d{1,20})\s*", text):
        raise ValueError(text)
    return text


def closest_ratio(height: float, width: float, resolution: str | int) -> str:
    """The key of the ratio nearest to height / width at a resolution; the first one wins a tie."""
    sizes = SIZES[resolution_name(resolution)]
    if height <= 0 or width <= 0:
        raise ConfigError(f"an image of {height} x {width} pixels has no aspect ratio; sizes must be positive")
    return min(sizes, key=lambda key: abs(height / width - float(key)))
