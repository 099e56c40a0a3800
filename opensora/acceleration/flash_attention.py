"""Attention kernels of installed packages, called through PyTorch."""

from __future__ import annotations

import torch
from torch.nn import attention

from opensora.errors import ConfigError


def use_attention(name: str | None) -> None:
    """Makes PyTorch's attention call the kernels registered as `name`, in the whole process; None changes nothing.

    Raises ConfigError if this PyTorch does not know the name, or the package is missing or not for this device.
    """
    if name is None:
        return
    known = getattr(attention, "list_flash_attention_impls", list)()
    if name not in known:
        remedy = f"it knows {', '.join(known)}" if known else "use a later one"
        raise ConfigError(f"attention '{name}' is not known to PyTorch {torch.__version__}; {remedy}")
    try:
        attention.activate_flash_attention_impl(name)
    except Exception as error:  # the package and its dependencies raise anything
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"attention '{name}' cannot be used here ({reason}); leave it out") from error
