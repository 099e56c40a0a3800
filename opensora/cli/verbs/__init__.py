"""The verbs of `opensora`, grouped by what they work on. Each module declares arguments and actions side by side."""

from __future__ import annotations

from opensora import __version__
from opensora.cli.parser import Parser
from opensora.cli.verbs import checkpoints, data, datasets, doctor, generation, serving, training
from opensora.cli.verbs.verb import Verb, add_verbs

VERBS: dict[str, Verb] = {
    **generation.VERBS, **checkpoints.VERBS, **training.VERBS, **datasets.VERBS, **data.VERBS,
    **serving.VERBS, **doctor.VERBS,
}  # fmt: skip


def make_parser() -> Parser:
    """The command line parser; parsed arguments carry the verb's action as `run`."""
    example = generation.VERBS["generate"].example
    parser = Parser(prog="opensora", description="Text, image or video in, video out.", example=example)
    parser.add_argument("--version", action="version", version=__version__)
    add_verbs(parser, VERBS, "VERB")
    return parser
