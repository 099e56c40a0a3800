"""Trains a video autoencoder: python scripts/train_vae.py CONFIG [--load EXPERIMENT] [flags]."""

import sys

from opensora.cli.program import run_program
from opensora.cli.verbs import training
from opensora.utils.config_utils import parse_train_args

if __name__ == "__main__":
    sys.exit(run_program(lambda: training.train_vae(parse_train_args())))
