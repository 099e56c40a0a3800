"""Reader of configuration files: MMEngine-style `.py` files as plain data, without running them.

Allowed are literals, `dict(...)`, names assigned earlier, arithmetic, and `_base_`. Names that start with `_` stay
private to the file.
"""

from __future__ import annotations

import ast
import operator
from pathlib import Path
from typing import Any

from opensora.errors import ConfigError, did_you_mean

MAX_SIZE = 1_000_000  # bytes of one file, and values and characters in it, counted as often as they are referred to
MAX_DEPTH = 50
MAX_INT_BITS = 1024
_REMEDY = "write a plain value, or run the file with --trust-config (pip install 'opensora[mmengine]')"
_SHORT_NAMES = {"embedded": "embedded/inference/sample.py"}
_NOT_ALLOWED = {
    **dict.fromkeys(("Import", "ImportFrom"), "an import"),
    **dict.fromkeys(("ListComp", "DictComp", "SetComp", "GeneratorExp"), "a comprehension"),
    **dict.fromkeys(("Lambda", "FunctionDef"), "a function"),
    "Call": "a call other than dict(key=value)", "Attribute": "attribute access", "Subscript": "indexing",
    "JoinedStr": "an f-string", "BinOp": "this operator", "Dict": "`**` in a dict", "ClassDef": "a class",
}  # fmt: skip
_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


def read_config(path: str | Path, trust: bool = False) -> dict[str, Any]:
    """The settings of a configuration file as nested dicts, with its `_base_` files merged in.

    With `trust` the file is run as a program by mmengine-lite instead. Raises ConfigError naming file and line.
    """
    if not trust:
        return _read(Path(path), ())
    try:
        from mmengine.config import Config
    except ImportError as error:
        raise ConfigError("--trust-config needs mmengine-lite; pip install 'opensora[mmengine]'") from error
    return Config.fromfile(str(path)).to_dict()


def find_config(name: str | Path) -> Path:
    """The file for a path, a name below `configs/` (with or without `configs/` and `.py`), or the word `embedded`."""
    wanted = str(name).replace("\\", "/").removeprefix("./").removeprefix("configs/")
    wanted = _SHORT_NAMES.get(wanted, wanted)
    package = Path(__file__).parents[1]
    packaged = (package / "configs").is_dir()  # an installed wheel brings them along; else they lie in the repository
    folder = (package if packaged else package.parent) / "configs"
    for candidate in (Path(name), folder / wanted, folder / f"{wanted}.py"):
        if candidate.is_file():
            return candidate
    known = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.py"))
    raise ConfigError(f"configuration '{name}' does not exist{did_you_mean(wanted, [*known, *_SHORT_NAMES])}")


