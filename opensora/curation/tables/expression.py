"""Row conditions such as `aes >= 5 and 2 < flow < 30`: parsed into closures, never evaluated as Python.

Missing cells follow SQL: a comparison with one is unknown, and a row whose condition is unknown is dropped.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, TypeAlias

from opensora.curation.tables.stream import Cell, Row, TableStream, number_of, text_of
from opensora.errors import ConfigError

MAX_LENGTH = 2000  # characters
MAX_DEPTH = 40
Value: TypeAlias = "str | float | bool | tuple[Any, ...] | None"
Evaluate: TypeAlias = Callable[[Row], Value]

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def _contains(text: str, part: str) -> bool:
    return part.lower() in text.lower()


# name -> (function of texts, number of arguments)
TEXT_FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "len": (lambda text: float(len(text)), 1),
    "words": (lambda text: float(len(text.split())), 1),
    "lower": (str.lower, 1),
    "suffix": (lambda path: PurePath(path).suffix.lower(), 1),
    "contains": (_contains, 2),
    "startswith": (str.startswith, 2),
    "endswith": (str.endswith, 2),
}
NUMBER_FUNCTIONS: dict[str, tuple[Callable[..., float], int]] = {
    "abs": (abs, 1), "round": (lambda x: float(round(x)), 1), "min": (min, 2), "max": (max, 2),
}  # fmt: skip
FUNCTIONS = (*TEXT_FUNCTIONS, *NUMBER_FUNCTIONS, "column")


def condition(text: str, table: TableStream) -> Callable[[Row], bool]:
    """The condition `text` as a function of a row of `table`: True where it holds, False where not or unknown.

    Names are columns, `column("a b")` those with other characters; operators are those of Python on numbers and texts,
    with `in`, `is None`, and the functions of `FUNCTIONS`. Raises ConfigError for anything else.
    """
    evaluate = _compile(_parse(text), table, text, 0)
    return lambda row: evaluate(row) is True


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"the condition has {len(text):,} characters, more than {MAX_LENGTH:,}; use several --where")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _refused(text, "is no expression such as 'aes >= 5 and 2 < flow < 30'") from error


def _refused(text: str, problem: str) -> ConfigError:
    shown = text if len(text) <= 100 else f"{text[:100]}..."
    return ConfigError(f"condition {shown!r}: {problem}")


def _compile(node: ast.expr, table: TableStream, text: str, depth: int) -> Evaluate:
    """The closure of a node."""
    if depth > MAX_DEPTH:
        raise _refused(text, f"is nested more than {MAX_DEPTH} levels deep; use several --where")

    def compiled(child: ast.expr) -> Evaluate:
        return _compile(child, table, text, depth + 1)

    match node:
        case ast.Constant(value=None | bool() | str() as constant):
            return lambda row: constant
        case ast.Constant(value=int() | float() as number):
            return _constant(number)
        case ast.Name():
            return _cell(table.index(node.id))
        case ast.Tuple() | ast.List():
            items = [compiled(item) for item in node.elts]
            return lambda row: tuple(item(row) for item in items)
        case ast.BoolOp():
            return _logic(isinstance(node.op, ast.And), [compiled(value) for value in node.values])
        case ast.UnaryOp(op=ast.Not()):
            inner = compiled(node.operand)
            return lambda row: None if (value := inner(row)) is None else value is not True
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            sign, inner = -1.0 if isinstance(node.op, ast.USub) else 1.0, compiled(node.operand)
            return lambda row: None if (value := _number(inner(row))) is None else sign * value
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            return _arithmetic(ARITHMETIC[type(node.op)], compiled(node.left), compiled(node.right))
        case ast.Compare():
            operands = [compiled(operand) for operand in (node.left, *node.comparators)]
            return _comparison([_comparator(op, text) for op in node.ops], operands)
        case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str() as name)], keywords=[]):
            return _cell(table.index(name))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return _call(name, [compiled(argument) for argument in arguments], text)
    allowed = f"columns, numbers, texts, comparisons, and, or, not, in, + - * / // %, {', '.join(FUNCTIONS)}"
    raise _refused(text, f"'{ast.unparse(node)[:60]}' is not part of conditions; they have {allowed}")


def _constant(number: float) -> Evaluate:
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    return lambda row: value


def _cell(place: int) -> Evaluate:
    def evaluate(row: Row) -> Value:
        cell: Cell = row[place]
        return None if cell is None or cell == "" else cell

    return evaluate


def _logic(conjunction: bool, values: Sequence[Evaluate]) -> Evaluate:
    """`and` or `or` of three-valued logic."""

    def evaluate(row: Row) -> Value:
        unknown = False
        for value in values:
            found = value(row)
            if found is None:
                unknown = True
            elif (found is True) != conjunction:
                return not conjunction
        return None if unknown else conjunction

    return evaluate


def _number(value: Value) -> float | None:
    return None if isinstance(value, tuple) else number_of(value)


def _arithmetic(function: Callable[[float, float], float], left: Evaluate, right: Evaluate) -> Evaluate:
    def evaluate(row: Row) -> Value:
        one, other = _number(left(row)), _number(right(row))
        if one is None or other is None:
            return None
        try:
            return function(one, other)
        except (ZeroDivisionError, OverflowError):
            return None

    return evaluate


def _comparator(op: ast.cmpop, text: str) -> Callable[[Value, Value], bool | None]:
    if type(op) in COMPARISONS:
        return partial(_compare, COMPARISONS[type(op)])
    if isinstance(op, ast.Is | ast.IsNot):
        wanted = isinstance(op, ast.Is)
        return lambda one, other: (one is other) is wanted if other is None else _refuse_is(text)
    wanted = isinstance(op, ast.In)

    def contained(one: Value, other: Value) -> bool | None:
        if one is None or other is None:
            return None
        if isinstance(other, tuple):
            return any(_compare(operator.eq, one, item) for item in other) is wanted
        return (text_of(_scalar(one)) in text_of(_scalar(other))) is wanted

    return contained


def _refuse_is(text: str) -> bool:
    raise _refused(text, "'is' takes None only; compare with ==")


def _scalar(value: Value) -> Cell:
    assert not isinstance(value, tuple), "lists stand on the right of `in` only"
    return value


def _compare(compare: Callable[[Any, Any], bool], one: Value, other: Value) -> bool | None:
    """Compares numbers if one side is a number (None if the other is not), else texts."""
    if one is None or other is None or isinstance(one, tuple) or isinstance(other, tuple):
        return None
    left, right = number_of(one), number_of(other)
    if left is not None and right is not None:
        return compare(left, right)
    return compare(one, other) if isinstance(one, str) and isinstance(other, str) else None


def _comparison(comparators: Sequence[Callable[[Value, Value], bool | None]], operands: Sequence[Evaluate]) -> Evaluate:
    """A chain such as `2 < flow < 30`."""
    first, pairs = operands[0], list(zip(comparators, operands[1:], strict=True))

    def evaluate(row: Row) -> Value:
        left, unknown = first(row), False
        for compare, operand in pairs:
            right = operand(row)
            found = compare(left, right)
            if found is False:
                return False
            unknown = unknown or found is None
            left = right
        return None if unknown else True

    return evaluate


def _call(name: str, arguments: Sequence[Evaluate], text: str) -> Evaluate:
    function, count = TEXT_FUNCTIONS.get(name) or NUMBER_FUNCTIONS.get(name) or (None, 0)
    if function is None or len(arguments) != count:
        needs = 'one column name in quotes: column("a b")' if name == "column" else f"{count} arguments"
        raise _refused(text, f"{name} takes {needs}")
    convert: Callable[[Value], Any] = _number
    if name in TEXT_FUNCTIONS:
        convert = _text

    def evaluate(row: Row) -> Value:
        values = [convert(argument(row)) for argument in arguments]
        return None if None in values else function(*values)

    return evaluate


def _text(value: Value) -> str | None:
    return None if value is None or isinstance(value, tuple) else text_of(value)
