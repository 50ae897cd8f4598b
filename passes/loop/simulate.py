"""Loop simulation: `loop, iterations -> spans`, engines in order, and the period they settle into.

Every engine takes its operations in the loop's order; an operation starts when its engine is free,
what it comes after has ended, and its pools have room. Pools give room in the order of acquisition.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from dovetail.ir.errors import VerifyError
from dovetail.ir.timeline import Span, Timeline
from dovetail.passes.loop.body import TICK, Loop
from dovetail.passes.loop.work import Order
from dovetail.solvers.loop_problem import Hold, LoopProblem, ModuloSchedule, Op

WARM, MEASURED = 4, 4
"""Iterations before the period is measured, and over how many."""
UNKNOWN = -1
"""A time that is not known yet."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between layers in steady state, and what the first and last add (fill and drain)."""

    period: float
    ramp: float


def pace(loop: Loop) -> Pace:
    """How fast layers follow each other."""
    problem = loop.problem
    pools, order = tuple(problem.pools.items()), tuple(loop.order.items())
    return _pace(problem.ops, problem.holds, pools, order)


@lru_cache(maxsize=2048)
def _pace(
    ops: tuple[Op, ...],
    holds: tuple[Hold, ...],
    pools: tuple[tuple[str, int], ...],
    order: tuple[tuple[str, tuple[tuple[str, int], ...]], ...],
) -> Pace:
    """``pace`` of equal loops, of which a search over knobs meets many, is worked out once."""
    ahead = max(shift for _, items in order for _, shift in items)
    # The last iterations have nothing to run ahead for, so they are not measured.
    last = WARM + MEASURED
    run = _Run(LoopProblem(ops, holds, dict(pools)), dict(order), last + ahead)
    run.finish()
    ends = run.ends()
    busy: dict[str, int] = {}
    for op in ops:
        busy[op.engine] = busy.get(op.engine, 0) + op.duration
    period = max((ends[last - 1] - ends[WARM - 1]) / MEASURED, max(busy.values()))
    return Pace(period * TICK, max(0.0, ends[-1] - period * (last + ahead)) * TICK)


def steady_schedule(loop: Loop) -> ModuloSchedule:
    """The loop's order as a periodic schedule, in ticks: the starts of an iteration in steady
    state, at the mean period, which need not be legal for each operation by itself."""
    ahead = max(shift for items in loop.order.values() for _, shift in items)
    run = _Run(loop.problem, loop.order, WARM + MEASURED + ahead)
    run.finish()
    starts = {op.name: run.start_of(op.name, WARM) for op in loop.problem.ops}
    return ModuloSchedule(max(1, round(pace(loop).period / TICK)), starts)


def timeline(loop: Loop, iterations: int) -> Timeline:
    """The predicted timeline of ``iterations`` layers; a span's step is its layer."""
    run = _Run(loop.problem, loop.order, iterations)
    run.finish()
    return Timeline("predicted", tuple(run.spans(loop.classes)))


def held(loop: Loop, iterations: int, iteration: int) -> dict[str, list[tuple[float, float]]]:
    """For every pool, from when to when each unit that ``iteration`` takes is held, in seconds of a
    run of ``iterations`` layers."""
    run = _Run(loop.problem, loop.order, iterations)
    run.finish()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in loop.problem.pools}
    for hold in loop.problem.holds:
        found[hold.pool] += [run.interval(hold, iteration)] * hold.units
    return {pool: sorted(spans) for pool, spans in found.items() if spans}


class _Held:
    """Units of a pool that iteration ``iteration`` took, until ``end`` (UNKNOWN so far)."""

    __slots__ = ("end", "iteration", "lasts", "units")

    def __init__(self, units: int, lasts: list[tuple[int, int]], iteration: int) -> None:
        self.units, self.lasts, self.iteration, self.end = units, lasts, iteration, UNKNOWN


