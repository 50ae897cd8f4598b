"""Lower bounds on the period of a loop.

    engine      T >= sum of p_x over the engine's ops
    recurrence  T >= sum(p) / sum(d) over every cycle of dependences (Rau, 1994), and T >= the ticks
                between an event and itself one iteration later, where ops between the two that
                share an engine run one by one; events are an op's start, and the instant at which
                all ops of a set have ended for which several ops wait (loop_joins.py)
    pool        sum of units * shortest holding time <= capacity * T
    refill      let R be the first tick at which iteration 0 lets go of units of a pool. Whatever
                took units before R still holds them at R, so ops with at least (all units) -
                (capacity) units start at R or later. Let E be the end of the last of them and X the
                least time between the end of any first op and any release of the next iteration:
                E >= R + (their work), and R + T >= E + X. Hence T >= work + X.
    relay       the same for two pools of which one hands on to the other (loop_relays.py), such as
                buffers that are read into and those that they are copied to. Whatever took units of
                the first before R + H, where H is the least time that handing on takes, still has
                them or was handed on before R and still holds the second at R: together at most
                both capacities. Hence T >= H + work + X.
    stall       an engine that fills or drains a pool is busy with something else, too long for
                what the pool holds (loop_stalls.py); also for what is handed on

Ops that share an engine between two events are bounded by Jackson's preemptive schedule (Carlier,
1982), over the body unrolled a few times.
"""

import heapq
from collections.abc import Iterable, Sequence
from math import gcd

from dovetail.solvers.cycle_ratio import smallest_period
from dovetail.solvers.loop_joins import with_joins
from dovetail.solvers.loop_problem import Hold, LoopProblem, Op, ranks
from dovetail.solvers.loop_relays import relays
from dovetail.solvers.loop_stalls import stall

Node = tuple[str, int]
# Further iterations would only serve holds that last longer than this many.
_LONGEST_HOLD = 2


def period_bounds(problem: LoopProblem) -> dict[str, int]:
    """Periods in ticks that no schedule can beat, by what sets them: ``engine:NAME``,
    ``recurrence``, ``pool:NAME``, ``refill:NAME``, ``stall:NAME`` and ``relay:NAME+NAME``, which is
    the larger of the last two for both. A pool that is too small for any period has no bound;
    ``pools_too_small`` names it."""
    unrolled = _Unrolled(problem)
    bounds: dict[str, int] = {}
    for op in problem.ops:
        key = f"engine:{op.engine}"
        bounds[key] = bounds.get(key, 0) + op.duration
    bounds["recurrence"] = _recurrence(problem)
    for pool in problem.pools:
        holds = [hold for hold in problem.holds if hold.pool == pool]
        area = _area(unrolled, holds, problem.pools[pool], 1)
        if holds and area is not None:
            bounds[f"pool:{pool}"] = area
            bounds[f"refill:{pool}"] = _refill(unrolled, holds, problem.pools[pool])
            bounds[f"stall:{pool}"] = stall(problem, holds, problem.pools[pool])
    for relay in relays(problem):
        capacity = sum(problem.pools[pool] for pool in relay.pools)
        found = _refill(unrolled, relay.holds, capacity)
        name = f"relay:{'+'.join(relay.pools)}"
        bounds[name] = max(
            found + relay.ticks if found else 0, stall(problem, relay.holds, capacity)
        )
    return bounds


def lowest_period(problem: LoopProblem) -> int:
    """The largest of the bounds, at least 1."""
    return max(1, *period_bounds(problem).values())


def pools_too_small(problem: LoopProblem, low: int | None = None) -> tuple[str, ...]:
    """Pools that fit no schedule whatever the period: a single hold is larger than the pool, or
    what is held for whole periods never leaves room for the rest. ``low`` is the lowest period
    where that is known."""
    unrolled, low = _Unrolled(problem), low or lowest_period(problem)
    found = []
    for pool, capacity in problem.pools.items():
        holds = [hold for hold in problem.holds if hold.pool == pool]
        if _area(unrolled, holds, capacity, low) is None:
            found.append(pool)
    return tuple(found)


