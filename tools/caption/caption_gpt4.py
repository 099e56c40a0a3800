"""Captions by a server with OpenAI's API: python -m tools.caption.caption_gpt4 TABLE --model NAME [--url URL].

The same as `opensora data curate ... --stages captions`. The key is OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import sys

from opensora.cli.parser import Parser
from tools.door import Door, add_stage_arguments, curated, refuse

OPENAI = "https://api.openai.com/v1"


def add_server_arguments(parser: Parser, url: str | None) -> None:
    """The table, the server and the model."""
    add_stage_arguments(parser)
    parser.add_argument("--url", default=url, metavar="URL", help=f"server with OpenAI's API [{url or 'none'}]")
    parser.add_argument("--model", "--model-path", "--model_path", metavar="NAME", help="name of the model there")
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask [that of the stage captions]")
    reason = "a key on the command line is seen by every user of the machine; set OPENAI_API_KEY for opensora"
    refuse(parser, reason, "--key")


def captioned(args: argparse.Namespace, suffix: str) -> list[str]:
    """`data curate` with the stage captions, and a request per process at once."""
    given = {"url": args.url, "model": args.model, "prompt": args.prompt}
    return curated(args, "captions", suffix, *(f"captions.{name}={value}" for name, value in given.items() if value))


DOOR = Door(
    "tools.caption.caption_gpt4",
    lambda parser: add_server_arguments(parser, OPENAI),
    lambda args: captioned(args, "caption"),
)

if __name__ == "__main__":
    sys.exit(DOOR.run())
