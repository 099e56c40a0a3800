"""Camera motion: python -m tools.caption.camera_motion TABLE; the same as tools.caption.camera_motion_detect."""

import sys

from tools.caption import camera_motion_detect

DOOR = camera_motion_detect.DOOR._replace(name="tools.caption.camera_motion")

if __name__ == "__main__":
    sys.exit(DOOR.run())
