"""A restricted interpreter of pickled state dicts: nothing that they name is imported or called.

It supports the few opcodes that state dicts need, with a limit on steps, and turns each tensor into a `TensorView`.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch

MAX_STEPS = 300_000  # about 25 per tensor
MAX_DEPTH = 100  # nested marks
MAX_AXES = 64

_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
}  # fmt: skip
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
UNTYPED = "torch.storage.UntypedStorage"
OF_TYPE = "torch._tensor._rebuild_from_type_v2"
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# Known calls whose result is not a plain tensor, and what it is.
UNSUPPORTED = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor", "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a special class",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "torch.device": "a device", "torch.serialization._get_layout": "a layout", "torch.Size": "a shape",
    "_codecs.encode": "bytes", "builtins.bytearray": "bytes", "builtins.set": "a set", "builtins.complex": "a number",
    "__builtin__.set": "a set", "__builtin__.complex": "a number", "collections.Counter": "a counter",
}  # fmt: skip
NAMED_ONLY = {"torch.Tensor", "torch.nn.parameter.Parameter", UNTYPED, *STORAGES, *DTYPES}
NAMED_ONLY |= {f"torch.{kind}Storage" for kind in ("QInt8", "QUInt8", "QInt32")}
NAMED_ONLY |= {f"torch.per_{kind}" for kind in ("tensor_affine", "channel_affine", "tensor_symmetric")}
INTEGERS = {getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
KEYS = (str, int, float, bool, type(None), bytes)  # allowed types of dict keys


class CorruptFileError(Exception):
    """The file is corrupt or unsupported."""


class UnsafePickleError(Exception):
    """The file refers to something that would have to be imported."""


class Global(NamedTuple):
    """A name that the pickle refers to."""

    name: str


class Storage(NamedTuple):
    """A storage: its key in the file, its size in bytes, and its dtype (None: given by its tensors)."""

    key: str
    num_bytes: int
    dtype: torch.dtype | None


class TensorView(NamedTuple):
    """A tensor as a strided view of a storage. Offset and strides count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


class Unsupported(NamedTuple):
    """Stands for a value that is not a number, text, list, dict or plain tensor."""

    what: str


