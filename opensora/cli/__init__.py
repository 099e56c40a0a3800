"""The `opensora` command: each verb parses its flags, calls the package and prints paths."""

from __future__ import annotations

from collections.abc import Sequence

from opensora.cli.program import run_program
from opensora.cli.verbs import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns its exit status: 0 on success, 1 on a user error, 128 + n on stop signal n.

    A wrong command line raises SystemExit with status 2.
    """

    def program() -> int:
        args = make_parser().parse_args(argv)
        status: int = args.run(args)
        return status

    return run_program(program)
