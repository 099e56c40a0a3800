"""Draws what the documents and configurations name: condition images and clips, the mask strategy, a bucket plan.

    python scripts/misc/draw_assets.py

writes assets/images/condition/*.png, assets/videos/condition/*.mp4 and docs/images/{mask_strategy,buckets}.png.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from opensora.datasets.video import write_video
from opensora.pipeline.mask_strategy import parse_mask_strategy

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 360, 640  # of a condition image; clips have half of that
FRAMES, FPS = 34, 24
PAPER, INK, GRAY = (255, 255, 255), (34, 38, 46), (214, 218, 224)
GIVEN, EDITED = (66, 120, 190), (226, 140, 60)
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
Y, X = Y / HEIGHT, X / WIDTH


def blend(bottom: np.ndarray, top: np.ndarray | tuple, share: np.ndarray) -> np.ndarray:
    """`top` over `bottom` [H, W, 3] where `share` [H, W] is 1."""
    return bottom + (np.asarray(top, float) - bottom) * np.clip(share, 0, 1)[..., None]


def gradient(*stops: tuple[float, tuple[int, int, int]], at: np.ndarray = Y) -> np.ndarray:
    """Colours [H, W, 3] between (position, colour) stops."""
    positions, colours = zip(*stops, strict=True)
    return np.stack([np.interp(at, positions, channel) for channel in zip(*colours, strict=True)], axis=-1)


def hills(seed: int, base: float, height: float, waves: int = 6) -> np.ndarray:
    """The outline [W] of a ridge, as a share of the picture's height from its top."""
    random = np.random.default_rng(seed)
    x = np.linspace(0, 1, WIDTH)
    ridge = sum(
        random.uniform(0.3, 1) / k * np.sin(2 * np.pi * (k * x * random.uniform(0.7, 1.3) + random.uniform()))
        for k in range(1, waves + 1)
    )
    return base - height * ridge / np.abs(ridge).max()


def below(outline: np.ndarray) -> np.ndarray:
    """1 below an outline [W], with a soft edge."""
    return np.clip((Y - outline[None]) * HEIGHT, 0, 1)


def sea(picture: np.ndarray, horizon: float, colours: tuple, seed: int, glitter: tuple | None = None) -> np.ndarray:
    """Water below the horizon, with waves that shrink towards it, and light on it."""
    depth = np.clip((Y - horizon) / (1 - horizon), 1e-3, 1)
    water = gradient((horizon, colours[0]), (1.0, colours[1]))
    random = np.random.default_rng(seed)
    swell = sum(
        np.sin(2 * np.pi * (random.uniform(4, 14) / depth * 0.35 + random.uniform(1, 3) * X + random.uniform()))
        for _ in range(5)
    )
    water = water + 9 * (swell / 5 * depth**0.5)[..., None]
    if glitter is not None:
        path = np.exp(-(((X - 0.5) / (0.05 + 0.16 * depth)) ** 2)) * (0.35 + 0.65 * (swell > 0.9))
        water = blend(water, glitter, 0.75 * path)
    return blend(picture, water, (horizon < Y).astype(float))


def sun(picture: np.ndarray, y: float, radius: float, colour: tuple) -> np.ndarray:
    distance = np.hypot((X - 0.5) * WIDTH / HEIGHT, Y - y)
    picture = blend(picture, colour, 0.55 * np.exp(-((distance / (3.2 * radius)) ** 2)))
    return blend(picture, colour, (radius - distance) * HEIGHT)


def sunset(y: float, sky: tuple, water: tuple) -> np.ndarray:
    """A sun at height `y` over the sea."""
    picture = gradient((0.0, sky[0]), (0.35, sky[1]), (0.62, sky[2]))
    picture = sun(picture, y, 0.07, (255, 226, 150))
    picture = blend(picture, np.multiply(sky[0], 0.55), 0.9 * below(hills(3, 0.60, 0.05)) * (Y < 0.62))
    return sea(picture, 0.62, water, 5, (255, 214, 140))


