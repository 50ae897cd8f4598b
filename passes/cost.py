"""Costs: FLOPs and bytes of every task as expressions, and seconds on a machine.

`task -> [OpCost]` is symbolic in the dims; `Costs` turns it into seconds with the machine's
measured curves: a GEMM runs at the rate of its rows, attention at the rate of its query length or,
in decode, of its KV reads, everything else at the speed of memory, plus a fixed cost per operator.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import sympy

from dovetail.ir.errors import PlanError
from dovetail.ir.expr import Q_LEN, SEQS, Expr, evaluate, to_expr
from dovetail.ir.gemm_tiles import tiles
from dovetail.ir.machine import LARGE_BLOCK, Curve, Machine
from dovetail.ir.task_graph import ITEMSIZE, Arg, Body, Experts, Op, Ref, Task, Value, Weight

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
    """One operator: ``kind`` is gemm, attention, copy or view; ``rows`` the rows of a GEMM or the
    query length of attention; ``bytes`` what it reads and writes (for attention: the KV), ``made``
    what it writes to memory of its own."""

    kind: str
    flops: Expr
    bytes: Expr
    rows: Expr
    made: Expr


def base_target(op: Op) -> str:
    """The operator without its overload: ``aten.add.Tensor`` is ``aten.add``."""
    parts = op.target.split(".")
    return ".".join(parts[:2])


def is_view(op: Op) -> bool:
    """Whether the operator only renames memory."""
    return op.target == "getitem" or base_target(op) in VIEWS


def op_cost(op: Op, values: Mapping[str, Value], weights: Mapping[str, Weight]) -> OpCost:
    """The symbolic cost of one operator of a body."""
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
        return 2 * routed * expert_parameters(task.experts)
    weights = {w.fqn: w for w in task.weights}
    return sum((op_cost(op, body.values, weights).flops for op in task.ops), sympy.Integer(0))


def expert_parameters(experts: Experts) -> int:
    """Weights of one expert that a token multiplies with."""
    return sum(
        t.nbytes // ITEMSIZE[t.dtype] for t in experts.tensors if not t.part.endswith("bias")
    )


@dataclass(frozen=True, slots=True)
class Workers:
    """What tasks run on: ``count`` workers in a model of type ``dtype``, whose 16-bit products have
    tiles of ``buckets`` rows."""

    dtype: str
    buckets: tuple[int, ...]
    count: int


class Costs:
    """Seconds of tasks on one worker of a machine; results are remembered."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ops: dict[tuple[int, str], list[OpCost]] = {}
        self._known: dict[tuple[int, str, Workers, int, int, int], float] = {}

    def task_seconds(
        self,
        task: Task,
        body: Body,
        workers: Workers,
        *,
        seqs: int,
        q_len: int,
        past: int,
    ) -> float:
        """Seconds of a task that is not routed experts, for one group."""
        key = (id(body), task.name, workers, seqs, q_len, past)
        if key not in self._known:
            dims = {"seqs": seqs, "q_len": q_len, "past": past}
            costs = self._task_costs(task, body)
            self._known[key] = sum(self._op_seconds(cost, workers, dims) for cost in costs)
        return self._known[key]

    def _task_costs(self, task: Task, body: Body) -> list[OpCost]:
        key = (id(body), task.name)
        if key not in self._ops:
            weights = {w.fqn: w for w in task.weights}
            self._ops[key] = [op_cost(op, body.values, weights) for op in task.ops]
        return self._ops[key]

    def _op_seconds(self, cost: OpCost, workers: Workers, dims: dict[str, int]) -> float:
        machine, dtype = self._machine, workers.dtype
        fixed = self._fixed_seconds(workers)
        if cost.kind == "view":
            return fixed / 2
        made = evaluate(cost.made, **dims)
        if made >= LARGE_BLOCK and machine.fresh_bandwidth:
            fixed += made / machine.fresh_bandwidth
        nbytes = evaluate(cost.bytes, **dims)
        if cost.kind == "copy":
            return fixed + nbytes / machine.memory_bandwidth
        flops = evaluate(cost.flops, **dims)
        if cost.kind == "gemm":
            return fixed + self.gemm_seconds(flops, evaluate(cost.rows, **dims), workers)
        reading = 0.0
        if dims["q_len"] == 1 or dims["past"]:
            one = nbytes / dims["seqs"]
            reading = nbytes / self.curve("kv_bandwidth", dtype).at(max(one, 1.0))
        if dims["q_len"] == 1:
            return fixed + reading
        # The rate counts the masked half of a causal square as done; the past has no such half.
        flops = evaluate(cost.flops, **dims | {"past": 2 * dims["past"]})
        return fixed + max(reading, flops / self.curve("attention", dtype).at(dims["q_len"]))

    def _fixed_seconds(self, workers: Workers) -> float:
        """Of one operator: with several workers, each waits for its turn in the interpreter."""
        keeps = self._machine.keeps("op", "op") if workers.count > 1 else 1.0
        return self._machine.op_seconds / keeps

    def gemm_seconds(self, flops: float, rows: float, workers: Workers) -> float:
        """Seconds of a product of ``rows`` rows, padded to tiles where the type has 16 bits."""
        curve = self.curve("gemm", workers.dtype)
        if ITEMSIZE[workers.dtype] != 2:
            return flops / curve.at(rows)
        sizes = tiles(math.ceil(rows), workers.buckets)
        return sum(size / curve.at(size) for size in sizes) * flops / rows

    def curve(self, name: str, dtype: str) -> Curve:
        """The machine's curve ``name`` for ``dtype``; raises PlanError if it was not measured."""
        curves: Mapping[str, Curve] = getattr(self._machine, name)
        if dtype not in curves:
            raise PlanError(
                f"machine {self._machine.name!r} has no {name} curve for {dtype}, found "
                f"{', '.join(curves) or 'none'}; run `dovetail calibrate`"
            )
        return curves[dtype]

    def expert_seconds(
        self, experts: Experts, workers: Workers, rows: float, tile: int, pack: int = 0
    ) -> float:
        """Mean seconds of one expert that ``rows`` tokens choose on average, each on its own, in
        GEMMs of at most ``tile`` rows, beside others in packs of ``pack`` rows."""
        if rows <= 0:
            return 0.0
        spread = math.sqrt(rows)
        weights = {rows - spread: 0.25, rows: 0.5, rows + spread: 0.25}
        return sum(
            weight * self._expert_seconds(experts, workers, max(1.0, n), tile, pack)
            for n, weight in weights.items()
        )

    def _expert_seconds(
        self, experts: Experts, workers: Workers, rows: float, tile: int, pack: int
    ) -> float:
        item = ITEMSIZE[workers.dtype]
        flops = 2 * rows * expert_parameters(experts)
        moved = rows * (4 * experts.hidden + 6 * experts.intermediate) * item
        ops = _expert_ops(rows, tile, pack) * self._fixed_seconds(workers)
        whole, rest = divmod(rows, tile)
        gemm = sum(
            count * self.gemm_seconds(flops * n / rows, n, workers)
            for count, n in ((whole, tile), (1, rest))
            if count and n
        )
        return gemm + moved / self._machine.memory_bandwidth + ops


def _expert_ops(rows: float, tile: int, pack: int) -> float:
    """Operators of one expert: three products, and its share of those that a pack takes together;
    a pack has some more to say which rows are whose."""
    together = pack // max(1.0, rows)
    return 3 + 16 / together if together >= 2 else 12 * max(1.0, rows / tile)
