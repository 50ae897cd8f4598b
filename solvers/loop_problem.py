"""Loop scheduling: the problem, its periodic schedules and their independent checker.

Op x of iteration i starts at s_x + i T, where T is the period and p_x the op's duration, in ticks:

    dependences   s_v + d T >= s_u + p_u     for every (u, d) in v.after
    engines       the arcs [s_x, s_x + p_x) modulo T of one engine's ops are disjoint
    pools         the units held at any instant are at most the pool's capacity

This is modulo scheduling, or software pipelining (Rau, 1994), with buffers. An op of no duration
still waits its turn: it never starts inside another op of its engine, and it counts as one tick
for what it holds, so that no two ops can wait for each other's units at one instant.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of a loop body: it occupies ``engine`` for ``duration`` ticks, and starts after
    each (op, distance) of ``after``, that op of ``distance`` iterations earlier, has ended."""

    name: str
    engine: str
    duration: int
    after: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Hold:
    """``units`` of ``pool``, held from the start of ``first`` until it and every (op, distance) of
    ``last``, that op of ``distance`` iterations later, have ended."""

    pool: str
    units: int
    first: str
    last: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class LoopProblem:
    """A loop body that repeats for ever: its ops, what they hold of the ``pools`` (capacities in
    units), and ``chains`` of interchangeable ops that may as well start in the order given. Whoever
    gives a chain vouches that some best schedule keeps it; optimality is proved among those."""

    ops: tuple[Op, ...]
    holds: tuple[Hold, ...] = ()
    pools: Mapping[str, int] = field(default_factory=dict)
    chains: tuple[tuple[str, ...], ...] = ()

    @property
    def table(self) -> dict[str, Op]:
        """The ops by name."""
        return {op.name: op for op in self.ops}


@dataclass(frozen=True, slots=True)
class ModuloSchedule:
    """Iterations start ``period`` ticks apart; ``starts`` has each op's start in iteration 0, in
    ticks. ``blocked`` names the pools that are too small, where no schedule exists."""

    period: int
    starts: Mapping[str, int]
    blocked: tuple[str, ...] = ()


def check_problem(problem: LoopProblem) -> None:
    """Raises ValueError naming what makes ``problem`` no loop: unknown or repeated names, negative
    numbers, a cycle of distance 0, a hold whose last op does not depend on its first."""
    wrong = [*_wrong_names(problem), *_wrong_numbers(problem)]
    if not wrong:
        ranks(problem)
        wrong = list(_loose_holds(problem))
    if wrong:
        raise ValueError(f"this loop cannot be scheduled: {'; '.join(wrong)}")


def ranks(problem: LoopProblem) -> dict[str, int]:
    """Each op's place in an order that follows every dependence of distance 0 and every chain;
    raises ValueError if there is none."""
    before = {op.name: [u for u, distance in op.after if distance == 0] for op in problem.ops}
    for chain in problem.chains:
        for earlier, later in pairwise(chain):
            before[later].append(earlier)
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        path = " -> ".join(error.args[1])
        raise ValueError(
            f"this loop cannot be scheduled: each of {path} waits for the one before it in the "
            "same iteration; give one of these dependences a distance, or drop a chain"
        ) from None
    return {name: place for place, name in enumerate(order)}


def release(table: Mapping[str, Op], hold: Hold, starts: Mapping[str, int], period: int) -> int:
    """The tick at which iteration 0's instance of ``hold`` is let go."""
    ends = [starts[x] + d * period + max(1, table[x].duration) for x, d in hold.last]
    return max([starts[hold.first] + max(1, table[hold.first].duration), *ends])


def peaks(problem: LoopProblem, schedule: ModuloSchedule) -> dict[str, int]:
    """The most units of each pool that are held at any instant of the steady state."""
    table, period = problem.table, schedule.period
    base = dict.fromkeys(problem.pools, 0)
    events: dict[str, list[tuple[int, int]]] = {pool: [] for pool in problem.pools}
    for hold in problem.holds:
        start = schedule.starts[hold.first]
        laps, rest = divmod(release(table, hold, schedule.starts, period) - start, period)
        phase = start % period
        # What is still held when a period ends is held when the next begins.
        base[hold.pool] += hold.units * (laps + (phase + rest >= period and rest > 0))
        if rest:
            events[hold.pool] += [(phase, hold.units), ((phase + rest) % period, -hold.units)]
    return {pool: _peak(base[pool], events[pool]) for pool in problem.pools}


