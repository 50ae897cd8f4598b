"""Lower for a GPU: `predictor, a step's work -> program`, one instruction list per engine.

An operation waits for what it reads, for the last readers of the buffer that it takes over, and for
nothing that its engine knows already, through earlier waits. Layers with equal instructions become
loops.
"""

import math
from collections.abc import Mapping, Sequence

from dovetail.ir.gpu_program import (
    Do,
    GpuFlat,
    GpuInstruction,
    GpuProgram,
    Instance,
    Layers,
    Pool,
    Record,
    Take,
    Wait,
    instance_text,
    shifted,
)
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout
from dovetail.passes.gpu.memory import tier_bytes, unit_sizes
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.gpu.settle import Settled, settle
from dovetail.passes.gpu.step import CPU_READS, GpuStep, gpu_step
from dovetail.passes.loop.body import loop_body
from dovetail.passes.loop.groups import KV_BUFFERS
from dovetail.passes.loop.work import StepWork

MAX_PERIOD = 4
"""Longest pattern of layers that is recognised as a loop."""
STAGING_BUFFERS = 2
"""Reads from disk that have a pinned buffer each."""
TIERS = {"staging": "ram", CPU_READS: "ram"}
"""The tier of each pool that is not in hbm."""


def lower_gpu(
    predictor: GpuPredictor,
    work: StepWork,
    capacity: Mapping[str, int],
    group: int = 0,
    longest: int = 0,
) -> GpuProgram:
    """The program of one step that does ``work``; ``capacity`` is the budget of each tier in bytes,
    hbm that of one GPU; in layered prefill prompts pass the layers of ``group``. A buffer for KV
    that is copied holds a sequence of ``longest`` tokens at least. Raises VerifyError where the
    engines' orders leave them waiting for each other."""
    step = gpu_step(predictor, work, group)
    pools = _pools(predictor, step, longest)
    settled = settle(step, {pool.name: pool.slots for pool in pools})
    outputs = _outputs(settled)
    waits = _waits(settled, outputs)
    bodies = tuple(dict.fromkeys(step.layers))
    used = tier_bytes(predictor.layout, predictor.costs.gpu.count)
    return GpuProgram(
        kind=work.kind,
        engines=_engines(settled, waits),
        bodies=bodies,
        layers=tuple(bodies.index(body) for body in step.layers),
        pools=pools,
        outputs={name: count for name, count in outputs.items() if count > 1},
        reserved={tier: _beside(parts, tier, pools) for tier, parts in used.items()},
        capacity=dict(capacity),
        notes=_notes(predictor, work, settled),
    )


def gpu_programs(
    predictor: GpuPredictor, workload: Workload, capacity: Mapping[str, int]
) -> tuple[GpuProgram, ...]:
    """A program for each kind of step that a workload has: of its steps, that which takes longest
    in all."""
    return tuple(lower_gpu(predictor, work, capacity) for work in predictor.longest(workload))


def simulated_seconds(predictor: GpuPredictor, work: StepWork) -> float:
    """Seconds of one step, all its layers in the model's order, from its first operation to its
    last."""
    step = gpu_step(predictor, work)
    settled = settle(step, {pool.name: pool.slots for pool in _pools(predictor, step)})
    return max(settled.end.values())


def kv_slot_tokens(layout: Layout, longest: int = 0) -> int:
    """Tokens of a buffer for the KV of a group that is copied, for one of ``longest`` at least."""
    return max(layout.rows * math.ceil(layout.dispatch.kv_tokens / layout.dispatch.seqs), longest)


