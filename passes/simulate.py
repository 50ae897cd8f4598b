"""Simulate: `program, step -> timeline`, and `workload -> prediction`.

Every engine runs its list in order; a wait ends when what it waits for has happened. Engines slow
each other as the machine was calibrated. Steps of one shape are simulated once, in steady state.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dovetail.ir.batching import Batcher, Group, Member, Request, Step
from dovetail.ir.errors import VerifyError
from dovetail.ir.load_order import LoadOrder
from dovetail.ir.machine import Machine
from dovetail.ir.plan import Prediction
from dovetail.ir.program import Flat, Free, Load, Program, Signal, Wait, unroll
from dovetail.ir.timeline import Span, Timeline
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout
from dovetail.passes.cost import Costs
from dovetail.passes.durations import QUANTUM, Durations
from dovetail.passes.lower import lower
from dovetail.passes.memory import ram_bytes, resident_bytes
from dovetail.passes.step_graph import step_graph


@dataclass(slots=True)
class _State:
    """Times at which things happened, by name; those of loads also by their number."""

    order: LoadOrder
    ready: dict[tuple[str, int], float] = field(default_factory=dict)
    freed: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    phases: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))


class _Engine:
    """One engine's place in its list of instructions."""

    def __init__(self, name: str, number: int, items: list[tuple[int, Flat]]) -> None:
        self.name, self.number, self.items = name, number, items
        self.at, self.now = 0, 0.0
        self.loads: dict[str, int] = defaultdict(int)
        self.waits: dict[str, int] = defaultdict(int)
        self.frees: dict[str, int] = defaultdict(int)
        self.phases: dict[str, int] = defaultdict(int)
        self.signals: dict[str, int] = defaultdict(int)


Flattened = Mapping[str, Sequence[Flat]]
"""Every engine's instructions of one step, loops expanded."""


def flatten(program: Program) -> Flattened:
    """The program with its loops expanded."""
    return {name: tuple(unroll(items)) for name, items in program.engines.items()}


def simulate_steps(
    program: Program, flat: Flattened, durations: Durations, steps: Sequence[Step]
) -> Timeline:
    """The timeline of these steps one after the other, the disk engines running ahead."""
    engines = []
    for number, (name, instructions) in enumerate(flat.items()):
        items = [(index, item) for index in range(len(steps)) for item in instructions]
        engines.append(_Engine(name, number, items))
    state, spans = _State(LoadOrder(flat)), []
    workers = len(program.workers)
    moved = True
    while moved:
        moved = False
        for engine in engines:
            while engine.at < len(engine.items):
                step, item = engine.items[engine.at]
                until = _passes(engine, item, state, program, workers)
                if until is None:
                    break
                spans += _advance(engine, item, until, step, steps[step], durations, state)
                engine.at += 1
                moved = True
    stuck = [e for e in engines if e.at < len(e.items)]
    if stuck:
        where = "; ".join(f"{e.name} at {e.items[e.at][1]}" for e in stuck)
        raise VerifyError(f"engines wait for each other in a cycle: {where}")
    return Timeline("predicted", tuple(spans))


def _passes(
    engine: _Engine, item: Flat, state: _State, program: Program, workers: int
) -> float | None:
    """When a wait ends (now, for other instructions), or None while that is unknown."""
    if not isinstance(item, Wait):
        return engine.now
    if item.what == "ready":
        ready = state.ready.get((item.name, engine.waits[item.name]))
        return None if ready is None else max(engine.now, ready)
    if item.what == "room":
        ring = program.ring(item.name)
        n = state.order.number(engine.name, item.name, engine.loads[item.name]) - ring.slots
        if n < 0:
            return engine.now
        freed = state.freed[item.name, n]
        return max(engine.now, *freed) if len(freed) >= ring.consumers else None
    signals = state.phases[item.name, engine.phases[item.name]]
    return max(engine.now, *signals) if len(signals) == workers else None


def _advance(
    engine: _Engine,
    item: Flat,
    until: float,
    number: int,
    step: Step,
    durations: Durations,
    state: _State,
) -> list[Span]:
    start = engine.now
    if isinstance(item, Wait):
        engine.now = until
        if item.what == "ready":
            engine.waits[item.name] += 1
        elif item.what == "phase":
            engine.phases[item.name] += 1
        kind, name, layer = "room" if item.what == "room" else "wait", item.name, -1
    elif isinstance(item, Signal):
        if item.what == "ready":
            n = state.order.number(engine.name, item.name, engine.loads[item.name])
            state.ready[item.name, n] = start
            engine.loads[item.name] += 1
        else:
            state.phases[item.name, engine.signals[item.name]].append(start)
            engine.signals[item.name] += 1
        return []
    elif isinstance(item, Free):
        state.freed[item.ring, engine.frees[item.ring]].append(start)
        engine.frees[item.ring] += 1
        return []
    else:
        engine.now = start + durations.of(item, engine.number, step)
        if isinstance(item, Load):
            kind, name, layer = "load", item.ring, item.layer
        else:
            kind, name, layer = "run", item.segment, item.layer
    if engine.now == start:
        return []
    return [Span(engine.name, kind, name, layer, start, engine.now, number)]