def wave() -> np.ndarray:
    """A breaking wave."""
    picture = gradient((0.0, (146, 190, 226)), (0.45, (226, 236, 240)))
    picture = sea(picture, 0.45, ((62, 128, 150), (20, 72, 104)), 11)
    x = np.linspace(0, 1, WIDTH)
    crest = 0.62 - 0.30 * np.exp(-(((x - 0.42) / 0.22) ** 2)) + 0.05 * np.sin(9 * x)
    body = below(crest) * (Y < 0.86)
    picture = blend(picture, gradient((0.25, (70, 168, 176)), (0.85, (16, 78, 110))), body)
    lines = np.sin(2 * np.pi * (22 * (Y - crest[None]) + 3 * X)) ** 8
    picture = blend(picture, (190, 226, 228), 0.35 * body * lines)
    random = np.random.default_rng(2)
    for _ in range(420):
        at = random.uniform(0.12, 0.80)
        center = np.interp(at, x, crest) + random.normal(0, 0.018) + 0.05 * abs(random.normal()) * (at > 0.42)
        radius = random.uniform(0.004, 0.022)
        spot = radius - np.hypot((X - at) * WIDTH / HEIGHT, Y - center)
        picture = blend(picture, (246, 250, 250), 0.8 * np.clip(spot * HEIGHT / 2, 0, 1))
    return picture


def cliff() -> np.ndarray:
    """Headlands with steep sides, one behind the other, over the sea; a lighthouse on a rock."""
    picture = gradient((0.0, (112, 166, 214)), (0.42, (240, 228, 204)))
    picture = sea(picture, 0.46, ((84, 150, 172), (22, 82, 118)), 21)
    picture = blend(picture, (86, 78, 72), (0.016 - np.abs(Y - 0.455)) * HEIGHT * (np.abs(X - 0.16) < 0.045))
    picture = blend(picture, (238, 234, 226), (0.006 - np.abs(X - 0.16)) * WIDTH * (np.abs(Y - 0.40) < 0.05))
    picture = blend(picture, (190, 70, 58), (0.007 - np.abs(X - 0.16)) * WIDTH * (np.abs(Y - 0.345) < 0.012))
    picture = headland(picture, 4, 0.42, 0.34, 0.47, (172, 152, 134))
    picture = headland(picture, 7, 0.58, 0.24, 0.58, (150, 124, 98))
    return headland(picture, 9, 0.70, 0.10, 0.80, (116, 90, 70))


def headland(picture: np.ndarray, seed: int, begin: float, top: float, foot: float, colour: tuple) -> np.ndarray:
    """Land from `begin` to the right, as high as `top`, with grass above, a face of layers, and surf at its `foot`."""
    x = np.linspace(0, 1, WIDTH)
    rough = hills(seed, 0, 0.025, 12)
    inland = np.clip((x - begin) / 0.05, 0, 1) ** 0.5
    ridge = foot + (top + rough - 0.10 * (x - begin) - foot) * inland
    shore = foot + 0.012 * np.sin(40 * x + seed)
    land = below(ridge) * (shore[None] > Y) * (begin < X)
    strata = 1 + 0.10 * np.sin(2 * np.pi * (30 * Y - 6 * X + 0.6 * np.sin(11 * X + seed)))
    light = 0.72 + 0.5 * np.clip((shore[None] - Y) / (foot - top), 0, 1)
    picture = blend(picture, np.multiply(colour, 1.0) * (strata * light)[..., None], land)
    turf = (ridge[None] + 0.022 + 0.35 * np.abs(rough)[None] - Y) * HEIGHT / 3
    picture = blend(picture, (98, 130, 66), land * np.clip(turf, 0, 1) * (inland > 0.9)[None])
    foam = np.exp(-(((Y - shore[None]) / 0.010) ** 2)) * (begin - 0.03 < X)
    return blend(picture, (244, 248, 248), 0.85 * foam * (0.6 + 0.4 * np.sin(90 * X + seed)))


