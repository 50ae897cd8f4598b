"""Policies for machines with a GPU: every published system as the knobs that it fixes.

All make their moves in the same way, in ``gpu_moves``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from dovetail.ir.placement import experts_of
from dovetail.passes.gpu.cost import GpuCosts, Shape
from dovetail.passes.gpu.memory import unit_sizes
from dovetail.passes.policies.common import Knobs, max_experts, powers
from dovetail.passes.policies.gpu_moves import DEFAULTS, GpuSetting, buffers, moves
from dovetail.solvers import linear_share

__all__ = [
    "DEFAULTS",
    "GPU_POLICIES",
    "LINEARS",
    "GpuPolicy",
    "GpuSetting",
    "buffers",
    "ladders",
    "linears_share",
    "moves",
    "starts",
]


LINEARS = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90)
"""Percent of what is copied that the CPU may compute."""


@dataclass(frozen=True, slots=True)
class GpuPolicy:
    """A named policy: the knobs that it fixes and those that it leaves to the search."""

    name: str
    source: str
    fixed: Knobs
    free: tuple[str, ...]


GPU_POLICIES = {
    policy.name: policy
    for policy in (
        GpuPolicy(
            "eager",
            "everything in hbm",
            {"kv_hbm": 100, "slots": 1, "chunk": 1, "refill": True, "whole": True},
            ("seqs", "prefill_tokens"),
        ),
        GpuPolicy(
            "weight_stream",
            "accelerate, AirLLM: one layer at a time, copied before it is run",
            {"kv_hbm": 100, "resident": 0, "one_batch": True, "layers": 1, "dense_slots": 1},
            ("seqs",),
        ),
        GpuPolicy(
            "model_batch",
            "DeepSpeed ZeRO-Inference (arXiv 2207.00032): weights streamed, KV on the GPU",
            {"kv_hbm": 100, "resident": 0, "one_batch": True, "layers": 2},
            ("seqs",),
        ),
        GpuPolicy(
            "zigzag",
            "FlexGen (arXiv 2303.06865)",
            {"accumulate": False, "layers": 2, "barrier": True},
            ("seqs", "rows", "kv_hbm"),
        ),
        GpuPolicy(
            "cgopipe",
            "MoE-Lightning (arXiv 2411.11217)",
            {"accumulate": False, "layers": 2, "paged": True, "attention_cpu": 100},
            ("seqs", "rows"),
        ),
        GpuPolicy(
            "module_batch",
            "MoE-Gen (arXiv 2503.09716)",
            {"expert_rows": 2048},
            ("seqs", "rows", "prefill_tokens", "attention_cpu", "slots", "chunk"),
        ),
        GpuPolicy(
            "hybrid_cpu_gpu",
            "HybriMoE (arXiv 2504.05897), HeteGen (arXiv 2403.01164), Fiddler (arXiv 2402.07033)",
            {"kv_hbm": 100},
            ("seqs", "rows", "experts_cpu", "by_load", "linears_cpu"),
        ),
        GpuPolicy(
            "nano_overlap",
            "NanoFlow (arXiv 2408.12757)",
            {"kv_hbm": 100, "streams": 2, "refill": True},
            ("seqs", "rows", "prefill_tokens"),
        ),
        GpuPolicy(
            "chunked_prefill",
            "Sarathi-Serve (arXiv 2403.02310)",
            {"kv_hbm": 100, "refill": True},
            ("seqs", "prefill_tokens"),
        ),
        GpuPolicy(
            "layered_prefill",
            "Layered Prefill (arXiv 2510.08055)",
            {"kv_hbm": 100, "refill": True, "layer_groups": 4},
            ("seqs", "prefill_tokens", "layer_groups"),
        ),
        GpuPolicy(
            "joint",
            "all knobs at once: what the planner may do beyond the published policies",
            {},
            (
                "seqs", "rows", "prefill_tokens", "kv_hbm", "attention_cpu", "experts_cpu",
                "by_load", "linears_cpu", "slots", "chunk", "refill", "streams",
            ),
        ),
    )
}  # fmt: skip


def ladders(setting: GpuSetting) -> dict[str, tuple[int | bool, ...]]:
    """The values that each knob may take, in order."""
    longest, prompts = setting.workload.longest, setting.workload.prompts
    percent = (0, 20, 40, 60, 80, 100)
    tokens = sorted(
        {longest * n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if longest * n <= 1 << 18}
    )
    return {
        "seqs": tuple(_between(powers(1, prompts))),
        "rows": tuple(n * setting.gpus for n in (8, 16, 32, 64, 128, 256, 512)),
        "prefill_tokens": tuple(tokens),
        "kv_hbm": percent,
        "attention_cpu": percent,
        "experts_cpu": (0, 10, 25, 50, 75, 90, 100),
        "by_load": (False, True),
        "linears_cpu": LINEARS,
        "slots": (2, 3, 4, 6, 8, 12, 16),
        "chunk": tuple(n for n in (1, 2, 4, 8, 16) if n <= max(1, max_experts(setting.graph))),
        "refill": (False, True),
        "streams": (1, 2),
        "layer_groups": tuple(n for n in (0, 2, 4, 8, 16) if n <= len(setting.layers)),
    }


def _between(values: list[int]) -> list[int]:
    """The values and one step between neighbours."""
    middles = {(a + b) // 2 for a, b in pairwise(values)}
    return sorted(middles | set(values))


def starts(setting: GpuSetting, policy: GpuPolicy) -> Iterator[Knobs]:
    """For every number of sequences in flight, doubling, the free knobs in a few combinations."""
    prefill = max(
        setting.workload.longest, 8192 // setting.workload.longest * setting.workload.longest
    )
    for seqs in powers(1, setting.workload.prompts):
        base = {**DEFAULTS, "rows": int(DEFAULTS["rows"]) * setting.gpus, **policy.fixed}
        base |= {"seqs": seqs, "prefill_tokens": prefill}
        yield base
        if "kv_hbm" in policy.free:
            yield {**base, "kv_hbm": 100}
        if "attention_cpu" in policy.free:
            yield {**base, "kv_hbm": 0, "attention_cpu": 100}
        if "experts_cpu" in policy.free:
            yield {**base, "kv_hbm": 100, "experts_cpu": 50}
        if "by_load" in policy.free:
            yield {**base, "kv_hbm": 100, "experts_cpu": 100, "by_load": True}
        if "linears_cpu" in policy.free:
            yield {**base, "kv_hbm": 100, "linears_cpu": linears_share(setting, seqs)}


def linears_share(setting: GpuSetting, tokens: int) -> int:
    """HeteGen's share of what is copied, in percent, from the ladder: that which balances CPU, link
    and GPU in the widest layer when ``tokens`` tokens pass it and nothing is in hbm."""
    graph, costs = setting.graph, GpuCosts(setting.machine, setting.graph.dtype)
    layer = max(setting.layers, key=lambda i: unit_sizes(graph).experts[i])
    body, shape = graph.body(layer), Shape(tokens, 1, 0)
    whole = costs.products(body, shape)
    nbytes, cpu, gpu = float(unit_sizes(graph).dense[layer]), whole.host, whole.gpu
    if spec := experts_of(graph, layer):
        loads = costs.loads.of(layer, spec, None, tokens)
        nbytes += spec.count * spec.nbytes
        cpu += costs.host_loads(spec, loads)
        gpu += costs.expert_loads(spec, loads, 1 << 30)
    link = nbytes / costs.gpu.h2d.peak
    best = 100 * linear_share.solve(cpu, link, gpu).value
    return min(LINEARS, key=lambda percent: abs(percent - best))
