"""Scene cuts: python -m tools.scene_cut.scene_detect TABLE, as `opensora data curate ... --stages scenes`.

The result has a row for each scene, with start_pts and end_pts, instead of a column `timestamp`.
"""

import sys

from tools.door import Door, add_stage_arguments, curated

DOOR = Door("tools.scene_cut.scene_detect", add_stage_arguments, lambda args: curated(args, "scenes", "timestamp"))

if __name__ == "__main__":
    sys.exit(DOOR.run())
