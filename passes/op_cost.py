"""Operator costs: `operator -> FLOPs and bytes as expressions in the dims`."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import sympy

from dovetail.ir.expr import Q_LEN, SEQS, Expr, to_expr
from dovetail.ir.task_graph import ITEMSIZE, Arg, Body, Op, Ref, Task, Value, Weight

VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "view", "_unsafe_view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "slice",
        "expand", "select", "alias", "detach", "split", "split_with_sizes", "chunk", "t", "unbind",
        "flatten", "unflatten", "narrow", "expand_as", "view_as", "numpy_T",
    )
)  # fmt: skip
_MATMULS = frozenset(
    f"aten.{name}" for name in ("linear", "mm", "addmm", "matmul", "bmm", "baddbmm")
)


@dataclass(frozen=True, slots=True)
class OpCost:
    """One operator or a part of it: ``kind`` is gemm, attention, copy or view; ``rows`` the rows of
    a GEMM or the query length of attention; ``bytes`` what it reads and writes (for attention: the
    KV), ``made`` what it writes to memory of its own. A ``form`` is only run where sequences have
    several new tokens (``prompt``) or one (``decode``)."""

    kind: str
    flops: Expr
    bytes: Expr
    rows: Expr
    made: Expr
    form: Literal["", "prompt", "decode"] = ""

    def runs(self, q_len: float) -> bool:
        """Whether it is run for so many new tokens of each sequence."""
        return not self.form or (self.form == "decode") == (q_len == 1)


def base_target(op: Op) -> str:
    """The operator without its overload: ``aten.add.Tensor`` is ``aten.add``."""
    parts = op.target.split(".")
    return ".".join(parts[:2])


def is_view(op: Op) -> bool:
    """Whether the operator only renames memory."""
    return op.target == "getitem" or base_target(op) in VIEWS


def op_costs(
    op: Op, values: Mapping[str, Value], weights: Mapping[str, Weight]
) -> tuple[OpCost, ...]:
    """The symbolic costs of one operator of a body."""
    if op.target == "dovetail.attention" and "latent" in op.kwargs:
        return _latent_costs(op, values, weights)
    return (_op_cost(op, values, weights),)


def _op_cost(op: Op, values: Mapping[str, Value], weights: Mapping[str, Weight]) -> OpCost:
    zero = sympy.Integer(0)
    if is_view(op) or op.target == "dovetail.experts":
        return OpCost("view", zero, zero, zero, zero)
    if op.target == "dovetail.attention":
        return _attention_cost(op, values)
    outs = sum((_nbytes(values[name]) for name in op.outs if name in values), zero)
    if op.target == "dovetail.module":
        return _module_cost(outs, weights, set(op.uses()))
    inputs = zero
    for name in op.uses():
        if name in values:
            inputs += _nbytes(values[name])
    if base_target(op) == "aten.embedding":
        return OpCost("copy", zero, 2 * outs, zero, outs)
    if base_target(op) in _MATMULS:
        out = values[op.outs[0]]
        depth = _shape(_matrix_operand(op), values, weights)[-1]
        rows = sympy.Mul(*out.shape[:-1])
        return OpCost("gemm", 2 * sympy.Mul(*out.shape) * depth, inputs + outs, rows, outs)
    return OpCost("copy", zero, inputs + outs, zero, outs)


def _module_cost(outs: Expr, weights: Mapping[str, Weight], used: set[str]) -> OpCost:
    """Of a module that runs whole: the products of its matrices with every token."""
    rows = SEQS * Q_LEN
    depth = sum(prod(w.shape) for name, w in weights.items() if name in used and len(w.shape) > 1)
    return OpCost("gemm", 2 * rows * depth, 2 * outs, rows, outs)


def _matrix_operand(op: Op) -> Arg:
    first = 1 if base_target(op) in ("aten.addmm", "aten.baddbmm") else 0
    return op.args[first]


def _attention_cost(op: Op, values: Mapping[str, Value]) -> OpCost:
    q, k, v = (_shape(arg, values, {}) for arg in op.args[:3])
    seqs, heads, q_len, dim = q
    kv_len = k[2]
    flops = 2 * seqs * heads * q_len * kv_len * (dim + v[3])
    kv = sum((_nbytes(values[arg.name]) for arg in op.args[1:3] if isinstance(arg, Ref)), 0)
    made = _nbytes(values[op.outs[0]])
    return OpCost("attention", flops, to_expr(kv), q_len, made)


def _latent_costs(
    op: Op, values: Mapping[str, Value], weights: Mapping[str, Weight]
) -> tuple[OpCost, ...]:
    """Of attention over latents (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): prompts expand them
    to keys and values, while one query a sequence takes the expansion's matrices into itself and
    into the result, and all heads read each latent once."""
    latent = op.kwargs["latent"]
    assert isinstance(latent, Ref)
    (seqs, heads, q_len, width), keys, rotary = (_shape(arg, values, {}) for arg in op.args[:3])
    length, inner, shared = keys[2], keys[3], rotary[3]
    out = values[op.outs[0]]
    item = ITEMSIZE[out.dtype]
    whole = to_expr(weights[latent.name].shape[0])
    zero, made = sympy.Integer(0), _nbytes(out)
    stored = seqs * length * (inner + shared) * item
    expanded, joined = seqs * length * whole * item, seqs * length * heads * width * item
    prompt = 2 * seqs * heads * q_len * length * (width + out.shape[3])
    read = joined + seqs * length * heads * out.shape[3] * item
    absorbed = seqs * heads * (inner + out.shape[3]) * item
    decode = 4 * seqs * heads * length * (inner + shared)
    return (
        OpCost("gemm", 2 * seqs * length * whole * inner, stored + expanded, seqs * length,
               expanded, "prompt"),
        OpCost("copy", zero, 2 * joined, zero, joined, "prompt"),
        OpCost("attention", prompt, read, q_len, made, "prompt"),
        OpCost("gemm", 2 * seqs * whole * inner, 2 * absorbed, to_expr(seqs), absorbed, "decode"),
        OpCost("copy", zero, 2 * stored, zero, stored, "decode"),
        OpCost("attention", decode, stored, q_len, made, "decode"),
    )  # fmt: skip


def _shape(
    arg: Arg, values: Mapping[str, Value], weights: Mapping[str, Weight]
) -> tuple[Expr, ...]:
    assert isinstance(arg, Ref), f"expected a tensor argument, found {arg!r}"
    if arg.name in values:
        return values[arg.name].shape
    return tuple(to_expr(size) for size in weights[arg.name].shape)


def _nbytes(value: Value) -> Expr:
    return sympy.Mul(*value.shape) * ITEMSIZE[value.dtype]


def task_flops(task: Task, body: Body) -> Expr:
    """FLOPs of a task in the dims; for experts, of all routed tokens."""
    if task.experts is not None:
        op = task.ops[0]
        assert isinstance(op.args[1], Ref)
        routed = sympy.Mul(*body.values[op.args[1].name].shape)
        return 2 * routed * task.experts.parameters
    weights = {w.fqn: w for w in task.weights}
    costs = (cost for op in task.ops for cost in op_costs(op, body.values, weights))
    return sum((c.flops for c in costs if c.form != "decode"), sympy.Integer(0))
