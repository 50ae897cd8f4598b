"""GPU loads: `a step's work, a way to run it -> ticks of every engine in one layer, at least`.

What operations take is asked of the loop body's own builder, with each kind of group as one bundle:
more bundles only add launches and smaller copies. Beside the engines there are chains:

    turn     attention of all groups, then all experts: no layer overtakes itself
    alone    attention of one bundle of groups, whatever the others do
    refill   copies that find no buffer before the first expert has run, then a turn's attention
    relay    reads from disk that find no buffer, in ram or beyond, before that, then the same

The CPU is slowed by copies that read the same memory, by 1 / (1 - a h / m) where h and m are busy
ticks of the link and of the busiest engine, and a the share that it loses beside copies. Whichever
engine is the busiest, no layer is shorter than the CPU's own ticks + a h, so that is its row.
"""

import math
from dataclasses import dataclass, replace

from dovetail.ir.placement import experts_of
from dovetail.ir.task_graph import Experts
from dovetail.passes.apply_moves import Layout
from dovetail.passes.expert_loads import ANY
from dovetail.passes.gpu.cost import GpuCosts, Shape
from dovetail.passes.loop.builder import Builder
from dovetail.passes.loop.experts import experts_ends
from dovetail.passes.loop.groups import MAX_GROUPS, bundle
from dovetail.passes.loop.work import TICK, StepWork

ENGINES = ("gpu0", "gpu1", "h2d", "d2h", "disk", "cpu")
ROWS = (*ENGINES, "turn", "alone", "refill", "relay")
"""What may be busiest in a layer."""
ALONE = {
    "prefill": ("gpu0",),
    "hbm": ("gpu0", "gpu1"),
    "copied": ("gpu0", "gpu1"),
    "cpu": ENGINES,
}
"""Engines that one bundle's attention passes one after the other, by its kind."""
ROUNDING = 0.5
"""Ticks by which an operation of a loop body may be rounded down."""
NEVER = -1e9
"""Ticks of a row that does not count."""
NO_TURNS = dict.fromkeys(("turn", "refill", "relay"), NEVER)
"""Rows of experts that do not wait for all groups."""
Groups = tuple[int, int] | None
Loads = dict[str, float]
"""Ticks by row; those that are missing are 0."""


@dataclass(frozen=True, slots=True)
class Attention:
    """How groups of sequences run: ``rows`` sequences in a group that decodes, ``tokens`` in one of
    prompts, percent of the sequences with their KV in hbm and percent whose attention the CPU does,
    and how many streams the GPU has."""

    rows: int
    tokens: int
    kv_hbm: int
    cpu: int
    streams: int


@dataclass(frozen=True, slots=True)
class Part:
    """Attention of one kind: its loads, ticks through all of its bundles, and of one alone."""

    loads: Loads
    chain: float
    alone: float


