"""GPU bound: `graph, machine, budget, workload -> a time that no schedule can beat`.

With P passes over the model, of W bytes of weights each, and C the bytes of KV that are in use at
the start of a pass, over all passes: all arithmetic at the best rates of GPUs and CPU together;
what hbm does not hold of weights and KV crosses the link or is read by the CPU from ram, in every
pass; what hbm and ram hold of KV they do not hold of weights, so with M bytes of both, at least
``P * W - (P - 1) * M + C`` bytes are read from disk (the first pass begins with nothing). P is at
least the longest generation, and at least the KV of all sequences over what memory holds at a time.
More passes keep less KV in use and read fewer experts each: the bound is the least over all P of
the longest of these. Routing is taken as uniform, passes as equally full.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dovetail.ir.expr import evaluate
from dovetail.ir.machine import Machine
from dovetail.ir.plan import Bound
from dovetail.ir.task_graph import ITEMSIZE, TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.bound import body_costs, gemm_flops, weights_read

STEP = 1.004
"""Ratio of one number of passes that is looked at to the next."""


def gpu_bound(
    graph: TaskGraph, machine: Machine, budget: Mapping[str, int], workload: Workload
) -> Bound:
    """The bound of a workload in which every sequence reaches its full length."""
    gpu = machine.accelerator
    assert gpu is not None
    hbm, ram = budget["hbm"] * gpu.count, budget["ram"]
    new = workload.new_tokens
    held = sum(n * (length * new + new * (new - 1) / 2) for length, n in workload.lengths)
    kv = held * graph.kv_bytes_per_token
    weights_of = _WeightsRead(graph, workload)
    kv_read = kv - workload.prompt_tokens * graph.kv_bytes_per_token
    in_use = max(0.0, kv_read - workload.prompts * (new - 1) * graph.kv_bytes_per_token)
    host = _host_bandwidth(machine, graph.dtype)
    memory, links = gpu.count * gpu.hbm_bandwidth + host, gpu.count * gpu.h2d.peak + host
    compute = _compute_seconds(graph, machine, workload)

    def least(passes: float, most: float) -> dict[str, float]:
        """What each resource takes at least with this many passes and not more than ``most``."""
        read = passes * weights_of(passes)
        return {
            "compute": compute,
            "memory": (read + kv_read) / memory,
            # KV may be in hbm instead of weights: only what exceeds hbm in every pass must cross.
            "links": max(0.0, read - most * hbm + kv_read) / links,
            "disk": max(read / passes, read - (most - 1) * (hbm + ram) + in_use)
            / machine.disk.peak,
        }

    parts = _least_of_all(least, max(new, kv / (hbm + ram)))
    resource = max(parts, key=lambda name: parts[name])
    return Bound(parts[resource], resource, parts)


@dataclass(frozen=True, slots=True)
class _WeightsRead:
    """Bytes of weights that one of so many passes reads; all passes together read the more, the
    more there are."""

    graph: TaskGraph
    workload: Workload

    def __call__(self, passes: float) -> float:
        tokens = self.workload.prompt_tokens + self.workload.prompts * self.workload.new_tokens
        return weights_read(self.graph, tokens / passes)


def _least_of_all(
    least: Callable[[float, float], dict[str, float]], passes: float
) -> dict[str, float]:
    """The parts for the number of passes, from ``passes`` up, whose longest part is shortest. What
    all numbers of a small range take at least bounds each of them; beyond the range at which
    memory alone takes longer than the best, none is better."""
    best: dict[str, float] = {}
    while True:
        parts = least(passes, passes * STEP)
        if not best or max(parts.values()) < max(best.values()):
            best = parts
        if parts["memory"] >= max(best.values()):
            return best
        passes *= STEP


def _host_bandwidth(machine: Machine, dtype: str) -> float:
    """Bytes/s of ram that the CPU's workers read at best: KV, or weights of thin products."""
    gemm, item = machine.gemm[dtype], ITEMSIZE[dtype]
    # Every row of a product makes two FLOPs of each weight that is read.
    weights = max(y / x * item / 2 for x, y in zip(gemm.x, gemm.y, strict=True))
    return machine.workers * max(machine.kv_bandwidth[dtype].peak, weights)


def _compute_seconds(graph: TaskGraph, machine: Machine, workload: Workload) -> float:
    """Products and prefill attention, each shared by GPUs and CPU in the best way."""
    gpu, dtype = machine.accelerator, graph.dtype
    assert gpu is not None
    generated = workload.prompts * workload.new_tokens
    tokens = workload.prompt_tokens + generated - workload.prompts
    bodies = [graph.body(i) for i in range(len(graph.layers))]
    products = generated * gemm_flops(graph.epilogue)
    products += sum(tokens * gemm_flops(body) for body in bodies)
    attention = sum(
        count * evaluate(cost.flops, seqs=1, q_len=length, past=0)
        for body in bodies
        for cost in body_costs(body)
        if cost.kind == "attention"
        for length, count in workload.lengths
        if cost.runs(length)
    )
    rates = (
        (gpu.count * gpu.gemm[dtype].peak, gpu.count * gpu.attention[dtype].peak),
        (
            machine.workers * machine.gemm[dtype].peak,
            machine.workers * machine.attention[dtype].peak,
        ),
    )
    return shared_seconds((products, attention), rates)


def shared_seconds(work: tuple[float, float], rates: Sequence[tuple[float, float]]) -> float:
    """Least time for two kinds of work on machines with a rate for each, split at will.

    The dual of that linear program: at prices p and q of the two kinds, no schedule earns more than
    every machine at its dearer kind; the best prices make some machine indifferent.
    """
    prices = [(1.0, 0.0), (0.0, 1.0), *((b, a) for a, b in rates)]
    return max(
        (p * work[0] + q * work[1]) / sum(max(p * a, q * b) for a, b in rates) for p, q in prices
    )
