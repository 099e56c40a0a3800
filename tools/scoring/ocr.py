"""Text in the picture: python -m tools.scoring.ocr TABLE, as `opensora data curate ... --stages text`."""

import sys

from tools.door import Door, add_stage_arguments, curated

DOOR = Door("tools.scoring.ocr", add_stage_arguments, lambda args: curated(args, "text", "ocr"))

if __name__ == "__main__":
    sys.exit(DOOR.run())
