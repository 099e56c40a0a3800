"""Files of ids: python -m tools.scene_cut.convert_id_to_path TABLE --folder_path FOLDER, as `opensora data paths`.

Ids without a file have an empty path, which `opensora data edit --remove-empty-path` drops.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opensora.cli.parser import Parser
from tools.door import Door, refuse


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("meta_path", metavar="TABLE", help="table with the column id")
    parser.add_argument("--folder_path", "--folder-path", required=True, metavar="FOLDER", help="folder of the files")
    parser.add_argument("--num_workers", "--num-workers", type=int, help="has no effect: files are listed, not opened")
    remedy = "opensora data curate TABLE OUT --stages probe,health leaves out what cannot be decoded, with the reason"
    refuse(parser, f"files are not decoded here; {remedy}", "--mode")


def _command(args: argparse.Namespace) -> list[str]:
    source = Path(args.meta_path)
    return ["data", "paths", args.meta_path, args.folder_path, str(source.with_name(f"{source.stem}_path.csv"))]


DOOR = Door("tools.scene_cut.convert_id_to_path", _add_arguments, _command)

if __name__ == "__main__":
    sys.exit(DOOR.run())
