"""The kinds of devices by name. Imports no torch: an unknown name is refused before that."""

from __future__ import annotations

import re

from opensora.errors import ConfigError, did_you_mean

# Kind of device -> the package that adds it to PyTorch; None for built-in ones.
PACKAGES = {"cpu": None, "cuda": None, "mps": None, "xpu": None, "npu": "torch_npu", "gcu": "torch_gcu"}


def check_device_name(name: str | None) -> None:
    """Raises ConfigError unless `name` is a known kind of device, with or without an index, or None."""
    if name is None or re.fullmatch(rf"({'|'.join(PACKAGES)})(:[0-9]{{1,3}})?", name):
        return
    kind = name.partition(":")[0]
    if kind in PACKAGES:
        raise ConfigError(f"device {name!r} is not valid; write '{kind}', or '{kind}:0' for the first one")
    near = did_you_mean(kind, PACKAGES) or ";"
    raise ConfigError(f"device {name!r} is not known{near} choose one of {', '.join(PACKAGES)}")


def names_cpu(name: str | None) -> bool:
    """Whether a name is that of the host's processor."""
    return name == "cpu"
