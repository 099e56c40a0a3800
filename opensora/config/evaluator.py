"""Evaluates a Python configuration as data, without executing it.

Allowed: literals, `dict(...)`, names assigned earlier, and arithmetic.
"""

from __future__ import annotations

import ast
import operator
import warnings
from pathlib import Path
from typing import Any

from opensora.config.budget import Budget
from opensora.config.placeholders import expand_placeholders, find_environment_variable
from opensora.errors import ConfigError, did_you_mean

MAX_INT_BITS = 1024
_REMEDY = "write a plain value, or run the file with --trust-config (pip install 'opensora[mmengine]')"
_NOT_ALLOWED = {
    **dict.fromkeys(("Import", "ImportFrom"), "an import"),
    **dict.fromkeys(("ListComp", "DictComp", "SetComp", "GeneratorExp"), "a comprehension"),
    **dict.fromkeys(("Lambda", "FunctionDef"), "a function"),
    **dict.fromkeys(("Compare", "BoolOp"), "a comparison"),
    "Call": "a call other than dict(key=value)", "Attribute": "attribute access", "Subscript": "indexing",
    "JoinedStr": "an f-string", "BinOp": "this operator", "Dict": "`**` in a dict", "ClassDef": "a class",
    "NamedExpr": "`:=`", "IfExp": "a condition", "Set": "a set", "Starred": "`*`", "UnaryOp": "this operator",
    "AugAssign": "an assignment with an operator", "AnnAssign": "a type annotation",
    "Constant": "a value other than a string, number, True, False or None",
}  # fmt: skip
_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


class Evaluator:
    """Evaluates a file statement by statement into `names`. Raises ConfigError with file and line."""

    def __init__(self, path: Path, text: str, budget: Budget) -> None:
        self.path, self.text, self.budget = path, text, budget
        self.names: dict[str, Any] = {}
        for statement in self._parse().body:
            try:
                self._execute(statement)
            except RecursionError:
                raise self._error(statement, "is nested too deep") from None
            except (ArithmeticError, TypeError) as error:
                raise self._error(statement, f"cannot be computed ({error})") from error

    def _parse(self) -> ast.Module:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes and the like
                return ast.parse(self.text)
        except SyntaxError as error:
            if variable := find_environment_variable(self.text):
                problem = f"'{{{{${variable}}}}}' reads the environment, which needs --trust-config"
                raise ConfigError(f"{self.path}: {problem}") from error
            raise ConfigError(f"{self.path}:{error.lineno or 1}: not valid Python: {error.msg}") from error
        except (RecursionError, MemoryError):
            raise ConfigError(f"{self.path}: cannot be read: it is nested too deep for Python's parser") from None
        except ValueError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error}") from error

    def _execute(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Expr(value=ast.Constant()):
                return  # a docstring
            case ast.Assign(targets=targets, value=node):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                if len(names) < len(targets):
                    raise self._error(statement, f"only plain names can be assigned; {_REMEDY}")
                value = self._value(node)
                self.budget.count(value, self._where(statement))
                self.names |= dict.fromkeys(names, value)
            case _:
                raise self._refuse(statement.value if isinstance(statement, ast.Expr) else statement)

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str() as text):
                return self._text(node, text)
            case ast.Constant(value=None | int() | float() as value):
                return self._number(node, value) if isinstance(value, int) else value
            case ast.Name(id=name):
                if name not in self.names:
                    raise self._error(node, f"'{name}' is not assigned before{did_you_mean(name, self.names)}")
                return self.names[name]
            case ast.List(elts=items):
                return [self._value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self._value(item) for item in items)
            case ast.Dict(keys=nodes, values=values) if None not in nodes:
                keys = [self._value(key) for key in nodes if key is not None]
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

    def _text(self, node: ast.expr, text: str) -> str:
        try:
            return expand_placeholders(text, self.path)
        except ValueError as error:
            raise self._error(node, str(error)) from None

    def _binary(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        """Arithmetic on numbers; concatenation and repetition of strings and lists. Results are bounded in size."""
        if type(left) in (str, list, tuple):
            if isinstance(node.op, ast.Add) and type(left) is type(right):
                self.budget.spend(len(left) + len(right), self._where(node))
                return left + right
            if isinstance(node.op, ast.Mult) and isinstance(right, int):
                self.budget.spend(len(left) * max(right, 0), self._where(node))
                return left * right
        for side in (left, right):
            self._number(node, side)
        if isinstance(node.op, ast.Pow) and isinstance(left, int) and left.bit_length() * abs(right) > MAX_INT_BITS:
            raise self._error(node, "the power is too large")
        return self._number(node, _BINARY[type(node.op)](left, right))

    def _number(self, node: ast.expr, value: Any) -> int | float:
        if not isinstance(value, int | float):
            raise self._error(node, f"arithmetic needs numbers, not {type(value).__name__}; {_REMEDY}")
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise self._error(node, "the number is too large")
        return value

    def _refuse(self, node: ast.AST) -> ConfigError:
        kind, source = type(node).__name__, ast.get_source_segment(self.text, node) or ""
        if kind == "Set" and "{{" in source:
            return self._error(node, f"{source[:60]} is not a string; put a placeholder in quotes; {_REMEDY}")
        return self._error(node, f"{_NOT_ALLOWED.get(kind, f'`{kind}`')} is not allowed in a configuration; {_REMEDY}")

    def _error(self, node: ast.AST, problem: str) -> ConfigError:
        return ConfigError(f"{self._where(node)}: {problem}")

    def _where(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"