def _pools(predictor: GpuPredictor, step: GpuStep, longest: int = 0) -> tuple[Pool, ...]:
    """The buffers that the plan's prefetch moves give, those that the step takes; of those that the
    disk reads into, in whole pages."""
    layout, sizes = predictor.layout, unit_sizes(predictor.layout.graph)
    device, prefetch = layout.device, layout.prefetch
    assert device is not None
    used = tier_bytes(layout, predictor.costs.gpu.count)
    sent = 1 - device.linears_cpu / 100
    reads = (
        math.ceil(op.nbytes / sizes.expert[layer - 1]) * sizes.expert_read[layer - 1]
        for layer, ops in enumerate(step.layers)
        for op in ops
        if op.takes == CPU_READS
    )
    made = {
        "dense": (prefetch["dense"].slots, math.ceil(max(sizes.dense, default=0) * sent)),
        "experts": (
            prefetch["experts"].slots,
            math.ceil(layout.chunk * max(sizes.expert, default=0) * sent),
        ),
        "kv": (KV_BUFFERS, kv_slot_tokens(layout, longest) * sizes.kv_layer),
        "head": (1, sizes.head),
        "staging": (STAGING_BUFFERS, used["ram"]["staging"] // STAGING_BUFFERS),
        CPU_READS: (1, max(reads, default=0)),
    }
    taken = {op.takes for ops in step.layers for op in ops}
    return tuple(
        Pool(name, TIERS.get(name, "hbm"), slots, nbytes)
        for name, (slots, nbytes) in made.items()
        if name in taken
    )


def _beside(parts: Mapping[str, int], tier: str, pools: Sequence[Pool]) -> dict[str, int]:
    """Bytes of a tier beside the pools, by what they hold; KV that is copied has its own pool."""
    staged = sum(pool.nbytes for pool in pools if pool.name == "kv" and tier == "hbm")
    pooled = ("rings", "staging", "cpu_reads")
    found = {name: size for name, size in parts.items() if name not in pooled}
    return found | {"kv": max(0, found.get("kv", 0) - staged)}


def _outputs(settled: Settled) -> dict[str, int]:
    """How many output buffers each operation without a pool needs, so that it need not wait for the
    readers of an earlier layer's."""
    place = {key: i for i, key in enumerate(settled.sequence)}
    found: dict[str, int] = {}
    by_name: dict[str, list[Instance]] = {}
    for key in sorted(settled.sequence, key=lambda key: key[1]):
        if settled.ops[key].takes:
            continue
        earlier = by_name.setdefault(key[0], [])
        live = 1
        for old in reversed(earlier):
            if all(place[reader] < place[key] for reader in settled.readers[old]):
                break
            live = key[1] - old[1] + 1
        found[key[0]] = max(found.get(key[0], 1), live)
        earlier.append(key)
    return found


def _waits(settled: Settled, outputs: Mapping[str, int]) -> dict[Instance, list[Instance]]:
    """What each operation has to wait for beyond what its engine knows: vector clocks, as many
    operations of each engine as are known to have ended."""
    place = {key: i for i, key in enumerate(settled.sequence)}
    known: dict[str, dict[str, int]] = {}
    at: dict[Instance, tuple[int, dict[str, int]]] = {}
    found: dict[Instance, list[Instance]] = {}
    count: dict[str, int] = {}
    for key in settled.sequence:
        engine = settled.ops[key].engine
        mine = known.setdefault(engine, {})
        needed = {*settled.needs[key], *_before_writing(key, settled, outputs)} - {key}
        waits = []
        # The last one tells most about the others.
        for other in sorted(needed, key=place.__getitem__, reverse=True):
            on = settled.ops[other].engine
            number, clock = at[other]
            if on != engine and mine.get(on, 0) < number:
                waits.append(other)
                for name, value in clock.items():
                    mine[name] = max(mine.get(name, 0), value)
        found[key] = waits
        count[engine] = mine[engine] = count.get(engine, 0) + 1
        at[key] = mine[engine], dict(mine)
    return found


def _before_writing(
    key: Instance, settled: Settled, outputs: Mapping[str, int]
) -> tuple[Instance, ...]:
    """Who wrote and who reads what an operation is to overwrite."""
    old = settled.taken.get(key)
    if not settled.ops[key].takes:
        name, layer = key
        back = outputs[name]
        while layer >= back - 1 and (name, layer - back) not in settled.ops:
            back += outputs[name]
        old = (name, layer - back)
    return (old, *settled.readers[old]) if old in settled.ops and old is not None else ()


def _engines(
    settled: Settled, waits: Mapping[Instance, Sequence[Instance]]
) -> dict[str, tuple[GpuInstruction, ...]]:
    awaited = {other for some in waits.values() for other in some}
    return {
        engine: tuple(_fold(_turns(items, settled, waits, awaited)))
        for engine, items in settled.queues.items()
    }


def _turns(
    items: Sequence[tuple[int, Instance]],
    settled: Settled,
    waits: Mapping[Instance, Sequence[Instance]],
    awaited: set[Instance],
) -> list[tuple[int, tuple[GpuFlat, ...]]]:
    """An engine's instructions by turn, with layers relative to it."""
    found: dict[int, list[GpuFlat]] = {}
    for turn, key in items:
        mine: list[GpuFlat] = [Wait(*other) for other in waits[key]]
        if key in settled.taken:
            old = settled.taken[key]
            take = Take(*key, *old) if old else Take(*key, slot=settled.slots[key])
            mine.append(take)
        mine.append(Do(*key))
        if key in awaited:
            mine.append(Record(*key))
        found.setdefault(turn, []).extend(shifted(item, -turn) for item in mine)
    return [(turn, tuple(mine)) for turn, mine in sorted(found.items())]


def _fold(turns: Sequence[tuple[int, tuple[GpuFlat, ...]]]) -> list[GpuInstruction]:
    """Instructions by turn as one list, repetitions as loops over the layer."""
    items: list[GpuInstruction] = []
    at = 0
    while at < len(turns):
        period, repeats = _best_period(turns, at)
        start = turns[at][0]
        if repeats > 1:
            body = [
                shifted(i, turns[at + k][0] - start)
                for k in range(period)
                for i in turns[at + k][1]
            ]
            items.append(Layers(start, start + period * repeats, period, tuple(body)))
        else:
            items += [shifted(item, start) for item in turns[at][1]]
        at += period * repeats
    return items


def _best_period(turns: Sequence[tuple[int, tuple[GpuFlat, ...]]], at: int) -> tuple[int, int]:
    best = (1, 1)
    for period in range(1, MAX_PERIOD + 1):
        repeats = 1
        while _same(turns, at, at + repeats * period, period):
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def _same(turns: Sequence[tuple[int, tuple[GpuFlat, ...]]], a: int, b: int, count: int) -> bool:
    if b + count > len(turns) or turns[b][0] - turns[a][0] != b - a:
        return False
    return all(turns[a + i][1] == turns[b + i][1] for i in range(count))


def _notes(predictor: GpuPredictor, work: StepWork, settled: Settled) -> tuple[str, ...]:
    """Where the program is not what the plan's moves say."""
    layout = predictor.layout
    notes = [
        f"{instance_text(*key)} goes before what its engine's order has first: there layers of "
        "different kinds meet"
        for key in settled.moved
    ]
    for move in layout.pipelines:
        if move.work != work.kind:
            continue
        bundled = predictor.loop(work, move.layer)
        fine = loop_body(layout, predictor.costs, work, move.layer, fine=True)
        if len(bundled.problem.ops) != len(fine.problem.ops):
            notes.append(
                f"pipeline({move.work}, layer {move.layer}, {move.engine}) orders bundles of loads "
                "or groups; here each is by itself, in the policy's order"
            )
    return tuple(notes)