def drive(time: float) -> np.ndarray:
    """A road through hills, seen from a car that has gone `time` seconds."""
    picture = gradient((0.0, (104, 164, 220)), (0.5, (232, 232, 222)))
    picture = blend(picture, (92, 128, 112), below(np.roll(hills(13, 0.48, 0.10), int(-20 * time))))
    depth = np.clip((Y - 0.52) / 0.48, 1e-3, 1)
    far = 1.2 / depth + 5 * time
    grass = np.where((far % 2 < 1)[..., None], (112, 148, 74), (104, 140, 68))
    picture = blend(picture, grass, (Y > 0.52).astype(float))
    across = (X - 0.5 - 0.05 * np.sin(0.35 * far)) / depth
    picture = blend(picture, (86, 88, 94), (0.55 - np.abs(across)) * 60 * (Y > 0.52))
    picture = blend(picture, (240, 238, 220), (0.02 - np.abs(across)) * 200 * (Y > 0.52) * (far % 2 < 1.1))
    return blend(picture, (240, 238, 220), (0.015 - np.abs(np.abs(across) - 0.5)) * 200 * (Y > 0.52))


def forest(time: float) -> np.ndarray:
    """Trees in three rows, passed at walking pace for `time` seconds."""
    picture = gradient((0.0, (176, 206, 214)), (0.7, (222, 230, 214)))
    for row, (shade, foot, height, pace) in enumerate(
        ((0.75, 0.66, 0.42, 0.05), (0.5, 0.76, 0.56, 0.10), (0.25, 0.92, 0.78, 0.2))
    ):
        random = np.random.default_rng(30 + row)
        ground = np.multiply((96, 118, 72), 0.55 + 0.5 * shade)
        picture = blend(picture, ground, (Y - foot + 0.04) * HEIGHT)
        for place in np.sort(random.uniform(-0.2, 1.6, 12)):
            x, size = place - pace * time, height * random.uniform(0.8, 1.0)
            up = (foot - Y) / size
            trunk = (0.03 * size - np.abs(X - x)) * WIDTH * (up > 0) * (up < 0.3)
            picture = blend(picture, np.multiply((92, 70, 52), 0.6 + 0.5 * shade), trunk)
            layers = 0.17 * size * (1 - up) * (0.72 + 0.28 * ((5 * up) % 1 < 0.55))
            crown = (layers - np.abs(X - x)) * WIDTH * (up > 0.14) * (up < 1)
            picture = blend(picture, np.multiply((62, 104, 72), 0.55 + 0.7 * shade), crown)
    return picture


def mask_strategy() -> Image.Image:
    """One row for each strategy: the latent frames of each loop, those that are given, and to what degree."""
    rows = (
        ("0", "an image begins the video"),
        ("0;0,1,0,-1,1", "two images begin and end it"),
        ("0,0,-4,0,4", "the last 4 frames of a video are extended"),
        ("0,0,0,0,8,0.4", "8 frames are edited at rate 0.4"),
        ("0;1,1,0,0,1", "each loop begins with an image of its own"),
    )
    frames, loops, cell, left, top, step = 8, 2, 30, 300, 62, 66
    image = Image.new("RGB", (left + loops * (frames * cell + 30), top + step * len(rows) + 44), PAPER)
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(15), ImageFont.load_default(12)
    for loop in range(loops):
        at = left + loop * (frames * cell + 30)
        draw.text((at, 16), f"loop {loop}", INK, font)
        for frame in range(frames):
            draw.text((at + frame * cell + 10, 38), str(frame), INK, small)
    for number, (text, meaning) in enumerate(rows):
        y = top + number * step
        draw.text((16, y), f'"{text}"', INK, font)
        draw.text((16, y + 20), meaning, (110, 116, 126), small)
        for loop in range(loops):
            for frame in range(frames):
                at = left + loop * (frames * cell + 30) + frame * cell
                draw.rectangle((at, y, at + cell - 4, y + cell - 4), GRAY)
        for place in parse_mask_strategy(text):
            start = place.target_start % frames
            for frame in range(start, min(start + place.length, frames)):
                at = left + place.loop * (frames * cell + 30) + frame * cell
                draw.rectangle((at, y, at + cell - 4, y + cell - 4), EDITED if place.edit else GIVEN)
                label = f"r{place.reference}" + (f"\n{place.edit:g}" if place.edit else "")
                draw.multiline_text((at + 5, y + (0 if place.edit else 6)), label, PAPER, small, spacing=0)
    y, x = top + step * len(rows) + 8, 16
    for colour, text in ((GIVEN, "kept as the reference r has it"), (EDITED, "edited"), (GRAY, "generated")):
        draw.rectangle((x, y, x + 18, y + 18), colour)
        draw.text((x + 26, y), text, INK, small)
        x += 40 + int(draw.textlength(text, small)) + 20
    return image


