"""Stalls of a loop whose buffers are few: one engine waits for what another is too busy to do.

Let an op *use* units while it takes them, or while it is one of those that the hold lasts for.

    fill    Let all takers of a pool run on one engine, and let c be an op of that engine which is
            none of them, y the last taker before c and x the first after it. What uses units on
            another engine between the start of y and the end of x has units that are held at the
            start of y: those taken later come too late. So that engine does no more of such work
            in these p_y + p_c + p_x ticks than fits into the pool at once, and the rest of the
            period's outside: T >= p_y + p_c + p_x + (work of one iteration) - (work that fits),
            unless all of it fits. y and x follow each other: they are two ops where there are two.
    drain   Let c be an op of another engine, on which every hold has users, but c is none. While c
            runs, only takers use units, and theirs are still held when c ends: together they use
            at most capacity * longest taker. What is left of capacity * p_c is lost. Hence
            capacity * T >= sum of units * (ticks of the taker and of those users) + what is lost.
            Takers that run after c in its iteration, or a later one, and always before the next c,
            never run beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import floor

from dovetail.solvers.loop_problem import Hold, LoopProblem, Op, distances


def stall(problem: LoopProblem, holds: Sequence[Hold], capacity: int) -> int:
    """Ticks that no period can be shorter than because of stalls, where all of ``holds`` are of one
    pool with so many units; 0 if there are none."""
    return max(fill_stall(problem, holds, capacity), drain_stall(problem, holds, capacity))


def fill_stall(problem: LoopProblem, holds: Sequence[Hold], capacity: int) -> int:
    """``stall`` because of an op that keeps the takers' engine busy."""
    table = problem.table
    takers = {hold.first for hold in holds}
    engines = {table[name].engine for name in takers}
    if len(engines) != 1:
        return 0
    away = [op.duration for op in problem.ops if op.engine in engines and op.name not in takers]
    shortest = sorted(table[name].duration for name in takers)
    around = shortest[0] + shortest[min(1, len(shortest) - 1)]
    longest = max(away, default=0)
    works = _works(table, holds, capacity)
    found = [work + around + longest - most for work, most in works]
    return max(found, default=0) if longest else 0


def _works(
    table: Mapping[str, Op], holds: Sequence[Hold], capacity: int
) -> Iterator[tuple[int, int]]:
    """Of each engine, the ticks of an iteration's users, and the most of them that use what is held
    at one instant, where that is less."""
    works: dict[str, list[int]] = {}
    seen: set[str] = set()
    for place, hold in enumerate(holds):
        for name, _ in hold.last:
            # What uses units of several holds counts for one of them.
            if name not in seen and name != hold.first:
                seen.add(name)
                ticks = works.setdefault(table[name].engine, [0] * len(holds))
                ticks[place] += table[name].duration
    for ticks in works.values():
        # Several iterations may hold units at once, and so the busiest hold more than once.
        shares = (Fraction(n, h.units) for n, h in zip(ticks, holds, strict=True))
        most = floor(_room(holds, capacity) * max(shares))
        if sum(ticks) > most:
            yield sum(ticks), most


def drain_stall(problem: LoopProblem, holds: Sequence[Hold], capacity: int) -> int:
    """``stall`` because of ops that keep the users' engine busy."""
    table = problem.table
    engines = {table[name].engine for hold in holds for name, _ in hold.last}
    return max((_drain(problem, holds, capacity, engine) for engine in engines), default=0)


def _drain(problem: LoopProblem, holds: Sequence[Hold], capacity: int, engine: str) -> int:
    table = problem.table
    users = {
        hold: {x for x, _ in hold.last if table[x].engine == engine and x != hold.first}
        for hold in holds
    }
    holds = [hold for hold in holds if users[hold]]
    if not holds:
        return 0
    takers = {hold.first for hold in holds}
    busy = {*takers, *(name for hold in holds for name in users[hold])}
    used = sum(h.units * sum(table[x].duration for x in {h.first, *users[h]}) for h in holds)
    room, lost = _room(holds, capacity), 0
    for op in problem.ops:
        if op.engine == engine and op.name not in busy and op.duration:
            beside = [table[x].duration for x in takers if not _apart(problem, op.name, x)]
            lost += max(0, capacity * op.duration - room * max(beside, default=0))
    return -(-(used + lost) // capacity) if lost else 0


def _apart(problem: LoopProblem, one: str, other: str) -> bool:
    """Whether every run of ``other`` comes between two runs of ``one`` that follow each other."""
    there, back = distances(problem, one).get(other), distances(problem, other).get(one)
    return there is not None and back is not None and there + back <= 1


def _room(holds: Sequence[Hold], capacity: int) -> int:
    """The most units that ``holds`` can have at once."""
    units = {hold.units for hold in holds}
    return capacity - capacity % units.pop() if len(units) == 1 else capacity
