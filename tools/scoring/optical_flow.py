"""Motion scores: python -m tools.scoring.optical_flow TABLE, as `opensora data curate ... --stages motion`."""

import sys

from tools.door import Door, add_stage_arguments, curated

DOOR = Door("tools.scoring.optical_flow", add_stage_arguments, lambda args: curated(args, "motion", "flow"))

if __name__ == "__main__":
    sys.exit(DOOR.run())
