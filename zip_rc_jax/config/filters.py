"""Conditions on the columns of a problem source, such as `level >= 4 and subject in ["Algebra"]`.

Only comparisons, `and`, `or`, `not`, `in`, names of columns and literals are read. Nothing is ever
executed.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

from zip_rc_jax.config.checks import shown
from zip_rc_jax.runtime.errors import UsageError

ALLOWED = "compare columns with ==, !=, <, <=, >, >=, in, not in, and join with and, or, not"
LONGEST = 2_000  # characters of an expression

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, several: value in several,
    ast.NotIn: lambda value, several: value not in several,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_CONSTANTS = (str, int, float, bool, type(None))


@dataclasses.dataclass(frozen=True)
class Filter:
    """A condition on one row.

    Attributes:
      text: as it was written.
      columns: names that it reads.
    """

    text: str
    columns: tuple[str, ...]
    _tree: ast.expr = dataclasses.field(repr=False, compare=False)

    @staticmethod
    def parse(text: str) -> Filter:
        """Raises `UsageError` for anything but comparisons of columns and literals."""
        if len(text) > LONGEST:
            raise _refused(text, f"it has {len(text)} characters, and {LONGEST} are allowed")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            names: list[str] = []
            _check(tree, text, names)
        except SyntaxError as error:
            raise _refused(text, f"it cannot be read ({error.msg})") from None
        except (ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, UsageError):
                raise
            raise _refused(text, "it cannot be read") from None
        return Filter(text, tuple(dict.fromkeys(names)), tree)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether the row fulfils it. A column that the row lacks is None.

        Raises:
          TypeError: values that cannot be compared, such as a text with a number.
        """
        return bool(_value(self._tree, row))


def _refused(text: str, reason: str) -> UsageError:
    return UsageError(f"filter={shown(text)}", reason, ALLOWED)


def _check(node: ast.expr, text: str, names: list[str]) -> None:
    """Raises UsageError for a node of another kind; collects the columns."""
    match node:
        case ast.BoolOp(values=values):
            parts = values
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            parts = [operand]
        case ast.Compare(left=left, comparators=right):
            parts = [left, *right]
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            parts = items
        case ast.Name(id=name):
            names.append(name)
            return
        case ast.Constant(value=value) if isinstance(value, _CONSTANTS):
            return
        case _:
            raise _refused(text, f"{shown(ast.unparse(node))} is no comparison of columns")
    for part in parts:
        _check(part, text, names)


def _value(node: ast.expr, row: Mapping[str, Any]) -> Any:
    match node:
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(x, row) for x in values)
        case ast.BoolOp(values=values):
            return any(_value(x, row) for x in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, row)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, row)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            before = _value(left, row)
            for op, part in zip(ops, comparators, strict=True):
                after = _value(part, row)
                if not _COMPARE[type(op)](before, after):
                    return False
                before = after
            return True
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return [_value(x, row) for x in items]
        case ast.Name(id=name):
            return row.get(name)
        case ast.Constant(value=value):
            return value
    raise AssertionError(node)  # `_check` lets nothing else through
