"""Attention kernels of installed packages, called through PyTorch."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch.nn import attention
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from opensora.errors import ConfigError

# Registered kernels replace flash attention's. PyTorch prefers cuDNN's to them on some devices, such as an H100.
ORDER = [
    SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.OVERRIDEABLE,
    SDPBackend.MATH,
]  # fmt: skip
_preference = ExitStack()  # holds PyTorch's context of the order, which lasts as long as the process


def use_attention(name: str | None, device: torch.device) -> None:
    """Makes PyTorch's attention prefer the kernels registered as `name`, in the whole process; None changes nothing.

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
        raise ConfigError(f"attention '{name}' cannot be used here ({reason}); remove it") from error
    scaled_dot_product_attention(*(torch.zeros(1, 1, 8, 8, device=device),) * 3)  # the first call sets an order itself
    _preference.close()
    _preference.enter_context(attention.sdpa_kernel(ORDER, set_priority=True))
