"""Encodes a table of videos: python scripts/misc/extract_feat.py CONFIG --data-path TABLE --save-dir DIR [flags]."""

import sys

from opensora.training.extract import ExtractSettings, extract
from opensora.utils.config_utils import Parser, add_flags, run_program, settings_of


def main() -> None:
    parser = Parser(description="Encode the videos and captions of a table once, for training from the features.")
    parser.add_argument("config", help="configuration file, or its name below configs/")
    add_flags(parser, ExtractSettings)
    print(extract(settings_of(ExtractSettings, parser.parse_args())))


if __name__ == "__main__":
    sys.exit(run_program(main))