def merge_configs(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """`child` over `base`, dicts recursively; a child dict with `_delete_=True` replaces the base's one whole."""
    merged = {} if child.get("_delete_") else dict(base)
    for key, value in child.items():
        if isinstance(value, dict):
            below = merged.get(key)
            value = merge_configs(below if isinstance(below, dict) else {}, value)
        if key != "_delete_":
            merged[key] = value
    return merged


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in parents:
        raise ConfigError(f"{path}: _base_ leads back to itself through {' -> '.join(p.name for p in parents)}")
    names = _Reader(path).names
    bases = names.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list | tuple) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: _base_ must be a path or a list of paths, not {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge_configs(merged, _read(path.parent / base, (*parents, path.resolve())))
    return merge_configs(merged, {name: value for name, value in names.items() if not name.startswith("_")})


class _Reader:
    """Evaluates one file statement by statement; the result is `names`."""

    def __init__(self, path: Path) -> None:
        self.path, self.room = path, MAX_SIZE
        self.names: dict[str, Any] = {}
        for statement in self._parse().body:
            try:
                self._execute(statement)
            except (ArithmeticError, TypeError, RecursionError) as error:
                raise self._error(statement, f"cannot be computed ({error})") from error

    def _parse(self) -> ast.Module:
        if not self.path.is_file():  # devices and pipes never end
            raise ConfigError(f"{self.path}: no such file")
        if self.path.stat().st_size > MAX_SIZE:
            raise ConfigError(f"{self.path}: larger than {MAX_SIZE} bytes; not a configuration")
        try:
            return ast.parse(self.path.read_text(encoding="utf-8-sig"))
        except SyntaxError as error:
            raise ConfigError(f"{self.path}:{error.lineno or 1}: not valid Python: {error.msg}") from error
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(f"{self.path}: cannot be read: {error}") from error

    def _execute(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Expr(value=ast.Constant()):
                return  # a docstring
            case ast.Assign(targets=targets) if all(isinstance(target, ast.Name) for target in targets):
                value = self._value(statement.value)
                self._count(value, statement)
                self.names |= {target.id: value for target in targets}
            case ast.Assign():
                raise self._error(statement, f"only plain names can be assigned; {_REMEDY}")
            case _:
                raise self._refuse(statement.value if isinstance(statement, ast.Expr) else statement)

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=None | str() | int() | float() as value):
                return self._number(node, value) if isinstance(value, int) else value
            case ast.Name(id=name):
                if name not in self.names:
                    raise self._error(node, f"'{name}' is not assigned before{did_you_mean(name, self.names)}")
                return self.names[name]
            case ast.List(elts=items):
                return [self._value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self._value(item) for item in items)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                keys = [self._value(key) for key in keys]
                if not all(isinstance(key, str | int | float | None) for key in keys):
                    raise self._error(node, "a dict key must be a string or a number")
                return dict(zip(keys, map(self._value, values), strict=True))
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=pairs) if all(pair.arg for pair in pairs):
                return {pair.arg: self._value(pair.value) for pair in pairs}
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                value = self._number(operand, self._value(operand))
                return -value if isinstance(sign, ast.USub) else value
            case ast.BinOp(op=op) if type(op) in _BINARY:
                return self._binary(node, self._value(node.left), self._value(node.right))
        raise self._refuse(node)

    def _binary(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        """Arithmetic on numbers, `+` of two texts or lists, and their repetition; results are bounded in size."""
        if isinstance(left, str | list | tuple) and isinstance(node.op, ast.Add) and type(left) is type(right):
            self._spend(len(left) + len(right), node)
            return left + right
        if isinstance(left, str | list | tuple) and isinstance(node.op, ast.Mult) and isinstance(right, int):
            self._spend(len(left) * max(right, 0), node)
            return left * right
        for side in (left, right):
            self._number(node, side)
        if isinstance(node.op, ast.Pow) and isinstance(left, int) and left.bit_length() * abs(right) > MAX_INT_BITS:
            raise self._error(node, "the power is too large")
        return self._number(node, _BINARY[type(node.op)](left, right))

    def _number(self, node: ast.expr, value: Any) -> int | float:
        if not isinstance(value, int | float):
            raise self._error(node, f"arithmetic needs numbers, not {type(value).__name__}")
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise self._error(node, "the number is too large")
        return value

    def _count(self, value: Any, node: ast.AST, depth: int = 0) -> None:
        """Spends the size of `value`, referred values included, so that nested repetition cannot grow without end."""
        if depth > MAX_DEPTH:
            raise self._error(node, f"nested more than {MAX_DEPTH} levels deep")
        self._spend(len(value) if isinstance(value, str) else 1, node)
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list | tuple):
            for item in value:
                self._count(item, node, depth + 1)

    def _spend(self, size: int, node: ast.AST) -> None:
        self.room -= size
        if self.room < 0:
            raise self._error(node, f"the configuration holds more than {MAX_SIZE} values")

    def _refuse(self, node: ast.AST) -> ConfigError:
        kind = type(node).__name__
        return self._error(node, f"{_NOT_ALLOWED.get(kind, f'`{kind}`')} is not allowed in a configuration; {_REMEDY}")

    def _error(self, node: ast.AST, problem: str) -> ConfigError:
        return ConfigError(f"{self.path}:{node.lineno}: {problem}")
