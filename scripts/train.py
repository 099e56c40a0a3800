"""Trains a diffusion model: python scripts/train.py CONFIG [--load EXPERIMENT] [flags]."""

import sys

from opensora.cli import train
from opensora.utils.config_utils import parse_train_args, run_program

if __name__ == "__main__":
    sys.exit(run_program(lambda: train(parse_train_args())))
