"""Captions by a local model behind a server: python -m tools.caption.caption_llava TABLE --url URL --model NAME.

The same as `opensora data curate ... --stages captions`.
"""

import sys

from opensora.cli.parser import Parser
from tools.caption.caption_gpt4 import add_server_arguments, captioned
from tools.door import Door, refuse


def _add_arguments(parser: Parser) -> None:
    add_server_arguments(parser, None)
    reason = "the server places and batches its model; opensora data curate --set captions.concurrency=N asks N at once"
    refuse(parser, reason, "--dp-size", "--tp-size", "--prefetch-factor", "--resize")


DOOR = Door("tools.caption.caption_llava", _add_arguments, lambda args: captioned(args, "llava"))

if __name__ == "__main__":
    sys.exit(DOOR.run())