def check(problem: LoopProblem, schedule: ModuloSchedule) -> list[str]:
    """What makes ``schedule`` illegal, one sentence each; empty if it is legal."""
    missing = [op.name for op in problem.ops if op.name not in schedule.starts]
    if missing or schedule.period < 1:
        return [f"no start for {missing}"] if missing else [f"period {schedule.period} is under 1"]
    peak = peaks(problem, schedule)
    return [
        *_early(problem, schedule),
        *_overlaps(problem, schedule),
        *(
            f"pool {pool!r}: {peak[pool]} units held at once, capacity {capacity}"
            for pool, capacity in problem.pools.items()
            if peak[pool] > capacity
        ),
    ]


def _early(problem: LoopProblem, schedule: ModuloSchedule) -> Iterator[str]:
    table, starts = problem.table, schedule.starts
    for op in problem.ops:
        for name, distance in op.after:
            end = starts[name] + table[name].duration - distance * schedule.period
            if starts[op.name] < end:
                yield (
                    f"op {op.name!r} starts at {starts[op.name]}, before {name!r} of {distance} "
                    f"iterations earlier ends at {end}"
                )


def _overlaps(problem: LoopProblem, schedule: ModuloSchedule) -> Iterator[str]:
    """Arcs on a circle are disjoint if each ends before the next begins, the last one included."""
    arcs: dict[str, list[tuple[int, int, str]]] = {}
    for op in problem.ops:
        phase = schedule.starts[op.name] % schedule.period
        arcs.setdefault(op.engine, []).append((phase, op.duration, op.name))
    for engine, found in arcs.items():
        found.sort()
        again = (found[0][0] + schedule.period, *found[0][1:])
        for (start, ticks, name), (following, _, other) in pairwise([*found, again]):
            if start + ticks > following:
                yield (
                    f"engine {engine!r}: {name!r} runs in [{start}, {start + ticks}) of the "
                    f"period, {other!r} starts at {following}"
                )


def _peak(base: int, events: list[tuple[int, int]]) -> int:
    """The highest level of a sweep in which units are let go before others are taken."""
    level = peak = base
    for _, change in sorted(events):
        level += change
        peak = max(peak, level)
    return peak


def _wrong_names(problem: LoopProblem) -> Iterator[str]:
    names = [op.name for op in problem.ops]
    if not names:
        yield "it has no ops"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two ops are named {name!r}"
    used = [(f"op {op.name!r} comes after", u) for op in problem.ops for u, _ in op.after]
    for hold in problem.holds:
        used += [(f"a hold of pool {hold.pool!r} names", x) for x, _ in hold.last]
        used.append((f"a hold of pool {hold.pool!r} begins with", hold.first))
        if hold.pool not in problem.pools:
            yield f"op {hold.first!r} holds pool {hold.pool!r}, which has no capacity"
    used += [("a chain names", name) for chain in problem.chains for name in chain]
    yield from (f"{what} {name!r}, which is no op" for what, name in used if name not in names)


def _wrong_numbers(problem: LoopProblem) -> Iterator[str]:
    for op in problem.ops:
        if op.duration < 0:
            yield f"op {op.name!r} takes {op.duration} ticks; expected 0 or more"
        for name, distance in op.after:
            if distance < 0:
                yield f"op {op.name!r} comes after {name!r} at distance {distance}; expected >= 0"
    for hold in problem.holds:
        if hold.units < 1:
            yield f"op {hold.first!r} holds {hold.units} units of {hold.pool!r}; expected >= 1"
        if any(distance < 0 for _, distance in hold.last):
            yield f"the hold of pool {hold.pool!r} by {hold.first!r} has a negative distance"


def distances(problem: LoopProblem, source: str) -> dict[str, int]:
    """The fewest iterations between op ``source`` and each op that depends on it."""
    return _distances(_behind(problem), source)


def _behind(problem: LoopProblem) -> dict[str, list[tuple[str, int]]]:
    behind: dict[str, list[tuple[str, int]]] = {op.name: [] for op in problem.ops}
    for op in problem.ops:
        for name, distance in op.after:
            behind[name].append((op.name, distance))
    return behind


def _loose_holds(problem: LoopProblem) -> Iterator[str]:
    behind = _behind(problem)
    for hold in problem.holds:
        near = _distances(behind, hold.first)
        for name, distance in hold.last:
            if near.get(name, distance + 1) > distance:
                yield (
                    f"the hold of pool {hold.pool!r} that begins with {hold.first!r} ends with "
                    f"{name!r} of {distance} iterations later, which does not depend on it"
                )


def _distances(behind: Mapping[str, list[tuple[str, int]]], source: str) -> dict[str, int]:
    """The fewest iterations between ``source`` and each op that depends on it (Dijkstra)."""
    near: dict[str, int] = {}
    heap = [(0, source)]
    while heap:
        distance, name = heapq.heappop(heap)
        if name not in near:
            near[name] = distance
            for later, step in behind[name]:
                heapq.heappush(heap, (distance + step, later))
    return near