class _Unrolled:
    """The first iterations of a loop as an acyclic graph of (op, iteration)."""

    def __init__(self, problem: LoopProblem) -> None:
        self.table = problem.table
        longest = max((d for hold in problem.holds for _, d in hold.last), default=0)
        self.iterations = 2 + min(longest, _LONGEST_HOLD)
        names = sorted(self.table, key=ranks(problem).__getitem__)
        self._order = [(name, i) for i in range(self.iterations) for name in names]
        self._before: dict[Node, list[Node]] = {node: [] for node in self._order}
        self._behind: dict[Node, list[Node]] = {node: [] for node in self._order}
        for name, i in self._order:
            for earlier, distance in self.table[name].after:
                if i >= distance:
                    self._before[name, i].append((earlier, i - distance))
                    self._behind[earlier, i - distance].append((name, i))

    def op(self, node: Node) -> Op:
        return self.table[node[0]]

    def heads(self, source: Node) -> dict[Node, int]:
        """Least ticks from the start of ``source`` to the start of each node that depends on it."""
        heads = {source: 0}
        for node in self._order:
            known = [(heads[u], self.op(u)) for u in self._before[node] if u in heads]
            if known and node != source:
                heads[node] = _in_turn(known)
        return heads

    def tails(self, sinks: Iterable[Node]) -> dict[Node, int]:
        """Least ticks from the end of each node to the end of the last sink depending on it."""
        tails = dict.fromkeys(sinks, 0)
        for node in reversed(self._order):
            known = [(tails[v], self.op(v)) for v in self._behind[node] if v in tails]
            if known:
                tails[node] = _in_turn(known)
        return tails

    def through(self, heads: dict[Node, int], tails: dict[Node, int]) -> int | None:
        """Least ticks from a source to a sink, given the nodes that come between the two."""
        jobs: dict[str, list[tuple[int, int, int]]] = {}
        for node in heads.keys() & tails.keys():
            op = self.op(node)
            jobs.setdefault(op.engine, []).append((heads[node], op.duration, tails[node]))
        return max((_one_by_one(found) for found in jobs.values()), default=None)

    def between(self, source: Node, sinks: Iterable[Node]) -> int | None:
        """Least ticks from the start of ``source`` to the end of the last sink; None if no sink
        depends on it."""
        return self.through(self.heads(source), self.tails(sinks))


def _in_turn(known: list[tuple[int, Op]]) -> int:
    """When the last of several ops can have ended, each ready after its ticks, engines shared."""
    ends: dict[str, int] = {}
    for ready, op in sorted(known, key=lambda pair: pair[0]):
        ends[op.engine] = max(ends.get(op.engine, 0), ready) + op.duration
    return max(ends.values())


def _one_by_one(jobs: list[tuple[int, int, int]]) -> int:
    """Jackson's preemptive schedule of (head, ticks, tail) on one engine: its length bounds every
    schedule's from below."""
    jobs = sorted(jobs)
    waiting: list[tuple[int, int]] = []
    now = length = taken = 0
    while waiting or taken < len(jobs):
        if not waiting:
            now = max(now, jobs[taken][0])
        while taken < len(jobs) and jobs[taken][0] <= now:
            heapq.heappush(waiting, (-jobs[taken][2], jobs[taken][1]))
            taken += 1
        tail, left = heapq.heappop(waiting)
        step = left if taken == len(jobs) else min(left, jobs[taken][0] - now)
        now += step
        if step < left:
            heapq.heappush(waiting, (tail, left - step))
        else:
            length = max(length, now - tail)
    return length


