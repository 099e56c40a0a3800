"""serve: the pipeline over HTTP, with a page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from opensora.acceleration.device_names import check_device_name
from opensora.cli.parser import Parser
from opensora.cli.verbs.verb import Verb
from opensora.config.sections.common import MAX_STEPS
from opensora.distributed.ray_cluster import check_ray
from opensora.errors import ConfigError
from opensora.remote.chat import Endpoint, find_endpoint
from opensora.serving.limits import Limits
from opensora.serving.server import serve
from opensora.serving.worker_program import RayCluster

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
        limits=_limits(args), cluster=_cluster(args), language_model=_language_model(args),
    )  # fmt: skip
    return 0


def _cluster(args: argparse.Namespace) -> RayCluster | None:
    """The Ray cluster of the flags. Raises ConfigError for flags that contradict each other, and without Ray."""
    if args.executor == "local":
        if args.address is not None or args.workers is not None:
            raise ConfigError("--address and --workers belong to a Ray cluster; give --executor ray with them")
        return None
    check_ray()
    if args.devices != ["auto"]:
        raise ConfigError("--devices names devices of this machine, but Ray chooses them; remove it, or --executor ray")
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}; give a number above 0")
    return RayCluster(args.address or "auto", args.workers)


def _language_model(args: argparse.Namespace) -> Endpoint | None:
    """The language model that refines prompts. Raises ConfigError where something that it needs is missing."""
    if args.llm_refine:
        return find_endpoint(args.llm_base_url, args.llm_model, "--llm-refine")
    if args.llm_base_url is not None or args.llm_model is not None:
        raise ConfigError("--llm-base-url and --llm-model name a language model; give --llm-refine with them")
    return None


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
    text = "where jobs are computed: on this machine, or by actors on a Ray cluster [local]"
    group.add_argument("--executor", choices=("local", "ray"), default="local", help=text)
    text = "of the Ray cluster [the one that this machine belongs to]"
    group.add_argument("--address", metavar="ADDRESS", help=text)
    text = "actors of the Ray cluster [one a GPU, without GPUs one a machine]"
    group.add_argument("--workers", type=int, metavar="N", help=text)
    text = "folder of the queue, the results and the uploads [./serve]"
    group.add_argument("--data", default="./serve", metavar="FOLDER", help=text)
    text = "let a language model rewrite prompts for those who ask; its key is OPENAI_API_KEY [no]"
    group.add_argument("--llm-refine", action="store_true", help=text)
    text = "server of the language model, with OpenAI's chat completions API [OPENAI_BASE_URL]"
    group.add_argument("--llm-base-url", metavar="URL", help=text)
    group.add_argument("--llm-model", metavar="TEXT", help="name of the language model [OPENAI_MODEL]")
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
