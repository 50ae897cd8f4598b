"""Named dims and the sizes built from them: sympy expressions that print and parse as text.

Parsing goes through a whitelist over Python's ``ast``, never through ``eval``, so a plan file
cannot run code.
"""

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import sympy

from dovetail.ir.errors import PlanError

Expr: TypeAlias = sympy.Expr

SEQS = sympy.Symbol("seqs", integer=True, positive=True)
"""Sequences of one group: the batch axis of a captured graph."""
Q_LEN = sympy.Symbol("q_len", integer=True, positive=True)
"""New tokens per sequence in this pass: the prompt length in prefill, 1 in decode."""
PAST = sympy.Symbol("past", integer=True, nonnegative=True)
"""Tokens per sequence that the KV store already holds; ``kv_len = past + q_len``."""

DIMS: Mapping[str, sympy.Symbol] = {"seqs": SEQS, "q_len": Q_LEN, "past": PAST}

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: sympy.floor(a / b),
    ast.Pow: operator.pow,
}
_CALLS: Mapping[str, Callable[..., Any]] = {
    "Max": sympy.Max,
    "Min": sympy.Min,
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Mod": sympy.Mod,
}


def to_expr(value: int | Expr) -> Expr:
    """An integer or an expression, as an expression."""
    return value if isinstance(value, sympy.Expr) else sympy.Integer(value)


def parse_expr(text: str) -> Expr:
    """The expression that ``str(expr)`` printed; raises PlanError on anything else."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise PlanError(f"size expression {text!r} cannot be parsed: {error}") from None
    return to_expr(_build(tree, text))


def _build(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=int(value)):
            return sympy.Integer(value)
        case ast.Name(id=name) if name in DIMS:
            return DIMS[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_build(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_build(left, text), _build(right, text))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
            return _CALLS[name](*(_build(arg, text) for arg in args))
    raise PlanError(
        f"size expression {text!r} holds {ast.unparse(node)!r}; expected whole numbers, the dims "
        f"{', '.join(DIMS)} and the operators + - * / // **, Max, Min, floor, ceiling, Mod"
    )


@functools.lru_cache(maxsize=65536)
def _compiled(expr: Expr) -> Callable[[int, int, int], float]:
    function = sympy.lambdify([SEQS, Q_LEN, PAST], expr, modules="math")
    return cast(Callable[[int, int, int], float], function)


def evaluate(expr: Expr, *, seqs: int, q_len: int, past: int) -> float:
    """The number that ``expr`` takes at these dims."""
    return float(_compiled(expr)(seqs, q_len, past))
