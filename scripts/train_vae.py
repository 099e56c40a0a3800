"""Trains a video autoencoder: python scripts/train_vae.py CONFIG [--load EXPERIMENT] [flags]."""

import sys

from opensora.cli import train_vae
from opensora.utils.config_utils import parse_train_args, run_program

if __name__ == "__main__":
    sys.exit(run_program(lambda: train_vae(parse_train_args())))
