"""GPU costs: `body, group -> seconds on one GPU`, from the symbolic costs of ``cost``.

A kernel takes the longer of its arithmetic and its memory traffic (the roofline), plus its launch.
Weights and KV are read from hbm; what it takes to bring them there is the loop body's business.
With several GPUs, sequences are dealt out evenly and so are every layer's experts (data-parallel
attention, expert parallelism).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.ir.expr import evaluate
from dovetail.ir.machine import Machine
from dovetail.ir.task_graph import Body
from dovetail.ir.workload import Routing
from dovetail.passes.gpu.expert_costs import GpuExpertCosts, curve_of
from dovetail.passes.op_cost import OpCost, op_costs

LEAST_KEPT = 0.25
"""Share of its rate that the CPU keeps at least beside copies: memory controllers are fair."""


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
class Products:
    """Linear layers of a group: seconds on the GPU and on all of the CPU's workers, and the bytes
    of what they read beside weights and of what they make."""

    gpu: float
    host: float
    read: float
    made: float


@dataclass(frozen=True, slots=True)
class _BodyCosts:
    before: tuple[OpCost, ...]
    attention: tuple[OpCost, ...]
    after: tuple[OpCost, ...]
    tail: tuple[OpCost, ...]


class GpuCosts(GpuExpertCosts):
    """Seconds of a model's tasks on a machine's GPU and, where they are assigned to it, its CPU."""

    def __init__(self, machine: Machine, dtype: str, routing: Sequence[Routing] = ()) -> None:
        super().__init__(machine, dtype, routing)
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

    def host_attention(self, body: Body, shape: Shape) -> float:
        """Seconds of a decode group's attention on all of the CPU's workers."""
        seconds = 0.0
        dims = {"seqs": shape.seqs, "q_len": shape.q_len, "past": shape.past}
        for cost in self._body(body).attention:
            if not cost.runs(shape.q_len):
                continue
            nbytes = evaluate(cost.bytes, **dims)
            if cost.kind == "attention":
                rate = self._host.curve("kv_bandwidth", self._dtype)
                reading = nbytes / rate.at(max(1.0, nbytes / shape.seqs))
                seconds += max(reading, self._host.absorbed_seconds(cost, self._dtype, dims))
            elif cost.kind == "gemm":
                flops, rows = evaluate(cost.flops, **dims), evaluate(cost.rows, **dims)
                seconds += self._host.gemm_seconds(flops, rows, self._workers)
            else:
                seconds += nbytes / self.machine.memory_bandwidth
        return seconds / self._host_speedup

    @property
    def beside_copies(self) -> float:
        """Share of its rate that the CPU keeps while every GPU's link is busy: copies read the same
        memory as its attention, whose rate is that of the memory."""
        memory = self._host_speedup * self._host.curve("kv_bandwidth", self._dtype).peak
        return max(LEAST_KEPT, 1 - self.gpu.count * self.gpu.h2d.peak / memory)

    def products(self, body: Body, shape: Shape) -> "Products":
        """A group's linear layers in one layer of this body, experts left out."""
        gpu = host = read = made = 0.0
        dims = {"seqs": shape.seqs, "q_len": shape.q_len, "past": shape.past}
        costs = self._body(body)
        for cost in (*costs.before, *costs.after, *costs.tail):
            if cost.kind == "gemm":
                flops, rows = evaluate(cost.flops, **dims), evaluate(cost.rows, **dims)
                out = evaluate(cost.made, **dims)
                gpu += self._op(cost, dims)
                host += self._host.gemm_seconds(flops, rows, self._workers)
                made += out
                read += evaluate(cost.bytes, **dims) - out
        return Products(gpu, host / self._host_speedup, read, made)

    def _body(self, body: Body) -> _BodyCosts:
        if id(body) not in self._bodies:
            self._bodies[id(body)] = _split(body)
        return self._bodies[id(body)]

    def _sum(self, costs: Sequence[OpCost], shape: Shape) -> float:
        dims = {"seqs": shape.seqs, "q_len": shape.q_len, "past": shape.past}
        return sum(self._op(cost, dims) for cost in costs if cost.runs(shape.q_len))

    def _op(self, cost: OpCost, dims: dict[str, int]) -> float:
        if cost.kind == "view":
            return 0.0
        nbytes = evaluate(cost.bytes, **dims)
        arithmetic = 0.0
        if cost.kind == "gemm":
            flops, rows = evaluate(cost.flops, **dims), evaluate(cost.rows, **dims)
            arithmetic = flops / self.gemm.at(rows)
            nbytes += flops / (2 * rows) * self._item
        elif cost.kind == "attention":
            curve = curve_of(self.gpu, "attention", self._dtype)
            # The queries of all heads that share keys are one product's rows in decode.
            rate = curve.at(dims["q_len"]) if dims["q_len"] > 1 else curve.peak
            arithmetic = evaluate(cost.flops, **dims) / rate
        return max(arithmetic, nbytes / self.gpu.hbm_bandwidth) + self.gpu.op_seconds


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
            costs = op_costs(op, body.values, weights)
            if any(cost.kind == "attention" for cost in costs):
                parts["attention"] += costs
                at = "after"
            else:
                parts[at] += costs
    return _BodyCosts(*(tuple(parts[name]) for name in ("before", "attention", "after", "tail")))
