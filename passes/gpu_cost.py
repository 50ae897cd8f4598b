"""GPU costs: `body, group -> seconds on one GPU`, from the symbolic costs of ``cost``.

A kernel takes the longer of its arithmetic and its memory traffic (the roofline), plus its launch.
Weights and KV are read from hbm; what it takes to bring them there is the loop body's business.
With several GPUs, sequences are dealt out evenly and so are every layer's experts (data-parallel
attention, expert parallelism).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.ir.errors import PlanError
from dovetail.ir.expr import evaluate
from dovetail.ir.machine import Accelerator, Curve, Machine
from dovetail.ir.task_graph import ITEMSIZE, Body, Experts
from dovetail.passes.cost import Costs, OpCost, Workers, expert_parameters, op_cost

EXPERT_KERNELS = 3
"""Launches of a chunk of experts: two grouped products and what joins them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sequences that run together: ``seqs`` of ``q_len`` new tokens after ``past`` others."""

    seqs: int
    q_len: int
    past: int


@dataclass(frozen=True, slots=True)
class GroupSeconds:
    """A group's time on the GPU up to its attention, in it, from there to the experts, and after
    them."""

    before: float
    attention: float
    after: float
    tail: float


@dataclass(frozen=True, slots=True)
class _BodyCosts:
    before: tuple[OpCost, ...]
    attention: tuple[OpCost, ...]
    after: tuple[OpCost, ...]
    tail: tuple[OpCost, ...]


class GpuCosts:
    """Seconds of a model's tasks on a machine's GPU and, where they are assigned to it, its CPU."""

    def __init__(self, machine: Machine, dtype: str) -> None:
        if machine.accelerator is None:
            raise PlanError(
                f"machine {machine.name!r} has no accelerator, which this schedule needs; name a "
                "machine that has one, or plan for the cpu"
            )
        self.machine, self.gpu = machine, machine.accelerator
        self._dtype, self._item = dtype, ITEMSIZE[dtype]
        self._host = Costs(machine)
        self._workers = Workers(dtype, (256,), machine.workers)
        self._bodies: dict[int, _BodyCosts] = {}
        self._known: dict[tuple[int, Shape], GroupSeconds] = {}

    def group(self, body: Body, shape: Shape) -> GroupSeconds:
        """Seconds of a group in one layer of this body, experts left out."""
        key = (id(body), shape)
        if key not in self._known:
            costs = self._body(body)
            self._known[key] = GroupSeconds(
                self._sum(costs.before, shape),
                self._sum(costs.attention, shape),
                self._sum(costs.after, shape),
                self._sum(costs.tail, shape),
            )
        return self._known[key]

    def experts(self, experts: Experts, count: float, rows: float) -> float:
        """Mean seconds of a chunk of ``count`` experts on one GPU that ``rows`` tokens choose on
        average, each token on its own: some get more, and reading the others' weights takes as
        long."""
        if rows <= 0 or count <= 0:
            return 0.0
        spread = math.sqrt(rows)
        weights = {rows - spread: 0.25, rows: 0.5, rows + spread: 0.25}
        one = sum(w * self._expert(experts, max(1.0, n)) for n, w in weights.items())
        return count * one + EXPERT_KERNELS * self.gpu.op_seconds

    def _expert(self, experts: Experts, rows: float) -> float:
        flops = 2 * rows * expert_parameters(experts)
        moved = experts.nbytes + rows * (2 * experts.hidden + 4 * experts.intermediate) * self._item
        return max(flops / self._gemm.at(rows), moved / self.gpu.hbm_bandwidth)

    def host_experts(self, experts: Experts, count: float, rows: float) -> float:
        """Seconds of ``count`` experts over ``rows`` tokens each on all of the CPU's workers."""
        if rows <= 0 or count <= 0:
            return 0.0
        one = self._host.expert_seconds(experts, self._workers, rows, 1 << 30)
        return count * one / self._host_speedup

    def host_attention(self, body: Body, shape: Shape) -> float:
        """Seconds of a decode group's attention on all of the CPU's workers."""
        seconds = 0.0
        dims = {"seqs": shape.seqs, "q_len": shape.q_len, "past": shape.past}
        for cost in self._body(body).attention:
            nbytes = evaluate(cost.bytes, **dims)
            rate = self._host.curve("kv_bandwidth", self._dtype).at(max(1.0, nbytes / shape.seqs))
            seconds += nbytes / rate
        return seconds / self._host_speedup

    def all_to_all(self, experts: Experts, tokens: float) -> float:
        """Seconds of sending ``tokens`` of one GPU to their experts' GPUs and back."""
        others = self.gpu.count - 1
        if not others or not self.gpu.peer_bandwidth:
            return 0.0
        nbytes = 2 * tokens * experts.top_k * experts.hidden * self._item * others / self.gpu.count
        return nbytes / self.gpu.peer_bandwidth + 2 * self.gpu.op_seconds

    @property
    def _gemm(self) -> Curve:
        return _curve(self.gpu, "gemm", self._dtype)

    @property
    def _host_speedup(self) -> float:
        machine = self.machine
        return machine.workers * (machine.keeps("cpu", "cpu") if machine.workers > 1 else 1.0)

    def _body(self, body: Body) -> _BodyCosts:
        if id(body) not in self._bodies:
            self._bodies[id(body)] = _split(body)
        return self._bodies[id(body)]

    def _sum(self, costs: Sequence[OpCost], shape: Shape) -> float:
        dims = {"seqs": shape.seqs, "q_len": shape.q_len, "past": shape.past}
        return sum(self._op(cost, dims) for cost in costs)

    def _op(self, cost: OpCost, dims: dict[str, int]) -> float:
        if cost.kind == "view":
            return 0.0
        nbytes = evaluate(cost.bytes, **dims)
        arithmetic = 0.0
        if cost.kind == "gemm":
            flops, rows = evaluate(cost.flops, **dims), evaluate(cost.rows, **dims)
            arithmetic = flops / self._gemm.at(rows)
            nbytes += flops / (2 * rows) * self._item
        elif cost.kind == "attention" and dims["q_len"] > 1:
            curve = _curve(self.gpu, "attention", self._dtype)
            arithmetic = evaluate(cost.flops, **dims) / curve.at(dims["q_len"])
        return max(arithmetic, nbytes / self.gpu.hbm_bandwidth) + self.gpu.op_seconds


def _curve(gpu: Accelerator, name: str, dtype: str) -> Curve:
    curves = gpu.gemm if name == "gemm" else gpu.attention
    if dtype not in curves:
        raise PlanError(
            f"accelerator {gpu.name!r} has no {name} curve for {dtype}, found "
            f"{', '.join(curves) or 'none'}; add one to the machine file"
        )
    return curves[dtype]


def _split(body: Body) -> _BodyCosts:
    """The costs of a body's operators, cut at its attention and its experts."""
    parts: dict[str, list[OpCost]] = {"before": [], "attention": [], "after": [], "tail": []}
    at = "before"
    for task in body.tasks:
        if task.experts is not None:
            at = "tail"
            continue
        weights = {w.fqn: w for w in task.weights}
        for op in task.ops:
            cost = op_cost(op, body.values, weights)
            if cost.kind == "attention":
                parts["attention"].append(cost)
                at = "after"
            else:
                parts[at].append(cost)
    return _BodyCosts(*(tuple(parts[name]) for name in ("before", "attention", "after", "tail")))
