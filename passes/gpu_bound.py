"""GPU bound: `graph, machine, budget, workload -> a time that no schedule can beat`.

With P passes over the model: all arithmetic at the best rates of GPUs and CPU together; what hbm
does not hold of weights and KV crosses the link or is read by the CPU from ram, in every pass; what
hbm and ram together do not hold is read from disk. P is at least the longest generation, and at
least the KV of all sequences over what memory holds at a time. Routing is taken as uniform.
"""

from collections.abc import Mapping

from dovetail.ir.expr import evaluate
from dovetail.ir.machine import Machine
from dovetail.ir.placement import embed_weights, experts_of
from dovetail.ir.plan import Bound
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.bound import gemm_flops
from dovetail.passes.cost import op_cost


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
    passes = max(new, kv / (hbm + ram))
    weights = _weights_read(graph, (workload.prompt_tokens + workload.prompts * new) / passes)
    kv_read = kv - workload.prompt_tokens * graph.kv_bytes_per_token
    host = machine.workers * machine.kv_bandwidth[graph.dtype].peak
    links = gpu.count * gpu.h2d.peak + host
    parts = {
        "compute": _compute_seconds(graph, machine, workload),
        "memory": (passes * weights + kv_read) / (gpu.count * gpu.hbm_bandwidth + host),
        # KV may be in hbm instead of weights: only what exceeds hbm in every pass must cross.
        "links": max(0.0, passes * (weights - hbm) + kv_read) / links,
        "disk": max(0.0, passes * (weights - hbm - ram)) / machine.disk.peak,
    }
    resource = max(parts, key=lambda name: parts[name])
    return Bound(parts[resource], resource, parts)


def _compute_seconds(graph: TaskGraph, machine: Machine, workload: Workload) -> float:
    gpu = machine.accelerator
    assert gpu is not None
    generated = workload.prompts * workload.new_tokens
    tokens = workload.prompt_tokens + generated - workload.prompts
    flops = generated * gemm_flops(graph.epilogue)
    flops += sum(tokens * gemm_flops(graph.body(i)) for i in range(len(graph.layers)))
    host = machine.workers * machine.gemm[graph.dtype].peak
    seconds = flops / (gpu.count * gpu.gemm[graph.dtype].peak + host)
    attention = 0.0
    for index in range(len(graph.layers)):
        body = graph.body(index)
        for task in body.tasks:
            weights = {w.fqn: w for w in task.weights}
            for cost in (op_cost(op, body.values, weights) for op in task.ops):
                if cost.kind == "attention":
                    attention += sum(
                        count * evaluate(cost.flops, seqs=1, q_len=length, past=0)
                        for length, count in workload.lengths
                    )
    rate = gpu.count * gpu.attention[graph.dtype].peak
    rate += machine.workers * machine.attention[graph.dtype].peak
    return seconds + attention / rate


def _weights_read(graph: TaskGraph, tokens: float) -> float:
    """Weight bytes that a pass over ``tokens`` tokens touches; of the embedding only rows."""
    total = float(graph.weight_bytes - sum(w.nbytes for w in embed_weights(graph)))
    for layer in range(len(graph.layers)):
        if experts := experts_of(graph, layer):
            missed = (1 - experts.top_k / experts.count) ** tokens
            total -= missed * experts.count * experts.nbytes
    return total