class _Run:
    """The state of one simulation, in ticks. Operations go by their place in the problem, since
    planning simulates thousands of loops."""

    def __init__(self, problem: LoopProblem, order: Order, iterations: int) -> None:
        ops = problem.ops
        self._problem, self._iterations = problem, iterations
        self._place = {op.name: place for place, op in enumerate(ops)}
        self._durations = [op.duration for op in ops]
        self._after = [self._places(op.after) for op in ops]
        self._holds: list[list[tuple[str, int, list[tuple[int, int]]]]] = [[] for _ in ops]
        for hold in problem.holds:
            held = (hold.pool, hold.units, self._places(hold.last))
            self._holds[self._place[hold.first]].append(held)
        self._queues = [self._queue(self._places(items)) for items in order.values()]
        self._engines = tuple(order)
        self._start = [[UNKNOWN] * iterations for _ in ops]
        self._end = [[UNKNOWN] * iterations for _ in ops]
        self._taken: dict[str, list[_Held]] = {name: [] for name in problem.pools}
        self._awaited: tuple[int, int] | None = None

    def _places(self, items: Iterable[tuple[str, int]]) -> list[tuple[int, int]]:
        return [(self._place[name], distance) for name, distance in items]

    def _queue(self, order: list[tuple[int, int]]) -> list[tuple[int, int]]:
        ahead = max(shift for _, shift in order)
        return [
            (place, i + shift)
            for i in range(-ahead, self._iterations)
            for place, shift in order
            if 0 <= i + shift < self._iterations
        ]

    def finish(self) -> None:
        """Run everything. Raises VerifyError if engines wait for each other in a cycle."""
        ends, try_ = self._end, self._try
        at, free = [0] * len(self._queues), [0] * len(self._queues)
        # What each engine waits for: an operation of an iteration, or a pool (None).
        awaited: list[tuple[int, int] | None] = [None] * len(self._queues)
        moved = True
        while moved:
            moved = False
            for engine, queue in enumerate(self._queues):
                wait = awaited[engine]
                if wait and ends[wait[0]][wait[1]] < 0:
                    continue
                while at[engine] < len(queue):
                    end = try_(free[engine], *queue[at[engine]])
                    if end < 0:
                        awaited[engine] = self._awaited
                        break
                    free[engine] = end
                    at[engine] += 1
                    moved = True
        stuck = [e for e, queue in enumerate(self._queues) if at[e] < len(queue)]
        if stuck:
            names = [self._problem.ops[self._queues[e][at[e]][0]].name for e in stuck]
            pairs = zip(stuck, names, strict=True)
            where = "; ".join(f"{self._engines[e]} at {name}" for e, name in pairs)
            raise VerifyError(f"engines wait for each other in a cycle: {where}")

    def _try(self, start: int, place: int, iteration: int) -> int:
        """Run an operation no earlier than ``start``; its end, or UNKNOWN if it has to wait."""
        ends = self._end
        for before, distance in self._after[place]:
            if iteration >= distance:
                end = ends[before][iteration - distance]
                if end < 0:
                    self._awaited = (before, iteration - distance)
                    return UNKNOWN
                if end > start:
                    start = end
        holds = self._holds[place]
        for pool, units, _ in holds:
            start = self._room(pool, units, start)
            if start < 0:
                self._awaited = None
                return UNKNOWN
        for pool, units, lasts in holds:
            self._taken[pool].append(_Held(units, lasts, iteration))
        self._start[place][iteration] = start
        end = ends[place][iteration] = start + self._durations[place]
        return end

    def _room(self, pool: str, units: int, start: int) -> int:
        """When the pool has room for so many more, or UNKNOWN while that is not known."""
        taken = self._taken[pool]
        over = units - self._problem.pools[pool]
        for held in taken:
            over += held.units
            if held.end < 0:
                held.end = self._release(held.lasts, held.iteration)
        if over > 0:
            for end, freed in sorted((held.end, held.units) for held in taken if held.end >= 0):
                over -= freed
                start = max(start, end)
                if over <= 0:
                    break
            else:
                return UNKNOWN
        self._taken[pool] = [held for held in taken if held.end < 0 or held.end > start]
        return start

    def _release(self, lasts: list[tuple[int, int]], iteration: int) -> int:
        latest = 0
        for place, distance in lasts:
            if iteration + distance < self._iterations:
                end = self._end[place][iteration + distance]
                if end < 0:
                    return UNKNOWN
                if end > latest:
                    latest = end
        return latest

    def start_of(self, name: str, iteration: int) -> int:
        """When an operation starts, in ticks."""
        return self._start[self._place[name]][iteration]

    def interval(self, hold: Hold, iteration: int) -> tuple[float, float]:
        """From when to when a unit is held, in seconds."""
        start = self._start[self._place[hold.first]][iteration]
        end = self._release(self._places(hold.last), iteration)
        assert start >= 0 and end >= 0
        return start * TICK, max(end, start) * TICK

    def ends(self) -> list[int]:
        """When the last operation of every iteration on the GPU ends."""
        ops = zip(self._problem.ops, self._end, strict=True)
        return [
            max(each) for each in zip(*(e for op, e in ops if op.engine == "gpu0"), strict=True)
        ]

    def spans(self, classes: Mapping[str, str]) -> list[Span]:
        """Everything that took time."""
        found = []
        for op, starts, ends in zip(self._problem.ops, self._start, self._end, strict=True):
            kind, title = classes[op.name].split(":", 1)
            found += [
                Span(op.engine, kind, title, i, start * TICK, end * TICK, i)
                for i, (start, end) in enumerate(zip(starts, ends, strict=True))
                if end > start
            ]
        return sorted(found, key=lambda span: (span.start, span.engine))
