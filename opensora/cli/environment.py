"""Describes the environment for bug reports: versions, devices, codecs, caches and variables.

Nothing secret is shown: of keys and tokens only whether they are set, of paths no user name.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from opensora import __version__
from opensora.config import find_config
from opensora.distributed.ranks import ranks
from opensora.errors import OpenSoraError
from opensora.files import cache_path

MAX_FILES = 100_000  # of a cache that are counted
SHOWN_VARIABLES = (
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHDYNAMO_DISABLE",
)  # fmt: skip
SECRET_VARIABLES = ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")
RANK_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ENCODERS = ("libx264", "libx265", "libvpx-vp9", "libsvtav1")
DECODERS = ("h264", "hevc", "vp9", "av1", "mpeg4", "prores")


class Entry(NamedTuple):
    """One line of the report. `problem` says what to do; with `broken`, nothing can be generated before that."""

    name: str
    value: str
    problem: str = ""
    broken: bool = False


def describe_environment() -> dict[str, list[Entry]]:
    """The report: section -> entries. Never raises; a section that fails has a broken entry."""
    sections: dict[str, Callable[[], Iterator[Entry]]] = {
        "system": _system, "packages": _packages, "optional": _optional_packages, "devices": _devices,
        "codecs": _codecs, "model": _embedded_model, "caches": _caches, "variables": _variables, "ranks": _ranks,
    }  # fmt: skip
    return {title: list(_guarded(section)) for title, section in sections.items()}


def _guarded(section: Callable[[], Iterator[Entry]]) -> Iterator[Entry]:
    """The entries of a section, and a broken one in place of an exception, which libraries may raise on import."""
    try:
        yield from section()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        yield Entry(type(error).__name__, without_user(reason), "reinstall opensora in a new environment", broken=True)


def without_user(text: str) -> str:
    """A text with `~` for the home folder and `USER` for the user's name in paths."""
    home = str(Path("~").expanduser())
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?=[/\\:]|$)", "~", text)
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME")} | {Path(home).name}
    for name in filter(None, names):
        text = re.sub(rf"(?<=[/\\]){re.escape(name)}(?=[/\\:]|$)", "USER", text)
    return text


def _system() -> Iterator[Entry]:
    yield Entry("opensora", __version__)
    yield Entry("Python", platform.python_version(), *_too_old("python", sys.version_info[:2], (3, 10)))
    yield Entry("platform", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield Entry("installed in", without_user(str(Path(__file__).parents[1])))


def _packages() -> Iterator[Entry]:
    for name, bounds, extra in _requirements():
        if not extra:
            yield _package(name, bounds, f"pip install '{name}{bounds}'", broken=True)


def _optional_packages() -> Iterator[Entry]:
    for name, bounds, extra in _requirements():
        if extra and extra != "dev":
            yield _package(name, bounds, f"pip install 'opensora[{extra}]'", broken=False)


def _requirements() -> Iterator[tuple[str, str, str]]:
    """Name, version bounds and extra of each requirement of the installed package."""
    for text in metadata.requires("opensora") or ():
        requirement, _, marker = text.partition(";")
        found = re.fullmatch(r"([\w.-]+)\s*\(?([^()]*?)\)?\s*", requirement.strip())
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        if found:
            yield found[1], found[2], extra[1] if extra else ""


def _package(name: str, bounds: str, remedy: str, broken: bool) -> Entry:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Entry(name, "missing", remedy, broken)
    release = _release(version)
    fits = all(
        release >= _release(bound) if sign == ">=" else release < _release(bound)
        for sign, bound in re.findall(r"(>=|<)\s*([\d.]+)", bounds)
    )
    return Entry(name, version) if fits else Entry(name, version, remedy, broken)


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _too_old(name: str, version: tuple[int, ...], least: tuple[int, ...]) -> tuple[str, bool]:
    too_old = version < least
    return (f"needs {name} {'.'.join(map(str, least))} or newer", True) if too_old else ("", False)


def _devices() -> Iterator[Entry]:
    import torch

    from opensora.profiling.memory_meter import free_on_host

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = f"{cores} cores, {torch.get_num_threads()} threads"
    with suppress(OSError, KeyError):
        host += f", {_size(free_on_host())} of memory free"
    yield Entry("host", host)
    if not torch.accelerator.is_available():
        yield Entry("accelerator", "none that this PyTorch can use")
        return
    kind = torch.accelerator.current_accelerator()
    module = torch.get_device_module(kind)
    for index in range(torch.accelerator.device_count()):
        name = getattr(module, "get_device_name", lambda index: "")(index)
        try:
            free, total = module.mem_get_info(index)
            memory = f"{_size(free)} of {_size(total)} free"
        except (AttributeError, RuntimeError) as error:
            memory = f"memory unknown ({type(error).__name__})"
        yield Entry(f"{kind}:{index}", ", ".join(filter(None, (name, memory))))


def _codecs() -> Iterator[Entry]:
    import av

    yield Entry("libavcodec", ".".join(map(str, av.library_versions["libavcodec"])))
    encoders = [name for name in ENCODERS if _has_codec(name, "w")]
    broken = "libx264" not in encoders
    remedy = "reinstall PyAV from its wheel: pip install --force-reinstall av" if broken else ""
    yield Entry("encoders", " ".join(encoders) or "none", remedy, broken)
    yield Entry("decoders", " ".join(name for name in DECODERS if _has_codec(name, "r")) or "none")


def _has_codec(name: str, mode: Literal["r", "w"]) -> bool:
    import av

    try:
        av.Codec(name, mode)
    except ValueError:
        return False
    return True


def _embedded_model() -> Iterator[Entry]:
    folder = Path(__file__).parents[1] / "embedded"
    for part in ("stdit3", "vae", "text_encoder"):
        file = folder / part / "model.safetensors"
        found = file.is_file()
        remedy = "" if found else "reinstall opensora"
        yield Entry(part, _size(file.stat().st_size) if found else "missing", remedy, broken=not found)
    try:
        yield Entry("configuration", without_user(str(find_config("embedded"))))
    except OpenSoraError as error:
        yield Entry("configuration", without_user(str(error)), "reinstall opensora", broken=True)


def _caches() -> Iterator[Entry]:
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    repositories = len(list(hub.glob("models--*")))
    yield Entry("hub", f"{without_user(str(hub))}, {repositories} repositories, {_folder_size(hub)}")
    own = cache_path()
    yield Entry("run times", f"{without_user(str(own))}, {_folder_size(own)}")


def _folder_size(folder: Path) -> str:
    """The size of a folder, links not followed; a lower bound above MAX_FILES."""
    total, count = 0, 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
            count += 1
        if count > MAX_FILES:
            return f"more than {_size(total)}"
    return _size(total)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _variables() -> Iterator[Entry]:
    for name in SHOWN_VARIABLES:
        if value := os.environ.get(name):
            yield Entry(name, without_user(value)[:100])
    for name in SECRET_VARIABLES:
        if os.environ.get(name):
            yield Entry(name, "set, not shown")


def _ranks() -> Iterator[Entry]:
    try:
        found = ranks(connecting=True)
    except OpenSoraError as error:
        yield Entry("torchrun", ", ".join(n for n in RANK_VARIABLES if n in os.environ), str(error), broken=True)
        return
    place = f"rank {found.rank} of {found.world_size}, local rank {found.local_rank}"
    yield Entry("torchrun", place if found.world_size > 1 else "one process")
