"""Writes a model for inference from a training run: python scripts/misc/export.py CHECKPOINT DST [--dtype fp16].

The same as `opensora export`.
"""

import sys

from opensora.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