class PickleInterpreter:
    """Interprets pickles; collects the storages they refer to, by key."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._spent = 0

    def run(self, stream: BinaryIO) -> Any:
        """The value of the next pickle in a stream, with TensorView and Unsupported for what is not plain data.

        Raises UnsafePickleError or CorruptFileError.
        """
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._spend(1)
                self._step(opcode.name, argument)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CorruptFileError(f"its pickle cannot be read: {error or type(error).__name__}") from error
        raise CorruptFileError("its pickle has no end")

    def _spend(self, steps: int) -> None:
        self._spent += steps
        if self._spent > MAX_STEPS:
            raise CorruptFileError(f"its pickle takes more than {MAX_STEPS:,} steps")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BINUNICODE" | "BININT1" | "BININT" | "BININT2" | "LONG1" | "BINFLOAT" | "SHORT_BINSTRING":
                stack.append(argument)
            case "MARK":
                if len(self._below) >= MAX_DEPTH:
                    raise CorruptFileError("its pickle is nested too deep")
                self._below.append(stack)
                self._stack = []
            case "TUPLE":
                items = tuple(self._pop_to_mark())
                self._stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._pack_tuple(int(name[-1]))
            case "REDUCE":
                self._reduce(stack.pop(-2), stack.pop())
            case "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            case "GLOBAL":
                stack.append(_named(argument))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append(
                    {"TUPLE": (), "LIST": [], "DICT": {}, "SET": Unsupported("a set")}[name.removeprefix("EMPTY_")]
                )
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                self._update([stack.pop(-2), stack.pop()])
            case "SETITEMS":
                self._update(self._pop_to_mark())
            case "BUILD":  # attributes such as _metadata, which are ignored
                stack.pop()
            case "PROTO":
                pass
            case _:
                raise CorruptFileError(f"its pickle uses {name}, which state dicts do not need")

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _pack_tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError("nothing is left on the stack")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError("an object that is not a list is appended to")
        self._stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not dict:
            raise TypeError("items are set in an object that is not a dict")
        self._stack[-1].update(_ordered(zip(items[::2], items[1::2], strict=True)))

    def _reduce(self, function: Any, arguments: Any) -> None:
        if type(function) is not Global or type(arguments) is not tuple:
            raise TypeError("an object that is not a function is called")
        self._spend(sum(len(one) for one in arguments if isinstance(one, list | tuple)))
        self._stack.append(_called(function.name, arguments))

    def _storage(self, kind: Any, storage: Any, key: Any, _location: Any, count: Any, view: Any = None) -> Any:
        if kind != "storage" or type(storage) is not Global or not isinstance(key, str) or view is not None:
            raise TypeError("a persistent id does not name a storage")
        dtype = STORAGES.get(storage.name)
        found = Storage(key, _size(count) * (dtype.itemsize if dtype else 1), dtype)
        if self.storages.setdefault(key, found).num_bytes != found.num_bytes:
            raise ValueError("a storage has two sizes")
        return found if dtype or storage.name == UNTYPED else Unsupported("a quantized storage")


def _named(argument: str) -> Global:
    name = argument.replace(" ", ".")
    if name not in NAMED_ONLY and name not in UNSUPPORTED and name not in _CALLS:
        raise UnsafePickleError(name)
    return Global(name)


def _called(name: str, arguments: tuple[Any, ...]) -> Any:
    if name not in UNSUPPORTED and name not in _CALLS:
        raise UnsafePickleError(name)
    return Unsupported(UNSUPPORTED[name]) if name in UNSUPPORTED else _CALLS[name](*arguments)


def _view(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None,
    metadata: Any = None,
) -> TensorView | Unsupported:  # fmt: skip
    return _typed_view(storage, offset, size, stride, getattr(storage, "dtype", None), metadata)


def _view_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorView | Unsupported:
    return _typed_view(storage, offset, size, stride, DTYPES[dtype.name], metadata)


def _typed_view(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, metadata: Any
) -> TensorView | Unsupported:
    if isinstance(storage, Unsupported):
        return Unsupported("a quantized tensor")
    if metadata:
        return Unsupported("a conjugate or negative view")
    if not isinstance(storage, Storage) or dtype is None:
        raise TypeError("a tensor has no storage")
    if not (dtype.is_floating_point or dtype in INTEGERS or dtype == torch.bool):
        return Unsupported(
            "a complex tensor" if dtype.is_complex else f"a tensor of {str(dtype).removeprefix('torch.')}"
        )
    view = TensorView(storage, dtype, _size(offset), tuple(map(_size, size)), tuple(map(_size, stride)))
    if len(view.size) != len(view.stride) or len(view.size) > MAX_AXES:
        raise ValueError("a tensor has a shape without strides")
    steps = zip(view.size, view.stride, strict=True)
    last = view.offset + sum((count - 1) * step for count, step in steps)
    if 0 not in view.size and (last + 1) * dtype.itemsize > storage.num_bytes:
        raise ValueError("a tensor exceeds its storage")
    return view


def _of_type(function: Global, _kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor subclass or a tensor with attributes, as a plain tensor."""
    if function.name == OF_TYPE:
        raise TypeError("a tensor refers to itself")
    return _called(function.name, arguments)


def _ordered(items: Any = ()) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in items:
        if type(key) not in KEYS:
            raise TypeError("a dict has keys that are neither strings nor numbers")
        found[key] = value
    return found


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a size is not an integer")
    return value


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_v3,
    "torch._utils._rebuild_parameter": lambda view, *_: view,
    "torch._utils._rebuild_parameter_with_state": lambda view, *_: view,
    OF_TYPE: _of_type,
}
