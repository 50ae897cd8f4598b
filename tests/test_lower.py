"""Lowering: folded lists unroll to what they were folded from, and a program is what it says."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.ir_cases import captured, flat, layout_of, program_of, schedule

from dovetail.ir.printer import print_program
from dovetail.ir.program import Flat, Free, Instruction, Load, Loop, Run, Signal, Wait, unroll
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.verify import verify_graph, verify_program
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.lower import MAX_PERIOD, fold, lower

INNER = (Wait("ready", "experts"), Run("moe", 0, "experts", 0), Free("experts", 0, 0))
KINDS: tuple[tuple[Instruction, ...], ...] = (
    (Run("dense", 0, "ram", -1),),
    (Wait("ready", "dense"), Run("moe_before", 0, "dense", -1), Loop("chunk", 0, 3, 1, INNER)),
    (Load("experts", 0, 1), Signal("ready", "experts")),
    (),
)
PATTERNS = st.lists(st.sampled_from(range(len(KINDS))), max_size=12)
PERIODS = st.lists(st.sampled_from(range(len(KINDS))), min_size=1, max_size=MAX_PERIOD)


def _unfolded(kinds: Sequence[int]) -> list[Flat]:
    """The instructions of all layers, one layer after the other."""
    return [item for layer, kind in enumerate(kinds) for item in unroll(KINDS[kind], layer)]


@given(PATTERNS, PERIODS, st.integers(0, 5), PATTERNS)
def test_fold_unrolls_to_the_same_lists(
    first: list[int], period: list[int], times: int, last: list[int]
) -> None:
    kinds = [*first, *period * times, *last]
    assert list(unroll(tuple(fold([KINDS[kind] for kind in kinds])))) == _unfolded(kinds)


@pytest.mark.parametrize(
    ("kinds", "loops"),
    [
        ((0, 0, 0, 0), [(0, 4, 1)]),
        ((0, 1, 1, 1), [(1, 4, 1)]),
        ((0, 1, 0, 1, 0, 1), [(0, 6, 2)]),
        ((0, 0, 1, 0, 0, 1, 0, 0, 1), [(0, 9, 3)]),
        ((0, 1, 2, 0), []),
        ((1, 0, 1, 0, 2, 2, 2), [(0, 4, 2), (4, 7, 1)]),
    ],
)
def test_fold_finds_the_pattern_of_layers(
    kinds: tuple[int, ...], loops: list[tuple[int, int, int]]
) -> None:
    items = fold([KINDS[kind] for kind in kinds])
    found = [i for i in items if isinstance(i, Loop) and i.variable == "layer"]
    assert [(loop.start, loop.stop, loop.step) for loop in found] == loops


def _layers(graph: TaskGraph, layers: Sequence[int]) -> TaskGraph:
    return replace(graph, layers=tuple(layers))


@given(
    st.lists(st.sampled_from([0, 1]), min_size=1, max_size=9),
    st.sampled_from([0, 4, 8]),
    st.booleans(),
)
def test_programs_of_alternating_layers_do_every_layer_in_order(
    layers: list[int], experts: int, head: bool
) -> None:
    graph = _layers(captured("deepseek_v2"), layers)
    verify_graph(graph)
    program = program_of(graph, experts=experts, head=head)
    verify_program(program, graph)
    before = {0: "layer_0", 1: "layer_1_before"}
    runs = [i for i in flat(program, "cpu0") if isinstance(i, Run) and i.unit == "dense"]
    assert [(r.segment, r.layer) for r in runs if r.segment in before.values()] == [
        (before[kind], layer) for layer, kind in enumerate(layers)
    ]
    loads = [i for i in flat(program, "disk0") if isinstance(i, Load)]
    assert [i.layer for i in loads if i.ring == "dense"] == list(range(len(layers)))
    expected = [
        (layer, chunk)
        for layer, kind in enumerate(layers)
        for chunk in range((8 - experts) // 2 * kind)
    ]
    assert [(i.layer, i.chunk) for i in loads if i.ring == "experts"] == expected


def test_everything_in_ram_needs_no_disk_engine() -> None:
    graph = captured("olmoe")
    program = program_of(graph, embed=True, dense=(0, 1, 2, 3), experts=8, head=True)
    assert set(program.engines) == {"cpu0", "cpu1"}
    assert program.rings == ()
    assert ("experts", 3, 8) in program.resident


def test_resident_experts_run_before_or_after_the_streamed_ones() -> None:
    graph = captured("olmoe")
    moves = schedule(graph, experts=4)
    kept = [move for move in moves if type(move).__name__ != "Reorder"]
    orders = []
    for chosen in (moves, kept):
        items = unroll(lower(apply_moves(graph, chosen), {}).engines["cpu0"])
        runs = [i for i in items if isinstance(i, Run) and i.segment == "layer_0_experts_0"]
        orders.append([run.chunk for run in runs if run.layer == 0])
    assert orders == [[-1, 0, 1], [0, 1, -1]]


def test_each_worker_frees_what_is_streamed() -> None:
    program = program_of(captured("olmoe"), workers=3, slots=4)
    assert {ring.name: (ring.slots, ring.consumers) for ring in program.rings} == {
        "dense": (2, 3),
        "experts": (4, 3),
        "head": (1, 3),
    }


def test_program_text(golden: Callable[[str], None]) -> None:
    layout = layout_of(captured("deepseek_v2"), experts=4, embed=True)
    program = lower(layout, {"ram": 8 << 20})
    # Bytes that are estimated change more often than programs do.
    golden(print_program(replace(program, reserved={"resident": 1 << 20, "kv": 98304})) + "\n")
