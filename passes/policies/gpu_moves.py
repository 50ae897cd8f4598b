"""Moves of a GPU policy: `setting, knobs -> moves`, made in the same way for all.

Batches, buffers and shares come from the knobs, then hbm is filled with weights (dense layers, head
and embedding, the same number of experts in every layer), then ram; what is left stays on disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.gpu.memory import tier_bytes, unit_sizes
from dovetail.passes.policies.common import Knobs, fuse_moves, max_experts

BLOCK = 64 << 20
"""Bytes of one disk read or copy."""

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


@dataclass(frozen=True, slots=True)
class GpuSetting:
    """What a policy decides for: ``hbm`` bytes of one GPU and ``ram`` bytes may be used. A schedule
    that ``runs`` has no columns of matrices on the CPU, which are simulated only."""

    graph: TaskGraph
    machine: Machine
    hbm: int
    ram: int
    workload: Workload
    runs: bool = False

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
    if setting.runs and knobs["linears_cpu"]:
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
