"""Retiming: the shortest period at which a loop can run in a given order.

With the order of every engine's ops, of every pool's takers and of what is let go before each of
them takes its units, all that is left are difference constraints with a period (cycle_ratio.py).
"""

import heapq
from collections.abc import Iterator, Sequence
from itertools import pairwise

from dovetail.solvers.cycle_ratio import Edge, smallest_period
from dovetail.solvers.loop_problem import Hold, LoopProblem, ModuloSchedule, release
from dovetail.solvers.loop_replay import order_of


def retime(problem: LoopProblem, draft: ModuloSchedule, low: int = 1) -> ModuloSchedule | None:
    """The shortest period, at least ``low``, at which ops run and units are taken and let go in the
    order of ``draft``, which may itself be illegal; None if no period makes that order legal.
    Where ``draft`` is legal, the period is never longer than its own."""
    table, order = problem.table, order_of(problem, draft)
    edges: list[Edge] = []
    for op in problem.ops:
        edges += [(u, op.name, table[u].duration, distance) for u, distance in op.after]
    for chain in problem.chains:
        edges += [(u, v, 0, 0) for u, v in pairwise(chain)]
    for sequence in order.engines.values():
        edges += [(u, v, table[u].duration, distance) for u, v, distance in _cyclic(sequence)]
    for pool, takers in order.pools.items():
        if takers:
            edges += [(u, v, 0, distance) for u, v, distance in _cyclic(takers)]
            found = _handovers(problem, draft, pool, takers)
            if found is None:
                return None
            edges += found
    # Edges in the order of time settle the longest paths in few rounds.
    edges.sort(key=lambda edge: (draft.starts[edge[0]], edge))
    timed = smallest_period(table, edges, low)
    return None if timed is None else ModuloSchedule(*timed)


def _cyclic(sequence: Sequence[tuple[str, int]]) -> Iterator[tuple[str, str, int]]:
    """(op, the op that follows it in the sequence, distance), the next period's first included."""
    for (u, older), (v, newer) in pairwise(sequence):
        yield u, v, older - newer
    (u, older), (v, newer) = sequence[-1], sequence[0]
    yield u, v, 1 + older - newer


def _handovers(
    problem: LoopProblem, draft: ModuloSchedule, pool: str, takers: Sequence[tuple[str, int]]
) -> list[Edge] | None:
    """For each taker, the holds that must have been let go before it starts, in the draft's order
    of release; None if one taker alone wants more than there is."""
    table, period = problem.table, draft.period
    turn = {name: (place, lag) for place, (name, lag) in enumerate(takers)}
    holds = [hold for hold in problem.holds if hold.pool == pool]
    # Times of the instances that are taken in period 0.
    freed = [
        release(table, hold, draft.starts, period) - turn[hold.first][1] * period for hold in holds
    ]
    edges: list[Edge] = []
    needed: list[list[int]] = []
    for place, (name, _) in enumerate(takers):
        room = problem.pools[pool] - sum(hold.units for hold in holds if hold.first == name)
        if room < 0:
            return None
        newest = [0 if turn[hold.first][0] < place else -1 for hold in holds]
        needed.append(_spent(holds, freed, newest, period, room))
    for place, (name, lag) in enumerate(takers):
        # What the taker before waited for has been let go already.
        before = needed[place - 1] if place else [n - 1 for n in needed[-1]]
        for hold, period_of, known in zip(holds, needed[place], before, strict=True):
            if period_of > known:
                first = turn[hold.first][1]
                for last, later in {(hold.first, 0), *hold.last}:
                    distance = first - period_of - later - lag
                    edges.append((last, name, max(1, table[last].duration), distance))
    return edges


def _spent(
    holds: Sequence[Hold], freed: Sequence[int], newest: list[int], period: int, room: int
) -> list[int]:
    """Of each hold, the last period whose instance must be let go so that the instances that are
    let go latest fit into ``room``; ``newest`` has the last period in which each was taken."""
    heap = [(-(freed[h] + n * period), h) for h, n in enumerate(newest)]
    heapq.heapify(heap)
    while heap and holds[heap[0][1]].units <= room:
        ticks, h = heapq.heappop(heap)
        room -= holds[h].units
        newest[h] -= 1
        heapq.heappush(heap, (ticks + period, h))
    return newest
