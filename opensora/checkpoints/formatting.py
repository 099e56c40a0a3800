"""Tensors and lists of names in messages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opensora.acceleration.packed_tensor import PackedTensor
from opensora.errors import printable

MAX_NAME = 120  # characters of a name


def dtype_name(tensor: Tensor) -> str:
    """The dtype, such as "float32"; of a packed weight its format, such as "Q4_K"."""
    if isinstance(tensor, PackedTensor):
        return tensor.format
    return str(tensor.dtype).removeprefix("torch.")


def shape(tensor: Tensor) -> str:
    """Dtype and shape, such as "float32 [2, 3]"."""
    return f"{dtype_name(tensor)} [{', '.join(map(str, tensor.shape))}]"


def join_first(words: Sequence[str], limit: int = 10, separator: str = ", ") -> str:
    """The first `limit` items on one line, and how many more there are."""
    more = f"{separator}and {len(words) - limit:,} more" if len(words) > limit else ""
    return separator.join(map(_short, words[:limit])) + more


def _short(word: str) -> str:
    word = " ".join(printable(word[: 2 * MAX_NAME]).split()) if not word.isprintable() else word
    return word if len(word) <= 2 * MAX_NAME else f"{word[:MAX_NAME]}..."
