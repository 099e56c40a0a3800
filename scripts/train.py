"""Trains a diffusion model: python scripts/train.py CONFIG [--load EXPERIMENT] [flags]."""

import sys

from opensora.cli.program import run_program
from opensora.cli.verbs import training
from opensora.utils.config_utils import parse_train_args

if __name__ == "__main__":
    sys.exit(run_program(lambda: training.train(parse_train_args())))
