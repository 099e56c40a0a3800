"""serve: the pipeline over HTTP, with a page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from opensora.acceleration.device_names import check_device_name
from opensora.cli.parser import Parser
from opensora.cli.verbs.verb import Verb
from opensora.config.sections.common import MAX_STEPS
from opensora.errors import ConfigError
from opensora.serving.limits import Limits
from opensora.serving.server import serve

KEYS = "OPENSORA_API_KEY"  # environment variable; several keys are separated by commas
MB = 2**20
LIMITS = (
    "max_queued", "max_queued_per_key", "max_upload", "max_pixels", "max_steps", "max_batch", "keep_hours", "max_disk",
)  # fmt: skip


def _serve(args: argparse.Namespace) -> int:
    keys = [*(args.api_key or []), *filter(None, os.environ.get(KEYS, "").split(","))]
    devices = [] if args.devices == ["auto"] else args.devices
    for device in devices:
        check_device_name(device)
    serve(
        args.model or ["embedded"], args.host, args.port, Path(args.data), keys=keys, devices=devices,
        hosts=args.allow_host or [], adapters=args.lora or [], allow_anonymous=args.allow_anonymous,
        limits=_limits(args),
    )  # fmt: skip
    return 0


def _limits(args: argparse.Namespace) -> Limits:
    """The limits of the flags. Raises ConfigError."""
    for name in LIMITS:
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give a number above 0")
    return Limits(
        max_queued=args.max_queued, max_queued_per_key=args.max_queued_per_key, max_upload=args.max_upload * MB,
        max_pixels=args.max_pixels, max_steps=min(args.max_steps, MAX_STEPS), keep_seconds=args.keep_hours * 3_600,
        max_disk=args.max_disk * MB, max_batch=args.max_batch,
    )  # fmt: skip


def _add_serve(parser: Parser) -> None:
    group, default = parser.group("server"), Limits()
    group.add_argument(
        "--model", nargs="+", metavar="MODEL", help="names that `opensora models` prints, or configurations [embedded]"
    )
    text = "adapters that requests may name, FILE or NAME=FILE [none]"
    group.add_argument("--lora", nargs="+", metavar="FILE", help=text)
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on [127.0.0.1]")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on; 0: a free one [8000]")
    text = "a key that clients must give; better in the environment variable OPENSORA_API_KEY [none]"
    group.add_argument("--api-key", action="append", metavar="KEY", help=text)
    text = "let anybody in who can reach an address that is not the loopback [no]"
    group.add_argument("--allow-anonymous", action="store_true", help=text)
    text = "another name by which browsers may call a server without keys [none]"
    group.add_argument("--allow-host", action="append", metavar="NAME", help=text)
    text = "devices, one worker each: auto takes all [auto]"
    group.add_argument("--devices", nargs="+", default=["auto"], metavar="TEXT", help=text)
    text = "folder of the queue, the results and the uploads [./serve]"
    group.add_argument("--data", default="./serve", metavar="FOLDER", help=text)
    limits = parser.group("limits")
    for name, value, text in (
        ("max_queued", default.max_queued, "jobs that wait"),
        ("max_queued_per_key", default.max_queued_per_key, "jobs that wait, of one key"),
        ("max_upload", default.max_upload // MB, "megabytes of a request"),
        ("max_pixels", default.max_pixels, "pixels of a result, over all frames"),
        ("max_steps", default.max_steps, "steps of a request"),
        ("max_batch", default.max_batch, "jobs of one size that are computed together, where that is faster"),
        ("keep_hours", default.keep_seconds // 3_600, "hours until a result is deleted"),
        ("max_disk", default.max_disk // MB, "megabytes of results and uploads; the oldest results are deleted first"),
    ):
        flag = f"--{name.replace('_', '-')}"
        limits.add_argument(flag, type=int, default=value, metavar="N", help=f"{text} [{value}]")


VERBS = {
    "serve": Verb(
        "serve videos over HTTP, as OpenAI's client speaks it, with a page", "opensora serve", _add_serve, _serve
    )
}