def buckets() -> Image.Image:
    """The plan of the config guide: where a clip is tried first, and what the two numbers of a bucket mean."""
    plan = {
        "240p": {16: (1.0, 16), 32: (1.0, 8), 64: (1.0, 4), 128: (1.0, 2)},
        "480p": {16: (1.0, 4), 32: (0.0, None)},
        "720p": {16: (0.5, 2)},
    }
    resolutions, counts = list(plan)[::-1], sorted({count for row in plan.values() for count in row})
    cell, height, left, top = 150, 66, 110, 70
    image = Image.new("RGB", (left + cell * len(counts) + 20, top + height * len(resolutions) + 84), PAPER)
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(15), ImageFont.load_default(12)
    draw.text((16, 16), "frames", INK, font)
    for column, count in enumerate(counts):
        draw.text((left + column * cell + 10, 40), f"{count} frames or more", INK, small)
    for row, name in enumerate(resolutions):
        y = top + row * height
        draw.text((16, y + 20), name, INK, font)
        for column, count in enumerate(counts):
            keep, batch = plan[name].get(count, (None, None))
            colour = (
                (244, 245, 247) if keep is None else tuple(int(255 - (255 - c) * (0.25 + 0.75 * keep)) for c in GIVEN)
            )
            at = left + column * cell
            draw.rectangle((at, y, at + cell - 8, y + height - 8), colour)
            if keep is not None:
                text = f"keep {keep:g}" + (f"\nbatches of {batch}" if batch else "\nnone is kept")
                draw.multiline_text((at + 10, y + 12), text, PAPER if keep > 0.4 else INK, small, spacing=4)
    y = top + height * len(resolutions) + 10
    lines = (
        "A clip is tried from the top row down. It enters a row with at least 0.8 of its pixels, and there the longest",
        "bucket whose frames it has: that takes it with probability keep, otherwise it goes on to the next row.",
        "keep 0 therefore sends long clips on. Each bucket is divided once more by aspect ratio.",
    )
    for number, text in enumerate(lines):
        draw.text((16, y + 18 * number), text, INK, small)
    return image


def main() -> None:
    gold = ((72, 62, 110), (226, 122, 92), (255, 204, 130)), ((150, 110, 110), (52, 50, 86))
    dusk = ((28, 30, 66), (110, 62, 108), (232, 120, 96)), ((96, 66, 100), (22, 24, 52))
    pictures = {"wave": wave(), "cliff": cliff(), "sunset1": sunset(0.40, *gold), "sunset2": sunset(0.58, *dusk)}
    condition, documents = ROOT / "assets/images/condition", ROOT / "docs/images"
    condition.mkdir(parents=True, exist_ok=True)
    for name, levels in pictures.items():
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
        image.save(condition / f"{name}.png", optimize=True)
    for name, scene in (("drive", drive), ("forest", forest)):
        frames = [scene(number / FPS)[::2, ::2].round().clip(0, 255).astype(np.uint8) for number in range(FRAMES)]
        (ROOT / "assets/videos/condition").mkdir(parents=True, exist_ok=True)
        write_video(np.stack(frames), ROOT / "assets/videos/condition" / f"{name}.mp4", FPS)
    for name, image in (("mask_strategy", mask_strategy()), ("buckets", buckets())):
        image.quantize(48).save(documents / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
