"""What is right and what is flawed in a clip that should show a given world."""

from __future__ import annotations

from typing import NamedTuple

from opensora.datasets.synthetic.flaws import Flaws
from opensora.datasets.synthetic.world.quality import Array, find_flaws
from opensora.datasets.synthetic.world.recognize import recognize
from opensora.datasets.synthetic.world.render import World
from opensora.datasets.synthetic.world.scenes import PICTURES

ALL = "all together"


class Verdict(NamedTuple):
    """What was seen, and whether it is as wanted, by name; flaws of a clip with a single thing that was recognized."""

    seen: dict[str, str | None]
    right: dict[str, bool]
    flaws: Flaws | None


def assess(world: World, video: Array) -> Verdict:
    """Looks for `world` in `video`, uint8 [T, H, W, 3]: thing, colour, scene, and where they show motion and camera.

    Of two things each is looked for by its colour, so their colours count with the things.
    """
    subject, others = world.actors[0], world.actors[1:]
    found = recognize(video, subject.colour if others else None)
    wanted: dict[str, str] = {"thing": subject.thing, "colour": subject.colour, "scene": world.scene}
    seen: dict[str, str | None] = {"thing": found.thing, "colour": found.colour, "scene": found.scene}
    if len(video) > 1:
        wanted["motion"], seen["motion"] = subject.motion, found.motion
        if world.scene in PICTURES:
            wanted["camera"], seen["camera"] = world.camera, found.camera
    for other in others:
        wanted["second thing"], seen["second thing"] = other.thing, recognize(video, other.colour).thing
    right = {name: seen[name] == value for name, value in wanted.items()}
    right[ALL] = all(right.values())
    return Verdict(seen, right, None if others else find_flaws(video, found))