class LoopLoads:
    """Loads of a model's layers on a machine; ``layout`` has what no option decides."""

    def __init__(self, layout: Layout, costs: GpuCosts) -> None:
        assert layout.device is not None and layout.accumulated
        self._layout, self._device, self._costs = layout, layout.device, costs
        self.lost = 1 - costs.machine.slowdown.get("cpu|h2d", costs.beside_copies)
        self._groups: dict[tuple[int, str, Shape, tuple[int, int, int]], Loads] = {}
        self._parts: dict[tuple[int | str | Shape, ...], Part] = {}
        self._experts: dict[tuple[int, StepWork, int, Groups], Loads] = {}

    def attention(self, work: StepWork, layer: int, way: Attention) -> Loads:
        """Everything before a layer's experts."""
        total = dict.fromkeys(ENGINES, 0.0)
        chain = alone = 0.0
        if work.prefill:
            per_group = max(1, way.tokens // work.prefill.q_len)
            bundles = min(math.ceil(work.prefill.seqs / per_group), MAX_GROUPS // 2)
            part = self._part(layer, "prefill", work.prefill, way, bundles)
            alone, found = part.alone, part.loads
            _add(total, found | {"d2h": found.get("d2h", 0.0) * (1 - way.kv_hbm / 100)})
        shares = {"hbm": way.kv_hbm, "cpu": way.cpu, "copied": 100 - way.kv_hbm - way.cpu}
        kinds = sum([percent > 0 for percent in shares.values()])
        for kind, percent in shares.items():
            seqs = round(work.decode.seqs * percent / 100) if work.decode else 0
            if seqs and work.decode:
                shape = Shape(seqs, 1, work.decode.past)
                bundles = min(math.ceil(seqs / way.rows), MAX_GROUPS // kinds)
                part = self._part(layer, kind, shape, way, bundles)
                _add(total, part.loads)
                chain, alone = max(chain, part.chain), max(alone, part.alone)
        turn = max(total["gpu0"], chain)
        total |= {"turn": turn, "alone": alone, "refill": turn, "relay": turn}
        return total

    def experts(self, work: StepWork, layer: int, cpu: int, groups: Groups) -> Loads:
        """A layer's experts, none of them copied or read, ``cpu`` percent on the CPU: over all
        groups' tokens (None), or over one group after the other, of so many sequences that decode
        or tokens of prompts, which makes no group wait for others."""
        key = layer, work, cpu, groups
        if key not in self._experts:
            self._experts[key] = self._experts_of(*key)
        return self._experts[key]

    def tail(self, work: StepWork, layer: int) -> float:
        """Ticks of what comes after a layer's experts."""
        body, gpus = self._layout.graph.body(layer), self._costs.gpu.count
        shapes = [s for s in (work.prefill, work.decode) if s]
        local = [Shape(math.ceil(s.seqs / gpus), s.q_len, s.past) for s in shapes]
        seconds = sum(self._costs.group(body, shape).tail for shape in local)
        return max(0.0, seconds / TICK - ROUNDING)

    def _part(self, layer: int, kind: str, shape: Shape, way: Attention, bundles: int) -> Part:
        """What ``attention`` of one kind takes in so many bundles."""
        rows, tokens, streams = way.rows, way.tokens, way.streams
        if kind == "prefill":
            rows = streams = 1
        else:
            tokens = 1
        key = layer, kind, shape, rows, tokens, streams, bundles
        if key not in self._parts:
            found = self._group(layer, kind, shape, (rows, tokens, streams))
            alone = sum(found.get(engine, 0.0) for engine in ALONE[kind]) / bundles
            self._parts[key] = Part(found, _through(found, bundles), alone)
        return self._parts[key]

    def _group(self, layer: int, kind: str, shape: Shape, way: tuple[int, int, int]) -> Loads:
        key = layer, kind, shape, way
        if key not in self._groups:
            rows, tokens, streams = way
            device = replace(self._device, kv_percent=0)
            layout = replace(
                self._layout, rows=rows, attn_tokens=tokens, workers=streams, device=device
            )
            builder = Builder(layout, self._costs, StepWork(shape, None), layer)
            bundle(builder, 0, kind, shape, [])
            self._groups[key] = _loads(builder, MAX_GROUPS)
        return self._groups[key]

    def _experts_of(self, layer: int, work: StepWork, cpu: int, groups: Groups) -> Loads:
        spec = experts_of(self._layout.graph, layer)
        if spec is None:
            return NO_TURNS if groups else {}
        layers = len(self._layout.graph.layers)
        device = replace(self._device, experts=(spec.count,) * layers, experts_cpu=cpu)
        layout = replace(self._layout, device=device, experts_resident=(spec.count,) * layers)
        builder = Builder(layout, self._costs, work, layer)
        experts_ends(builder, spec, [])
        found = _loads(builder, 1)
        if groups:
            on_gpu = 1 - round(spec.count * cpu / 100) / spec.count
            grouped = on_gpu * self._group_by_group(spec, work, *groups)
            return found | {"gpu0": grouped} | NO_TURNS
        host = sum(found.get(engine, 0.0) for engine in ("d2h", "cpu", "h2d"))
        return found | {"turn": max(found.get("gpu0", 0.0), host)}

    def _group_by_group(self, spec: Experts, work: StepWork, rows: int, tokens: int) -> float:
        """Ticks of all experts on the GPUs over one group after the other."""
        costs, ticks = self._costs, 0.0
        for shape, most in ((work.prefill, tokens), (work.decode, rows)):
            if shape:
                every = shape.seqs * shape.q_len
                group = min(every, most)
                loads = costs.loads.of(ANY, spec, None, group)
                dealt = [replace(load, count=load.count / costs.gpu.count) for load in loads]
                ticks += every / group * costs.expert_loads(spec, dealt, 1 << 30) / TICK
        return max(0.0, ticks - 2 * MAX_GROUPS * ROUNDING)


def _loads(builder: Builder, bundles: int) -> Loads:
    """Ticks of every engine, less what ``bundles`` such parts may lose in rounding."""
    found: Loads = {}
    for op in builder.ops:
        found[op.engine] = found.get(op.engine, 0.0) + op.duration - ROUNDING * (1 + bundles)
    return {engine: max(0.0, ticks) for engine, ticks in found.items()}


def _add(total: Loads, more: Loads) -> None:
    for engine, ticks in more.items():
        total[engine] = total.get(engine, 0.0) + ticks


def _through(found: Loads, bundles: int) -> float:
    """Ticks from the first of ``bundles`` to the end of the last: all of them on the engine that is
    neither the first nor the last, and the others' work for one."""
    middle = found.get("cpu", 0.0) or found.get("gpu1", 0.0)
    rest = sum(ticks for engine, ticks in found.items() if engine not in ("cpu", "gpu1"))
    return middle + rest / bundles if middle else 0.0
