"""What the verifier accepts runs without a race, in whatever order the engines go on.

The runs here know nothing of clocks: rings as the runtime has them, engines in random order.
"""

import random
from collections.abc import Callable, Sequence

import hypothesis
import pytest
from hypothesis import strategies as st
from tests.ir_cases import captured, edited, flat, program_of

from dovetail.ir.errors import VerifyError
from dovetail.ir.program import Flat, Free, Instruction, Load, Program, Run, Signal, Wait
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.verify import verify_program

BEFORE, EXPERTS, AFTER = "layer_1_before", "layer_1_experts_0", "layer_1_other_0"
CHUNK = 4
"""Experts of a chunk: two chunks a layer."""


class Race(Exception):
    """Something read what was not there, or no engine could go on."""


class Racing:
    """A run of a program of the graph ``deepseek_v2``, engines in an order that ``seed`` draws; it
    looks at what is in the buffers, and at which runs have ended."""

    def __init__(self, program: Program, steps: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._rings = {ring.name: ring for ring in program.rings}
        self._slots: dict[tuple[str, int], object] = {}
        self._loads: dict[tuple[str, str], int] = {}
        self._ready: set[tuple[str, int]] = set()
        self._parts = {name: _parts(flat(program, name), Load) for name in program.engines}
        self._order = _parts(flat(program, "cpu0"), Free)
        self._frees: dict[tuple[str, int], int] = {}
        self._phases: dict[tuple[str, int], int] = {}
        # How often an engine has freed (a ring), waited for or signalled (a phase).
        self._count: dict[tuple[str, str, str], int] = {}
        self._ended: dict[tuple[str, str, int, int, int], int] = {}
        self._workers = program.workers
        self._lists = {name: self._list(program, name, steps) for name in program.engines}
        self._begun = dict.fromkeys(self._lists, False)

    def _list(self, program: Program, name: str, steps: int) -> list[tuple[int, Flat]]:
        first: list[Flat] = [Wait("phase", "step")] if name in self._workers else []
        items = flat(program, name)
        later = [(step, item) for step in range(1, steps) for item in [*first, *items]]
        return [(0, item) for item in items] + later

    def run(self) -> None:
        """Run to the end; raises Race."""
        while any(self._lists.values()):
            ready = [name for name in self._lists if self._lists[name] and self._can_go_on(name)]
            if not any(name in self._workers for name in self._lists if self._lists[name]):
                return
            if not ready:
                raise Race("no engine can go on")
            self._go_on(self._random.choice(ready))

    def _number(self, name: str, what: str, ring: str) -> int:
        return self._count.get((name, what, ring), 0)

    def _next_load(self, name: str, ring: str) -> int:
        """The number of the engine's next load: where several load a ring, by the workers' list."""
        count, parts = self._loads.get((name, ring), 0), self._parts[name].get(ring, [])
        if sum(ring in parts for parts in self._parts.values()) < 2:
            return count
        step, at = divmod(count, len(parts))
        return step * len(self._order[ring]) + self._order[ring].index(parts[at])

    def _can_go_on(self, name: str) -> bool:
        match self._lists[name][0][1]:
            case Wait("ready", ring):
                return (ring, self._number(name, "free", ring)) in self._ready
            case Wait("room", ring):
                before = self._next_load(name, ring) - self._rings[ring].slots
                return (
                    before < 0 or self._frees.get((ring, before), 0) >= self._rings[ring].consumers
                )
            case Wait(_, phase):
                number = self._number(name, "wait", phase)
                return self._phases.get((phase, number), 0) == len(self._workers)
        return True

    def _go_on(self, name: str) -> None:
        step, item = self._lists[name][0]
        if isinstance(item, Load | Run) and not self._begun[name]:
            # They take their time: others go on between their beginning and their end.
            self._begun[name] = True
            self._look(name, step, item)
            return
        self._begun[name] = False
        del self._lists[name][0]
        match item:
            case Load(ring, layer, chunk):
                slot = self._next_load(name, ring) % self._rings[ring].slots
                self._slots[ring, slot] = (layer, chunk)
            case Run(segment, layer, _, chunk):
                self._look(name, step, item)
                key = (name, segment, layer, max(chunk, 0), step)
                self._ended[key] = self._ended.get(key, 0) + 1
            case Signal("ready", ring):
                self._ready.add((ring, self._next_load(name, ring)))
                self._loads[name, ring] = self._loads.get((name, ring), 0) + 1
            case Signal(_, phase):
                number = self._number(name, "signal", phase)
                self._phases[phase, number] = self._phases.get((phase, number), 0) + 1
                self._count[name, "signal", phase] = number + 1
            case Wait("phase", phase):
                self._count[name, "wait", phase] = self._number(name, "wait", phase) + 1
            case Free(ring):
                number = self._number(name, "free", ring)
                self._frees[ring, number] = self._frees.get((ring, number), 0) + 1
                self._count[name, "free", ring] = number + 1

    def _look(self, name: str, step: int, item: Load | Run) -> None:
        if isinstance(item, Load):
            slot = self._next_load(name, item.ring) % self._rings[item.ring].slots
            self._slots[item.ring, slot] = None
            return
        if item.unit in self._rings:
            number = self._number(name, "free", item.unit) % self._rings[item.unit].slots
            found = self._slots.get((item.unit, number))
            if found != (max(item.layer, 0), max(item.chunk, 0)):
                raise Race(f"{name}: {item} found {found}")
        for worker, segment, layer, chunk in _needs(name, self._workers, item):
            if self._ended.get((worker, segment, layer, chunk, step), 0) != 1:
                raise Race(f"{name}: {item} before {segment}[{layer}] of {worker}")


def _parts(items: Sequence[Flat], kind: type[Load] | type[Free]) -> dict[str, list[object]]:
    """Layer and chunk of the loads, or frees, of every ring, in order."""
    found: dict[str, list[object]] = {}
    for item in items:
        if isinstance(item, kind):
            found.setdefault(item.ring, []).append((item.layer, item.chunk))
    return found


def _needs(name: str, workers: Sequence[str], run: Run) -> list[tuple[str, str, int, int]]:
    """Runs of the same step that must have ended before ``run``: worker, segment, layer, chunk."""
    layer = run.layer
    if run.segment == EXPERTS:
        return [(worker, BEFORE, layer, 0) for worker in workers]
    if run.segment == AFTER:
        return [(worker, EXPERTS, layer, chunk) for worker in workers for chunk in (0, 1)]
    if run.segment == "epilogue":
        return [(worker, AFTER, 3, 0) for worker in workers]
    last = {"prologue": [], "layer_0": [(name, "prologue", -1, 0)]}
    own = (name, "layer_0", 0, 0) if layer == 1 else (name, AFTER, layer - 1, 0)
    return last.get(run.segment, [own])


EDITS = st.tuples(
    st.sampled_from(["drop", "swap", "move", "double"]),
    st.sampled_from(["cpu0", "cpu1", "disk0", "disk1", "cpu"]),
    st.integers(0, 60),
    st.integers(0, 60),
)


def _apply(kind: str, first: int, second: int) -> Callable[[list[Instruction]], None]:
    def edit(items: list[Instruction]) -> None:
        a, b = first % len(items), second % len(items)
        if kind == "drop":
            del items[a]
        elif kind == "swap":
            items[a], items[a - 1] = items[a - 1], items[a]
        elif kind == "move":
            items.insert(b, items.pop(a))
        else:
            items.insert(a, items[a])

    return edit


def _legal(program: Program, graph: TaskGraph) -> bool:
    try:
        verify_program(program, graph)
    except VerifyError:
        return False
    return True


def _races(program: Program) -> bool:
    for seed in range(4):
        try:
            Racing(program, 2, seed).run()
        except Race:
            return True
    return False


@hypothesis.given(
    st.lists(EDITS, max_size=2), st.sampled_from([1, 2]), st.sampled_from([1, 1, 2, 3])
)
@hypothesis.settings(max_examples=400)
def test_what_is_accepted_runs_without_a_race(
    edits: list[tuple[str, str, int, int]], slots: int, readers: int
) -> None:
    graph = captured("deepseek_v2")
    program = program_of(graph, chunk=CHUNK, slots=slots, readers=readers)
    for kind, engine, first, second in edits:
        program = edited(program, engine, _apply(kind, first, second))
    if _legal(program, graph):
        assert not _races(program)
    else:
        hypothesis.event("refused")


FREE, READ = Free("dense", 0), Run("layer_0", 0, "dense", -1)


@pytest.mark.parametrize(
    ("engine", "old", "new"),
    [
        ("cpu1", [READ, FREE], [FREE, READ]),
        ("cpu0", [Wait("ready", "dense"), READ], [READ, Wait("ready", "dense")]),
        ("cpu0", [Wait("phase", "tokens"), Wait("ready", "experts")], [Wait("ready", "experts")]),
        ("disk", [Wait("room", "dense"), Load("dense", 2)], [Load("dense", 2)]),
        ("disk", [Load("dense", 1), Signal("ready", "dense")], [Signal("ready", "dense")]),
        ("cpu", [Signal("phase", "hidden"), Wait("phase", "hidden")], [Wait("phase", "hidden")]),
    ],
)
def test_random_runs_find_races(
    engine: str, old: list[Instruction], new: list[Instruction]
) -> None:
    graph = captured("deepseek_v2")

    def edit(items: list[Instruction]) -> None:
        at = next(i for i in range(len(items)) if items[i : i + len(old)] == old)
        items[at : at + len(old)] = new

    program = program_of(graph, chunk=CHUNK)
    assert not _races(program)
    assert _races(edited(program, engine, edit))
