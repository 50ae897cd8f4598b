"""Lower: `layout -> program`, one instruction list per engine.

Layers with equal instructions become loops, also when kinds of layers alternate.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from dovetail.ir.errors import VerifyError
from dovetail.ir.placement import experts_of
from dovetail.ir.program import (
    Free,
    Instruction,
    Load,
    Loop,
    Program,
    Ring,
    Run,
    Segment,
    Signal,
    Wait,
)
from dovetail.ir.task_graph import Body, TaskGraph
from dovetail.passes.apply_moves import Layout
from dovetail.passes.memory import ram_bytes, ring_bytes

MAX_PERIOD = 4
"""Longest pattern of layer kinds that is recognised as a loop."""


def lower(layout: Layout, capacity: Mapping[str, int]) -> Program:
    """The program of a layout; ``capacity`` is the budget of each tier in bytes."""
    if layout.device is not None:
        raise VerifyError(
            "a schedule for a GPU has a program for each kind of step (lower_gpu), none for this "
            "machine's processor: plan again without a GPU, or see it with `dovetail plan report`"
        )
    compute = _compute(layout)
    engines: dict[str, tuple[Instruction, ...]] = {
        f"cpu{worker}": tuple(compute) for worker in range(layout.workers)
    }
    lists = [disk for reader in range(layout.readers) if (disk := _disk(layout, reader))]
    engines |= {f"disk{reader}": tuple(disk) for reader, disk in enumerate(lists)}
    rings = tuple(
        Ring(name, layout.prefetch[name].slots, size, layout.workers)
        for name, size in ring_bytes(layout).items()
    )
    return Program(
        engines=engines,
        rings=rings,
        segments=segments(layout),
        resident=_resident(layout),
        capacity=dict(capacity),
        reserved={name: size for name, size in ram_bytes(layout).items() if name != "rings"},
        settings=layout.settings,
    )


def segments(layout: Layout) -> tuple[Segment, ...]:
    """Every fused run of tasks, body by body."""
    found: list[Segment] = []
    graph = layout.graph
    for body in (graph.prologue, *graph.bodies, graph.epilogue):
        over: Literal["groups", "experts", "seqs"] = "seqs" if body is graph.epilogue else "groups"
        for index, names in enumerate(layout.fused[body.name]):
            tasks = [task for task in body.tasks if task.name in names]
            experts = any(task.experts for task in tasks)
            written = {name for task in tasks for name in task.writes}
            reads = dict.fromkeys(n for t in tasks for n in t.reads if n not in written)
            writes = [n for n in written if n in graph.shared or _needed(n, names, body)]
            found.append(
                Segment(
                    name=_segment_name(layout, body, index),
                    body=body.name,
                    tasks=names,
                    reads=tuple(reads),
                    writes=tuple(sorted(writes)),
                    over="experts" if experts else over,
                )
            )
    return tuple(found)


def _needed(name: str, tasks: tuple[str, ...], body: Body) -> bool:
    if name in body.outputs:
        return True
    return any(name in task.reads for task in body.tasks if task.name not in tasks)


def _segment_name(layout: Layout, body: Body, index: int) -> str:
    groups = layout.fused[body.name]
    if len(groups) == 1:
        return body.name
    names = groups[index]
    if len(names) == 1:
        return f"{body.name}_{names[0]}"
    experts_at = next(
        (i for i, g in enumerate(groups) if body.experts and body.experts.name in g), -1
    )
    side = "before" if index < experts_at else "after"
    same = [
        i for i, g in enumerate(groups) if len(g) > 1 and (i < experts_at) == (side == "before")
    ]
    return f"{body.name}_{side}" if same == [index] else f"{body.name}_part{index}"


def _compute(layout: Layout) -> list[Instruction]:
    graph = layout.graph
    items: list[Instruction] = []
    for index in range(len(layout.fused[graph.prologue.name])):
        unit = "ram" if layout.embed_resident else "disk rows"
        items.append(Run(_segment_name(layout, graph.prologue, index), -1, unit, -1))
    items += fold([_compute_layer(layout, layer) for layer in range(len(graph.layers))])
    items += [Signal("phase", "hidden"), Wait("phase", "hidden")]
    unit = "ram" if layout.head_resident else "head"
    if not layout.head_resident:
        items.append(Wait("ready", "head"))
    for index in range(len(layout.fused[graph.epilogue.name])):
        items.append(Run(_segment_name(layout, graph.epilogue, index), -1, unit, -1))
    if not layout.head_resident:
        items.append(Free("head", 0))
    items.append(Signal("phase", "step"))
    return items


def _compute_layer(layout: Layout, layer: int) -> list[Instruction]:
    """Instructions of one layer, with layer numbers relative to it."""
    body = layout.graph.body(layer)
    items: list[Instruction] = []
    streamed = not layout.dense_resident[layer]
    unit = "dense" if streamed else "ram"
    if streamed:
        items.append(Wait("ready", "dense"))
    for index, names in enumerate(layout.fused[body.name]):
        name = _segment_name(layout, body, index)
        if body.experts and body.experts.name in names:
            items += _experts(layout, layer, name)
        else:
            items.append(Run(name, 0, unit, -1))
    if streamed:
        items.append(Free("dense", 0))
    return items


def _experts(layout: Layout, layer: int, segment: str) -> list[Instruction]:
    items: list[Instruction] = [Signal("phase", "tokens"), Wait("phase", "tokens")]
    resident: list[Instruction] = []
    if layout.experts_resident[layer]:
        resident.append(Run(segment, 0, "ram", -1))
    chunk = (Wait("ready", "experts"), Run(segment, 0, "experts", 0), Free("experts", 0, 0))
    count = layout.chunks(layer)
    streamed: list[Instruction] = [Loop("chunk", 0, count, 1, chunk)] if count else []
    items += resident + streamed if layout.resident_first else streamed + resident
    return [*items, Signal("phase", "experts"), Wait("phase", "experts")]


def _disk(layout: Layout, reader: int) -> list[Instruction]:
    """What one of the readers does in a step: its turns among the loads of every ring."""
    dense = experts = 0
    per_layer = []
    for layer in range(len(layout.graph.layers)):
        streamed, chunks = not layout.dense_resident[layer], layout.chunks(layer)
        turns = range((reader - experts) % layout.readers, chunks, layout.readers)
        mine = streamed and dense % layout.readers == reader
        per_layer.append(_disk_layer(mine, turns))
        dense += streamed
        experts += chunks
    head = [] if layout.head_resident or reader else _load("head", 0, 0)
    return [*fold(per_layer), *head]


def _disk_layer(dense: bool, chunks: range) -> list[Instruction]:
    items: list[Instruction] = []
    if dense:
        items += _load("dense", 0, 0)
    if chunks:
        load = tuple(_load("experts", 0, 0))
        items.append(Loop("chunk", chunks.start, chunks.stop, chunks.step, load))
    return items


def _load(ring: str, layer: int, chunk: int) -> list[Instruction]:
    return [Wait("room", ring), Load(ring, layer, chunk), Signal("ready", ring)]


def _resident(layout: Layout) -> tuple[tuple[str, int, int], ...]:
    units: list[tuple[str, int, int]] = []
    if layout.embed_resident:
        units.append(("embed", -1, 0))
    for layer in range(len(layout.graph.layers)):
        if layout.dense_resident[layer]:
            units.append(("dense", layer, 0))
        if experts_of(layout.graph, layer) and layout.experts_resident[layer]:
            units.append(("experts", layer, layout.experts_resident[layer]))
    if layout.head_resident:
        units.append(("head", -1, 0))
    return tuple(units)


def fold(lists: Sequence[Sequence[Instruction]]) -> list[Instruction]:
    """Per-layer instruction lists as one list, with repetitions as loops over ``layer``."""
    items: list[Instruction] = []
    at = 0
    while at < len(lists):
        period, repeats = _best_period(lists, at)
        body = [_shift(i, k) for k in range(period) for i in lists[at + k]]
        if not body:
            pass
        elif repeats > 1:
            items.append(Loop("layer", at, at + period * repeats, period, tuple(body)))
        else:
            items += [_shift(item, at) for item in lists[at]]
        at += period * repeats
    return items


def _best_period(lists: Sequence[Sequence[Instruction]], at: int) -> tuple[int, int]:
    best = (1, 1)
    for period in range(1, MAX_PERIOD + 1):
        repeats = 1
        while _same(lists, at, at + repeats * period, period):
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def _same(lists: Sequence[Sequence[Instruction]], a: int, b: int, count: int) -> bool:
    if b + count > len(lists):
        return False
    return all(list(lists[a + i]) == list(lists[b + i]) for i in range(count))


def _shift(item: Instruction, by: int) -> Instruction:
    match item:
        case Load(ring, layer, chunk):
            return Load(ring, layer + by, chunk)
        case Free(ring, layer, chunk):
            return Free(ring, layer + by, chunk)
        case Run(segment, layer, unit, chunk):
            return Run(segment, layer + by, unit, chunk)
        case Loop("chunk", start, stop, step, body):
            return Loop("chunk", start, stop, step, tuple(_shift(i, by) for i in body))
    return item


def segment_body(graph: TaskGraph, segment: Segment) -> Body:
    """The body that a segment is part of."""
    bodies = (graph.prologue, *graph.bodies, graph.epilogue)
    return next(body for body in bodies if body.name == segment.body)
