"""What the tests of the IR share: captured graphs without capturing, and schedules of them."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dovetail.ir import codec
from dovetail.ir.moves import Dispatch, Move, Overlap, Place, Reorder, Split
from dovetail.ir.program import Flat, Instruction, Program, unroll
from dovetail.ir.task_graph import Body, Op, Task, TaskGraph
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.lower import lower
from dovetail.passes.policies.common import base_moves, prefetch_moves

GRAPHS = Path(__file__).parent / "golden" / "test_verify"
"""Task graphs as JSON; ``test_captured_graphs_are_legal`` keeps them what capture gives."""


@functools.cache
def captured(family: str) -> TaskGraph:
    """A small model's task graph: ``olmoe`` has four equal layers, ``deepseek_v2`` one dense layer
    (body ``layer_0``) and three with experts (``layer_1``)."""
    text = (GRAPHS / f"test_captured_graphs_are_legal_{family}.txt").read_text(encoding="utf-8")
    return codec.decode(json.loads(text), TaskGraph)


def schedule(
    graph: TaskGraph,
    *,
    embed: bool = False,
    dense: tuple[int, ...] = (),
    head: bool = False,
    experts: int = 0,
    chunk: int = 2,
    slots: int = 2,
    workers: int = 2,
    readers: int = 1,
) -> list[Move]:
    """A schedule with the given layers' dense weights, ``experts`` experts of every layer, and
    embed and head in ram."""
    moves: list[Move] = [
        Dispatch(seqs=8, kv_tokens=256, prefill_tokens=64, longest=32, refill=True),
        *base_moves(graph, 1 << 30),
        Split("attention", "seqs", 4),
        Split("experts", "experts", chunk),
        *prefetch_moves(slots, 2),
        Reorder("experts", "resident_first"),
        Overlap(workers, threads=1, readers=readers),
    ]
    if embed:
        moves.append(Place("embed", "ram"))
    if dense:
        moves.append(Place("dense", "ram", dense))
    if head:
        moves.append(Place("head", "ram"))
    routed = tuple(i for i in range(len(graph.layers)) if graph.body(i).experts)
    if experts:
        moves.append(Place("experts", "ram", routed, experts))
    return moves


def layout_of(graph: TaskGraph, **placed: object) -> Layout:
    """The layout of ``schedule``."""
    return apply_moves(graph, schedule(graph, **placed))  # type: ignore[arg-type]


def program_of(graph: TaskGraph, **placed: object) -> Program:
    """The program of ``schedule``, without a capacity."""
    return lower(layout_of(graph, **placed), {})


def flat(program: Program, engine: str) -> list[Flat]:
    """An engine's instructions without loops."""
    return list(unroll(program.engines[engine]))


def edited(program: Program, engine: str, edit: Callable[[list[Instruction]], None]) -> Program:
    """The program with ``edit`` applied to the flat lists of all engines whose names begin so."""
    engines = dict(program.engines)
    for name in engines:
        if name.startswith(engine):
            items: list[Instruction] = [*flat(program, name)]
            edit(items)
            engines[name] = tuple(items)
    return replace(program, engines=engines)


def body_changed(graph: TaskGraph, at: str, /, **changes: object) -> TaskGraph:
    """The graph with fields of one body changed."""

    def change(body: Body) -> Body:
        return replace(body, **changes) if body.name == at else body  # type: ignore[arg-type]

    return replace(
        graph,
        prologue=change(graph.prologue),
        bodies=tuple(change(body) for body in graph.bodies),
        epilogue=change(graph.epilogue),
    )


def find_body(graph: TaskGraph, name: str) -> Body:
    """The body called ``name``."""
    return next(b for b in (graph.prologue, *graph.bodies, graph.epilogue) if b.name == name)


def find_task(graph: TaskGraph, name: str) -> Task:
    """The task called ``body.task``."""
    body, _, task = name.partition(".")
    return next(t for t in find_body(graph, body).tasks if t.name == task)


def task_changed(graph: TaskGraph, at: str, /, **changes: object) -> TaskGraph:
    """The graph with fields of the task ``body.task`` changed."""
    old, body = find_task(graph, at), find_body(graph, at.partition(".")[0])
    new = replace(old, **changes)  # type: ignore[arg-type]
    tasks = tuple(new if task is old else task for task in body.tasks)
    return body_changed(graph, body.name, tasks=tasks)


def op_changed(graph: TaskGraph, at: str, index: int, /, **changes: object) -> TaskGraph:
    """The graph with fields of one operator of the task ``body.task`` changed."""
    ops: list[Op] = list(find_task(graph, at).ops)
    ops[index] = replace(ops[index], **changes)  # type: ignore[arg-type]
    return task_changed(graph, at, ops=tuple(ops))
