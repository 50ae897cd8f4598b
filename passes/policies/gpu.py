"""Policies for machines with a GPU: every published system as the knobs that it fixes.

All make their moves in the same way: batches, buffers and shares from the knobs, then hbm is filled
with weights (dense layers, head and embedding, the same number of experts in every layer), then
ram; what is left stays on disk.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from dovetail.ir.machine import Machine
from dovetail.ir.moves import (
    Accumulate,
    Assign,
    Dispatch,
    Move,
    Overlap,
    Place,
    Prefetch,
    Reorder,
    Split,
    Tier,
)
from dovetail.ir.placement import experts_of
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.gpu_cost import GpuCosts, Shape
from dovetail.passes.gpu_memory import tier_bytes, unit_sizes
from dovetail.passes.policies.common import Knobs, fuse_moves, max_experts, powers
from dovetail.solvers import linear_share

BLOCK = 64 << 20
"""Bytes of one disk read or copy."""
LINEARS = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90)
"""Percent of what is copied that the CPU may compute."""


@dataclass(frozen=True, slots=True)
class GpuSetting:
    """What a policy decides for: ``hbm`` bytes of one GPU and ``ram`` bytes may be used."""

    graph: TaskGraph
    machine: Machine
    hbm: int
    ram: int
    workload: Workload

    @property
    def layers(self) -> tuple[int, ...]:
        """All layer numbers."""
        return tuple(range(len(self.graph.layers)))

    @property
    def gpus(self) -> int:
        """How many GPUs share the work."""
        assert self.machine.accelerator is not None
        return self.machine.accelerator.count

    def kv_tokens(self, seqs: int) -> int:
        """KV tokens that the ``seqs`` longest prompts need."""
        tokens, left = 0, seqs
        for length, count in self.workload.lengths:
            taken = min(count, left)
            tokens += taken * (length + self.workload.new_tokens - 1)
            left -= taken
        return tokens


@dataclass(frozen=True, slots=True)
class GpuPolicy:
    """A named policy: the knobs that it fixes and those that it leaves to the search."""

    name: str
    source: str
    fixed: Knobs
    free: tuple[str, ...]


DEFAULTS: Knobs = {
    "rows": 256,
    "prefill_tokens": 8192,
    "attn_tokens": 8192,
    "chunk": 1,
    "slots": 3,
    "dense_slots": 2,
    "expert_rows": 8192,
    "kv_hbm": 0,
    "attention_cpu": 0,
    "experts_cpu": 0,
    "by_load": False,
    "linears_cpu": 0,
    "resident": 100,
    "streams": 1,
    "layers": 0,
    "accumulate": True,
    "paged": False,
    "barrier": False,
    "refill": False,
    "layer_groups": 0,
    "one_batch": False,
    "whole": False,
}
"""``kv_hbm``, ``attention_cpu``, ``experts_cpu`` (chosen in every step ``by_load``) and
``linears_cpu`` in percent; ``resident`` percent of the weights that fit are kept in hbm;
``streams`` 2 runs decode attention beside matrix products; prompts pass one of ``layer_groups`` a
step; ``layers`` whole layers of buffers, instead of ``slots`` loads of ``chunk`` experts;
``one_batch`` makes all sequences one group; ``whole`` allows only what fits into hbm entirely."""

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
        "rows": (8, 16, 32, 64, 128, 256, 512),
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
        base = {**DEFAULTS, **policy.fixed, "seqs": seqs, "prefill_tokens": prefill}
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


def moves(setting: GpuSetting, knobs: Knobs) -> tuple[Move, ...] | None:
    """The schedule of these knobs, or None if a tier is too small for it."""
    knobs = {**DEFAULTS, **knobs}
    seqs = int(knobs["seqs"])
    rows = seqs if knobs["one_batch"] else min(int(knobs["rows"]), seqs)
    kv_hbm, attention_cpu = int(knobs["kv_hbm"]), int(knobs["attention_cpu"])
    beside = knobs["experts_cpu"] or knobs["linears_cpu"]
    # Pages are copied ahead of the router, what is dealt by load after it.
    early = knobs["paged"] and knobs["experts_cpu"] and knobs["by_load"]
    if kv_hbm + attention_cpu > 100 or (knobs["barrier"] and beside) or early:
        return None
    if knobs["by_load"] and knobs["linears_cpu"]:
        # Experts that are dealt out in every step are the CPU's as a whole or not at all.
        return None
    longest = setting.workload.longest
    prefill = max(longest, min(int(knobs["prefill_tokens"]), seqs * longest))
    chunk, slots = buffers(setting, knobs)
    fixed: list[Move] = [
        Assign("all", "gpu", 100),
        Dispatch(
            seqs,
            setting.kv_tokens(seqs),
            prefill,
            longest,
            refill=bool(knobs["refill"]),
            layer_groups=min(int(knobs["layer_groups"]), len(setting.layers)),
        ),
        *fuse_moves(setting.graph),
        Split("attention", "seqs", rows),
        Split("attention", "tokens", min(prefill, max(int(knobs["attn_tokens"]), longest))),
        Split("experts", "experts", chunk),
        Split("experts", "tokens", int(knobs["expert_rows"])),
        Split("head", "seqs", 1024),
        Prefetch("dense", int(knobs["dense_slots"]), BLOCK),
        Prefetch("experts", slots, BLOCK),
        Prefetch("head", 1, BLOCK),
        Overlap(int(knobs["streams"]), threads=1),
        Place("kv", "hbm", (), kv_hbm),
    ]
    if knobs["accumulate"]:
        fixed.append(Accumulate("experts", "tokens"))
    if knobs["paged"]:
        fixed.append(Reorder("experts", "paged"))
    if attention_cpu:
        fixed.append(Assign("attention", "cpu", attention_cpu))
    if knobs["barrier"]:
        fixed.append(Reorder("experts", "barrier"))
    if knobs["experts_cpu"]:
        by: Literal["", "load"] = "load" if knobs["by_load"] else ""
        fixed.append(Assign("experts", "cpu", int(knobs["experts_cpu"]), by))
    if knobs["linears_cpu"]:
        fixed.append(Assign("linears", "cpu", int(knobs["linears_cpu"])))
    return _fill(setting, fixed, knobs)


def buffers(setting: GpuSetting, knobs: Knobs) -> tuple[int, int]:
    """Experts in a load, and loads that have a buffer."""
    chunk, slots = int(knobs["chunk"]), int(knobs["slots"])
    if layers := int(knobs["layers"]):
        # Runtimes that stream whole layers keep the current one, and the next if they prefetch.
        count = max(1, max_experts(setting.graph))
        chunk = max(1, count // 16)
        slots = layers * -(-count // chunk)
    return chunk, slots


def _fill(setting: GpuSetting, fixed: list[Move], knobs: Knobs) -> tuple[Move, ...] | None:
    spare = _spare(setting, fixed)
    if spare["hbm"] < 0:
        return None
    budget = spare["hbm"] * int(knobs["resident"]) // 100
    chosen = list(fixed)
    graph, layers = setting.graph, setting.layers
    sizes = unit_sizes(graph)
    for move, size in (
        (Place("dense", "hbm", layers), sum(sizes.dense)),
        (Place("head", "hbm"), sizes.head),
        (Place("embed", "hbm"), sizes.embed),
    ):
        if size <= budget:
            chosen.append(move)
            budget -= size
    # Experts that a step deals out by load may each be wanted on the GPU.
    on_cpu = 0 if knobs["by_load"] else int(knobs["experts_cpu"])
    count, everything = _experts_in_hbm(setting, budget, on_cpu)
    chosen += _place_experts(setting, "hbm", count)
    if knobs["whole"] and not (everything and Place("dense", "hbm", layers) in chosen):
        return None
    return _fill_ram(setting, chosen, count)


def _fill_ram(setting: GpuSetting, chosen: list[Move], in_hbm: int) -> tuple[Move, ...] | None:
    """Everything else in ram, or as many experts as it holds beside all dense layers."""
    rest: list[Move] = [Place("embed", "ram")] if not _has(chosen, "embed") else []
    rest += [Place("head", "ram")] if not _has(chosen, "head") else []
    rest += [Place("dense", "ram", setting.layers)] if not _has(chosen, "dense") else []
    one, every = _expert_size(setting)
    spare = _spare(setting, [*chosen, *rest])["ram"]
    count = min(every - in_hbm, max(0, spare) // one) if one else 0
    # What comes from disk needs room for staging, which the first guess leaves out.
    for tried in (count, count - 4, count - 64, 0):
        if tried >= 0:
            made = [*chosen, *rest, *_place_experts(setting, "ram", tried, in_hbm)]
            if all(size >= 0 for size in _spare(setting, made).values()):
                return tuple(made)
    return None


def _has(chosen: list[Move], unit: str) -> bool:
    return any(isinstance(m, Place) and m.unit == unit and m.tier == "hbm" for m in chosen)


def _expert_size(setting: GpuSetting) -> tuple[int, int]:
    """Bytes of the largest expert, and experts of all layers together."""
    sizes = unit_sizes(setting.graph)
    return max(sizes.expert, default=0), sum(sizes.experts)


def _experts_in_hbm(setting: GpuSetting, budget: int, cpu_percent: int) -> tuple[int, bool]:
    """Experts of all layers together that fit on the GPUs, and whether these are all."""
    one, every = _expert_size(setting)
    if not every:
        return 0, True
    wanted = every - round(every * cpu_percent / 100)
    # A layer's experts are dealt out to the GPUs, so each may hold one more than its share.
    rounding = len(setting.layers) * (setting.gpus - 1)
    count = min(wanted, max(0, budget * setting.gpus // one - rounding))
    if wanted == every and budget * setting.gpus >= every * one:
        count = every
    return count, count == every


def _place_experts(setting: GpuSetting, tier: Tier, total: int, before: int = 0) -> list[Move]:
    """``total`` experts in a tier, dealt out to the layers as evenly as can be, when ``before``
    are in faster tiers: the layers that got one less there come first."""
    counts = unit_sizes(setting.graph).experts
    routed = [layer for layer, count in enumerate(counts) if count]
    found: dict[int, list[int]] = {}
    for place, layer in enumerate(routed):
        had = _dealt(before, place, len(routed))
        share = _dealt(before + total, place, len(routed)) - had
        if share:
            found.setdefault(min(share, counts[layer] - had), []).append(layer)
    return [Place("experts", tier, tuple(layers), n) for n, layers in found.items()]


def _dealt(total: int, place: int, layers: int) -> int:
    return (total + layers - 1 - place) // layers


def _spare(setting: GpuSetting, chosen: list[Move]) -> Mapping[str, int]:
    used = tier_bytes(apply_moves(setting.graph, chosen), setting.gpus)
    return {
        "hbm": setting.hbm - sum(used["hbm"].values()),
        "ram": setting.ram - sum(used["ram"].values()),
    }
