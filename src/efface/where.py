"""The small language of ``--where``: comparisons joined by and, or, not. Parsed, never executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from efface.errors import SelectionError, nearest

Column = np.ndarray[Any, Any]

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: np.isin(a, b),
    ast.NotIn: lambda a, b: ~np.isin(a, b),
}


def evaluate(expression: str, columns: Mapping[str, Column]) -> Column:
    """For which rows an expression holds.

    Args:
        expression: E.g. ``"age < 30 and not (site == 'north')"``.
        columns: Name → values ``[N]``.

    Returns:
        Booleans ``[N]``.

    Raises:
        SelectionError: If the expression holds anything but comparisons, and, or, not.

    >>> table = {"age": np.array([20, 40]), "site": np.array(["a", "b"])}
    >>> evaluate("age < 30 or site in ('b', 'c')", table).tolist()
    [True, True]
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.args[0] if error.args else type(error).__name__
        raise SelectionError(f"--where {_short(expression)} cannot be read: {why}.") from None
    if not isinstance(tree, ast.Compare | ast.BoolOp | ast.UnaryOp):
        raise _refusal(expression, tree)
    n = len(next(iter(columns.values())))
    try:
        rows: Column = np.broadcast_to(_boolean(tree, expression, columns), (n,)).copy()
    except RecursionError:
        raise SelectionError(f"--where {_short(expression)} is nested too deeply.") from None
    return rows


def redacted(expression: str, private: Collection[str]) -> str:
    """The expression with every value that a private column is compared with left out.

    >>> redacted("subject == 'p017' and age < 30", {"subject"})
    "subject == '…' and age < 30"
    """
    tree = ast.parse(expression.strip(), mode="eval")
    for node in ast.walk(tree):
        inside = list(ast.walk(node)) if isinstance(node, ast.Compare) else []
        if any(isinstance(part, ast.Name) and part.id in private for part in inside):
            for part in inside:
                if isinstance(part, ast.Constant):
                    part.value = "…"
    return ast.unparse(tree)


def _short(expression: str) -> str:
    """The expression for an error sentence, not longer than one can read."""
    return repr(expression if len(expression) <= 80 else expression[:79] + "…")


def _refusal(expression: str, node: ast.AST) -> SelectionError:
    found = _short(ast.unparse(node))
    return SelectionError(
        f"--where {_short(expression)} holds {found}; only comparisons of columns with values, "
        "joined by and, or, not, are allowed (e.g. \"age < 30 and site == 'north'\")."
    )


def _boolean(node: ast.expr, expression: str, columns: Mapping[str, Column]) -> Any:
    if isinstance(node, ast.BoolOp):
        parts = [_boolean(value, expression, columns) for value in node.values]
        join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        return join.reduce(parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~np.asarray(_boolean(node.operand, expression, columns))
    if isinstance(node, ast.Compare):
        return _comparison(node, expression, columns)
    raise _refusal(expression, node)


def _comparison(node: ast.Compare, expression: str, columns: Mapping[str, Column]) -> Any:
    terms = [node.left, *node.comparators]
    if not any(isinstance(term, ast.Name) for term in terms):
        raise _refusal(expression, node)
    values = [_term(term, expression, columns) for term in terms]
    result: Any = True
    for compare, left, right in zip(node.ops, values, values[1:], strict=False):
        listed = isinstance(right, list)
        columns_in_list = listed and any(isinstance(v, np.ndarray) for v in right)
        membership = isinstance(compare, ast.In | ast.NotIn)
        if type(compare) not in _COMPARE or membership != listed or columns_in_list:
            raise _refusal(expression, node)
        if isinstance(left, list):
            raise _refusal(expression, node)
        _check_kinds(expression, left, right)
        result = result & _COMPARE[type(compare)](left, right)
    return np.asarray(result, dtype=bool)


def _check_kinds(expression: str, left: Any, right: Any) -> None:
    """Text against a number is always false in NumPy: almost surely a mistake, so refuse it."""
    kinds = {np.asarray(side).dtype.kind in "OUS" for side in (left, right)}
    if len(kinds) == 2:
        raise SelectionError(
            f"--where {_short(expression)} compares text with a number; put quotes around text."
        )


def _term(node: ast.expr, expression: str, columns: Mapping[str, Column]) -> Any:
    if isinstance(node, ast.Name):
        if node.id not in columns:
            raise SelectionError(
                f"--where {_short(expression)} names an unknown column {node.id!r}: "
                f"{nearest(node.id, columns)}"
            )
        return columns[node.id]
    if isinstance(node, ast.Tuple | ast.List):
        return [_term(item, expression, columns) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = ast.copy_location(ast.Constant(-_number(node.operand, expression)), node)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | bool):
        return node.value
    raise _refusal(expression, node)


def _number(node: ast.expr, expression: str) -> int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    raise _refusal(expression, node)
