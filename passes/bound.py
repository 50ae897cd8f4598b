"""Bound: `graph, machine, budget, tokens -> a time that no schedule can beat`.

Compute: all FLOPs and KV reads at the machine's best rates, on all workers. Disk: with P passes
over the model's W bytes of weights, KV store and resident weights share the budget M at any time,
so at least ``P * (W - M) + C`` bytes are read, where C sums the KV bytes in use over all passes; P
is at least the longest generation and C / M. Routing is taken as uniform, passes as equally full.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from dovetail.ir.batching import Step
from dovetail.ir.expr import evaluate
from dovetail.ir.machine import Machine
from dovetail.ir.placement import embed_weights, experts_of
from dovetail.ir.plan import Bound
from dovetail.ir.task_graph import Body, TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.op_cost import OpCost, op_costs, task_flops


@dataclass(frozen=True, slots=True)
class _Sequences:
    """What has to be done: (prompt length, tokens generated) and how many such sequences."""

    counts: Counter[tuple[int, int]]

    @property
    def passes(self) -> int:
        return max(made for _, made in self.counts)

    @property
    def processed(self) -> int:
        """Tokens that go through the layers: the last generated one does not."""
        return sum(count * (length + made - 1) for (length, made), count in self.counts.items())

    @property
    def generated(self) -> int:
        return sum(count * made for (_, made), count in self.counts.items())

    @property
    def held(self) -> float:
        """KV tokens in use, summed over passes."""
        return sum(
            count * (length * made + made * (made - 1) / 2)
            for (length, made), count in self.counts.items()
        )


def bound(graph: TaskGraph, machine: Machine, budget: int, workload: Workload) -> Bound:
    """The bound of a workload in which every sequence reaches its full length."""
    counts = Counter({(n, workload.new_tokens): count for n, count in workload.lengths})
    return _bound(graph, machine, budget, _Sequences(counts))


def bound_of_steps(graph: TaskGraph, machine: Machine, budget: int, steps: Iterable[Step]) -> Bound:
    """The bound of the sequences that these steps served."""
    length: dict[int, int] = {}
    made: Counter[int] = Counter()
    for step in steps:
        for group in step.groups:
            for member, tokens in zip(group.members, group.lengths, strict=True):
                if group.prefill:
                    length[member.index] = member.held + tokens
        made.update(step.receivers)
    counts = Counter((length[index], made[index]) for index in made)
    return _bound(graph, machine, budget, _Sequences(counts))


def _bound(graph: TaskGraph, machine: Machine, budget: int, work: _Sequences) -> Bound:
    parts = {
        "cpu": _compute_seconds(graph, machine, work),
        "disk": _disk_bytes(graph, budget, work) / machine.disk.peak,
    }
    resource = max(parts, key=lambda name: parts[name])
    return Bound(parts[resource], resource, parts)


def _compute_seconds(graph: TaskGraph, machine: Machine, work: _Sequences) -> float:
    gemm = machine.gemm[graph.dtype].peak
    seconds = work.generated * gemm_flops(graph.epilogue) / gemm
    for index, body in enumerate(graph.bodies):
        count = graph.layers.count(index)
        seconds += count * work.processed * (gemm_flops(body) / gemm + _saved(body, machine, gemm))
        seconds += count * _attention_seconds(graph, body, machine, work)
    workers = machine.workers * machine.keeps("cpu", "cpu") if machine.workers > 1 else 1
    return seconds / workers


def _saved(body: Body, machine: Machine, gemm: float) -> float:
    """By what seconds per token experts in fewer bits differ from the model's own precision: with
    many rows, what it takes to turn a matrix into the model's type is next to nothing."""
    experts = body.experts.experts if body.experts else None
    if body.experts is None or experts is None or not experts.precision:
        return 0.0
    flops = evaluate(task_flops(body.experts, body), seqs=1, q_len=1, past=0)
    best = max(machine.gemm[experts.precision].peak, gemm)
    return flops / best - flops / gemm


def body_costs(body: Body) -> Iterable[OpCost]:
    """The costs of a body's operators, experts left out."""
    for task in body.tasks:
        weights = {w.fqn: w for w in task.weights}
        for op in task.ops:
            yield from op_costs(op, body.values, weights)


def gemm_flops(body: Body) -> float:
    """GEMM FLOPs per token, attention left out; in latent attention, what a prompt's token or one
    of decode takes at least: to expand it, or to absorb the expansion, which is as much."""
    one = {"seqs": 1, "q_len": 1, "past": 0}
    costs = (c for c in body_costs(body) if c.kind == "gemm" and c.runs(one["q_len"]))
    total = sum(evaluate(c.flops, **one) for c in costs)
    if body.experts:
        total += evaluate(task_flops(body.experts, body), **one)
    return total


def _attention_seconds(graph: TaskGraph, body: Body, machine: Machine, work: _Sequences) -> float:
    rate = machine.attention[graph.dtype].peak
    kv_rate = machine.kv_bandwidth[graph.dtype].peak
    total = 0.0
    for cost in (c for c in body_costs(body) if c.kind == "attention"):
        for (length, made), count in work.counts.items():
            middle = length + (made - 1) // 2
            if cost.runs(length):
                prefill = evaluate(cost.flops, seqs=1, q_len=length, past=0)
                total += count * prefill / rate
            if cost.runs(1):
                decode = evaluate(cost.bytes, seqs=1, q_len=1, past=middle)
                total += count * (made - 1) * decode / kv_rate
    return total


def _disk_bytes(graph: TaskGraph, budget: int, work: _Sequences) -> float:
    """Bytes that must be read from disk at least: everything once, and in every pass what the
    budget cannot hold."""
    held = work.held * graph.kv_bytes_per_token
    passes = max(work.passes, held / budget)
    weights = weights_read(graph, work.processed / passes)
    return max(weights, passes * (weights - budget) + held)


def weights_read(graph: TaskGraph, tokens: float) -> float:
    """Weight bytes that one pass over ``tokens`` tokens touches; of the embedding only rows."""
    total = float(graph.weight_bytes - sum(w.nbytes for w in embed_weights(graph)))
    for layer in range(len(graph.layers)):
        if experts := experts_of(graph, layer):
            missed = (1 - experts.top_k / experts.count) ** tokens
            total -= missed * experts.count * experts.nbytes
    return total