def _recurrence(problem: LoopProblem) -> int:
    table = problem.table
    edges = [(u, op.name, table[u].duration, d) for op in problem.ops for u, d in op.after]
    ratio = smallest_period(table, edges, low=0)
    assert ratio is not None, "every cycle has a distance"
    loops = [ratio[0]]
    joined = with_joins(problem)
    unrolled = _Unrolled(joined)
    for op in joined.ops:
        if op.name not in table or any(distance > 0 for _, distance in op.after):
            heads = unrolled.heads((op.name, 0))
            if (op.name, 1) in heads:
                ticks = unrolled.through(heads, unrolled.tails([(op.name, 1)]))
                loops.append((ticks or 0) - op.duration)
    return max(loops)


def _lengths(unrolled: _Unrolled, hold: Hold) -> list[tuple[int, int]]:
    """Pairs (ticks, k): the hold lasts at least ticks + k T."""
    found = [(max(1, unrolled.table[hold.first].duration), 0)]
    for k in range(max((d for _, d in hold.last), default=0) + 1):
        sinks = [(x, d - k) for x, d in hold.last if 0 <= d - k < unrolled.iterations]
        ticks = unrolled.between((hold.first, 0), sinks)
        if ticks is not None:
            found.append((ticks, k))
    return found


def _area(unrolled: _Unrolled, holds: Sequence[Hold], capacity: int, low: int) -> int | None:
    """The least T >= ``low`` with sum(units * length(T)) <= capacity T; None if there is none.

    Every length is the largest of a few lines in T, so their sum is convex: the lines that are
    highest at T bound it from below everywhere, and where they cross capacity * T is the next T.
    """
    if any(hold.units > capacity for hold in holds):
        return None
    lengths = [(hold.units, _lengths(unrolled, hold)) for hold in holds]
    period = low
    while True:
        highest = [
            (units, max(lines, key=lambda line: (line[0] + line[1] * period, line[1])))
            for units, lines in lengths
        ]
        ticks = sum(units * line[0] for units, line in highest)
        share = sum(units * line[1] for units, line in highest)
        if ticks + share * period <= capacity * period:
            return period
        if share >= capacity:
            return None
        period = -(-ticks // (capacity - share))


def _refill(unrolled: _Unrolled, holds: Sequence[Hold], capacity: int) -> int:
    """See the module's text; 0 where all units fit at once or nothing ties two iterations."""
    units: dict[str, int] = {}
    for hold in holds:
        units[hold.first] = units.get(hold.first, 0) + hold.units
    work = _least_work(unrolled, units, capacity)
    if work == 0:
        return 0
    heads: dict[Node, int] | None = None
    for name in units:
        ticks = unrolled.table[name].duration
        found = {x: h - ticks for x, h in unrolled.heads((name, 0)).items() if x != (name, 0)}
        heads = found if heads is None else _least(heads, found)
    tails: dict[Node, int] | None = None
    for hold in holds:
        last = [(x, 1 + d) for x, d in hold.last if 1 + d < unrolled.iterations]
        found = unrolled.tails([(hold.first, 1), *last])
        tails = found if tails is None else _least(tails, found)
    apart = unrolled.through(heads or {}, tails or {})
    return 0 if apart is None else work + apart


def _least(one: dict[Node, int], other: dict[Node, int]) -> dict[Node, int]:
    return {node: min(one[node], other[node]) for node in one.keys() & other.keys()}


def _least_work(unrolled: _Unrolled, units: dict[str, int], capacity: int) -> int:
    """The least ticks in which ops with all but ``capacity`` of the units can run; the last of
    them may be counted in part, and each of several engines takes an equal share."""
    step = gcd(*units.values())
    missing = sum(units.values()) // step - capacity // step
    ops = sorted((unrolled.table[x] for x in units), key=lambda op: op.duration / units[op.name])
    ticks = 0
    for op in ops:
        share = units[op.name] // step
        if missing > 0:
            ticks += -(-op.duration * min(share, missing) // share)
            missing -= share
    return -(-ticks // len({op.engine for op in ops}))
