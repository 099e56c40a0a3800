"""Encodes a table of videos: python scripts/misc/extract_feat.py CONFIG --data-path TABLE --save-dir DIR [flags].

The same as `opensora extract`.
"""

import sys

from opensora.cli import main

if __name__ == "__main__":
    sys.exit(main(["extract", *sys.argv[1:]]))
