"""Relays of a loop: units of one pool that are handed on to another.

Where a hold of one pool lasts until an op has ended that takes units of the next, what the two hold
is held without a break from the first op to the last release: by one pool, by the other, or during
the op between them by both. So it is held like units of one pool with the capacities of both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

from dovetail.solvers.loop_problem import Hold, LoopProblem


@dataclass(frozen=True, slots=True)
class Relay:
    """Two pools, the holds that pass from the first to the second, each as one, and the least ticks
    of the ops between."""

    pools: tuple[str, str]
    holds: tuple[Hold, ...]
    ticks: int


def relays(problem: LoopProblem) -> Iterator[Relay]:
    """Every pair of pools of which one hands on to the other."""
    table = problem.table
    for one, other in permutations(problem.pools, 2):
        takers: dict[str, list[Hold]] = {}
        for hold in problem.holds:
            if hold.pool == other:
                takers.setdefault(hold.first, []).append(hold)
        found = []
        for hold in problem.holds:
            handed = next((item for item in hold.last if takers.get(item[0])), None)
            if hold.pool == one and handed:
                # What is handed on is one hold of the second pool, and no other's.
                taker = takers[handed[0]].pop()
                found.append((_joined(hold, taker, handed[1]), table[taker.first].duration))
        if found:
            holds = tuple(hold for hold, _ in found)
            yield Relay((one, other), holds, min(ticks for _, ticks in found))


def _joined(hold: Hold, taker: Hold, distance: int) -> Hold:
    last = tuple((name, distance + later) for name, later in taker.last)
    units = min(hold.units, taker.units)
    return Hold(f"{hold.pool}+{taker.pool}", units, hold.first, last)