class Simulator:
    """Predicts a layout on a machine."""

    def __init__(self, layout: Layout, machine: Machine, costs: Costs) -> None:
        self.layout, self.machine, self._costs = layout, machine, costs
        self.program = lower(layout, {})
        self._graph = step_graph(self.program)
        self._readers = [n for n in self.program.engines if n not in self.program.workers]
        self._known: dict[tuple[object, ...], tuple[float, dict[str, float]]] = {}

    def steady(self, step: Step) -> Timeline:
        """The timeline of one step among equal ones, from its first to its last instruction."""
        durations, _ = self._contended(step)
        flat = flatten(self.program)
        timeline = simulate_steps(self.program, flat, durations, [step, step, step])
        return timeline.step(1)

    def step_seconds(self, step: Step) -> tuple[float, dict[str, float]]:
        """Seconds of a step in steady state and the busy seconds by task class."""
        key = _signature(step)
        if key not in self._known:
            _, lasting = self._contended(step)
            times = self._graph.times(lasting)
            first, second = (max(times[node] for node in nodes) for nodes in self._graph.ends)
            seconds = (second - first) * self.machine.corrected("step")
            self._known[key] = (seconds, self._graph.classes(lasting, times))
        return self._known[key]

    def use(self, step: Step) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Of a step in steady state, seconds that every engine works, and that it waits by what
        for, as in ``ready:experts``."""
        _, lasting = self._contended(step)
        lists = self._graph.lists.items()
        busy = {name: sum(lasting[slot] for slot in slots) for name, slots in lists}
        return busy, self._graph.waits(self._graph.times(lasting))

    def _contended(self, step: Step) -> tuple[Durations, list[float]]:
        """Durations while engines slow each other, and those of the graph's slots."""
        durations = Durations(self.layout, self.program, self.machine, self._costs)
        graph = self._graph
        alone = [durations.of(item, number, step) for item, number in graph.items]
        if not self._readers:
            return durations, alone
        busy = {name: sum([alone[slot] for slot in slots]) for name, slots in graph.lists.items()}
        disk = max(busy[name] for name in self._readers)
        cpu = max(busy[name] for name in self.program.workers)
        total = max(cpu, disk)
        durations.contend(cpu / total, disk / total)
        return durations, [durations.of(item, number, step) for item, number in graph.items]

    def _setup_rate(self) -> float:
        """Bytes/s at which all workers together read into memory that is new to the process."""
        disk, fresh = self.machine.disk.peak, self.machine.fresh_bandwidth
        if not fresh:
            return disk
        return min(disk, self.layout.workers / (1 / disk + 1 / fresh))

    def predict(self, workload: Workload) -> Prediction:
        """Time and bytes of the whole workload, every sequence at its full length."""
        return self.predict_steps(workload_steps(self.layout, workload))

    def predict_steps(self, steps: Iterable[Step]) -> Prediction:
        """Time and bytes of these steps, set-up included."""
        found = self.predict_within(steps, math.inf)
        assert found is not None
        return found

    def predict_within(self, steps: Iterable[Step], limit: float) -> Prediction | None:
        """``predict_steps``, or None as soon as these steps take longer than ``limit`` seconds."""
        layout = self.layout
        setup = resident_bytes(layout)
        setup_seconds = setup / self._setup_rate()
        seconds, count, tokens = setup_seconds, 0, 0
        classes: dict[str, float] = defaultdict(float)
        for step in steps:
            one, parts = self.step_seconds(step)
            seconds += one
            if seconds > limit:
                return None
            count += 1
            tokens += step.seqs
            for name, value in parts.items():
                classes[name] += value
        per_step = Durations(layout, self.program, self.machine, self._costs).disk_bytes
        return Prediction(
            seconds=seconds,
            setup_seconds=setup_seconds,
            steps=count,
            tokens=tokens,
            disk_bytes=per_step * count + setup,
            bytes=ram_bytes(layout) | {"process": self.machine.process_bytes},
            classes=dict(classes),
        )


def workload_steps(layout: Layout, workload: Workload) -> Iterator[Step]:
    """The steps that the batcher forms when no sequence stops early."""
    lengths = workload.each()
    requests = [Request(i, length, workload.new_tokens) for i, length in enumerate(lengths)]
    batcher = Batcher(requests, layout.admission)
    while (step := batcher.next_step()) is not None:
        yield step
        batcher.advance(step)


def _signature(step: Step) -> tuple[object, ...]:
    return tuple(
        sorted(
            (
                g.prefill,
                len(g.members),
                len(g.unfinished),
                -(-g.q_len // 8) if g.prefill else 1,
                -(-g.past // QUANTUM),
                g.layers or (),
            )
            for g in step.groups
        )
    )


def decode_step(seqs: int, rows: int, held: int) -> Step:
    """A step of ``seqs`` sequences in decode, each with ``held`` tokens, in groups of ``rows``."""
    groups = []
    for start in range(0, seqs, rows):
        members = tuple(
            Member(i, i * (held + 1), held) for i in range(start, min(seqs, start + rows))
        )
        groups.append(Group(False, members, (1,) * len(members), 1, held + 1))
    return Step(tuple(groups))
