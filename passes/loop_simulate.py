"""Loop simulation: `loop, iterations -> spans`, engines in order, and the period they settle into.

Every engine takes its operations in the loop's order; an operation starts when its engine is free,
what it comes after has ended, and its pools have room. Pools give room in the order of acquisition.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dovetail.ir.errors import VerifyError
from dovetail.ir.timeline import Span, Timeline
from dovetail.passes.loop_body import TICK, Loop
from dovetail.solvers.loop_problem import Hold, Op

WARM, MEASURED = 4, 4
"""Iterations before the period is measured, and over how many."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between layers in steady state, and what the first and last add (fill and drain)."""

    period: float
    ramp: float


def pace(loop: Loop) -> Pace:
    """How fast layers follow each other."""
    ahead = max(shift for order in loop.order.values() for _, shift in order)
    # The last iterations have nothing to run ahead for, so they are not measured.
    last = WARM + MEASURED
    run = _Run(loop, last + ahead)
    run.finish()
    ends = [run.end_of(i) for i in range(last + ahead)]
    busiest = max(loop.loads().values()) / TICK
    period = max((ends[last - 1] - ends[WARM - 1]) / MEASURED, busiest)
    return Pace(period * TICK, max(0.0, ends[-1] - period * (last + ahead)) * TICK)


def timeline(loop: Loop, iterations: int) -> Timeline:
    """The predicted timeline of ``iterations`` layers; a span's step is its layer."""
    run = _Run(loop, iterations)
    run.finish()
    return Timeline("predicted", tuple(run.spans()))


def held(loop: Loop, iterations: int, iteration: int) -> dict[str, list[tuple[float, float]]]:
    """For every pool, from when to when each unit that ``iteration`` takes is held, in seconds of a
    run of ``iterations`` layers."""
    run = _Run(loop, iterations)
    run.finish()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in loop.problem.pools}
    for hold in loop.problem.holds:
        found[hold.pool] += [run.interval(hold, iteration)] * hold.units
    return {pool: sorted(spans) for pool, spans in found.items() if spans}


class _Run:
    """The state of one simulation, in ticks."""

    def __init__(self, loop: Loop, iterations: int) -> None:
        self._loop, self._iterations = loop, iterations
        self._ops: Mapping[str, Op] = {op.name: op for op in loop.problem.ops}
        self._first: dict[str, list[Hold]] = {}
        for hold in loop.problem.holds:
            self._first.setdefault(hold.first, []).append(hold)
        self._queues = {engine: list(self._queue(engine)) for engine in loop.order}
        self._at = dict.fromkeys(self._queues, 0)
        self._free = dict.fromkeys(self._queues, 0)
        self._start: dict[tuple[str, int], int] = {}
        self._end: dict[tuple[str, int], int] = {}
        self._taken: dict[str, list[tuple[Hold, int]]] = {name: [] for name in loop.problem.pools}

    def _queue(self, engine: str) -> list[tuple[str, int]]:
        order = self._loop.order[engine]
        ahead = max(shift for _, shift in order)
        return [
            (name, i + shift)
            for i in range(-ahead, self._iterations)
            for name, shift in order
            if 0 <= i + shift < self._iterations
        ]

    def finish(self) -> None:
        """Run everything. Raises VerifyError if engines wait for each other in a cycle."""
        moved = True
        while moved:
            moved = False
            for engine, queue in self._queues.items():
                while self._at[engine] < len(queue) and self._try(engine, *queue[self._at[engine]]):
                    self._at[engine] += 1
                    moved = True
        stuck = [e for e, queue in self._queues.items() if self._at[e] < len(queue)]
        if stuck:
            where = "; ".join(f"{e} at {self._queues[e][self._at[e]][0]}" for e in stuck)
            raise VerifyError(f"engines wait for each other in a cycle: {where}")

    def _try(self, engine: str, name: str, iteration: int) -> bool:
        op, start = self._ops[name], self._free[engine]
        for before, distance in op.after:
            if iteration >= distance:
                end = self._end.get((before, iteration - distance))
                if end is None:
                    return False
                start = max(start, end)
        for hold in self._first.get(name, ()):
            room = self._room(hold, start)
            if room is None:
                return False
            start = room
        for hold in self._first.get(name, ()):
            self._taken[hold.pool].append((hold, iteration))
        self._start[name, iteration] = start
        self._end[name, iteration] = self._free[engine] = start + op.duration
        return True

    def _room(self, hold: Hold, start: int) -> int | None:
        """When the pool has room for one more, or None while that is not known."""
        capacity, taken = self._loop.problem.pools[hold.pool], self._taken[hold.pool]
        used, releases = 0, []
        for other, iteration in taken:
            end = self._release(other, iteration)
            used += other.units
            if end is not None:
                releases.append((end, other.units))
        for end, units in sorted(releases):
            if used + hold.units <= capacity:
                break
            used -= units
            start = max(start, end)
        if used + hold.units > capacity:
            return None
        self._taken[hold.pool] = [
            t for t in taken if (end := self._release(*t)) is None or end > start
        ]
        return start

    def _release(self, hold: Hold, iteration: int) -> int | None:
        latest = 0
        for name, distance in hold.last:
            if iteration + distance >= self._iterations:
                continue
            end = self._end.get((name, iteration + distance))
            if end is None:
                return None
            latest = max(latest, end)
        return latest

    def interval(self, hold: Hold, iteration: int) -> tuple[float, float]:
        """From when to when a unit is held, in seconds."""
        start = self._start[hold.first, iteration]
        end = self._release(hold, iteration)
        assert end is not None
        return start * TICK, max(end, start) * TICK

    def end_of(self, iteration: int) -> int:
        """When the last operation of an iteration on the GPU ends."""
        return max(
            end
            for (name, i), end in self._end.items()
            if i == iteration and self._ops[name].engine == "gpu0"
        )

    def spans(self) -> list[Span]:
        """Everything that took time."""
        found = []
        for (name, iteration), start in self._start.items():
            end, engine = self._end[name, iteration], self._ops[name].engine
            if end > start:
                kind, title = self._loop.classes[name].split(":", 1)
                found.append(
                    Span(engine, kind, title, iteration, start * TICK, end * TICK, iteration)
                )
        return sorted(found, key=lambda span: (span.start, span.engine))
