"""List scheduling of a loop: a legal periodic schedule without search.

A few iterations are scheduled greedily: whenever an engine is idle, the most urgent op that can
start does. The order of a middle iteration is then repeated at the shortest period that it allows
(``retime``). Several priorities compete, some of them drawn at random from fixed seeds. Two rules
keep pools from locking up: units are taken iteration by iteration, and nothing starts more than a
few iterations early.
"""

import heapq
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dovetail.solvers.loop_bounds import lowest_period, pools_too_small
from dovetail.solvers.loop_problem import (
    LoopProblem,
    ModuloSchedule,
    check,
    check_problem,
    ranks,
)
from dovetail.solvers.loop_replay import Instance, LoopClock
from dovetail.solvers.retime import retime
from dovetail.solvers.solved import Solved

# Sets of ops that the search for a serial order may look at.
_SERIAL_STATES = 20_000


def list_schedule(problem: LoopProblem, draws: int = 12) -> Solved[ModuloSchedule]:
    """The best of a few list schedules, ``draws`` of them with random priorities; every chain is
    kept. ``infeasible`` is proved, and ``value.blocked`` names the pools. Raises ValueError for a
    bad problem, RuntimeError if neither a schedule nor a proof that there is none was found."""
    begin = time.perf_counter()
    check_problem(problem)
    low = lowest_period(problem)
    best = best_listed(problem, low, draws)
    if best is None:
        blocked = blocked_pools(problem)
        if not blocked:
            raise RuntimeError(
                "list scheduling found no order of this loop in which its pools suffice, and no "
                f"proof that there is none; give more units than {dict(problem.pools)}"
            )
        return infeasible(blocked, time.perf_counter() - begin)
    proved = best.period == low
    seconds = time.perf_counter() - begin
    return Solved(best, best.period, low, "optimal" if proved else "feasible", seconds)


def infeasible(blocked: tuple[str, ...], seconds: float) -> Solved[ModuloSchedule]:
    """The answer for a loop that has no schedule, because of the pools that are named."""
    return Solved(ModuloSchedule(0, {}, blocked), float("inf"), None, "infeasible", seconds)


def best_listed(problem: LoopProblem, low: int, draws: int = 12) -> ModuloSchedule | None:
    """The best list schedule, or else a serial one; None if neither was found. ``low`` is a period
    that no schedule beats."""
    if pools_too_small(problem, low):
        return None
    best: ModuloSchedule | None = None
    for draft in _drafts(problem, low, draws):
        timed = retime(problem, draft, low)
        if timed is not None and not check(problem, timed):
            best = timed if best is None or timed.period < best.period else best
            if best.period == low:
                return best
    order = _serial(problem) if best is None else None
    return retime(problem, _one_by_one(problem, order), low) if order else best


def blocked_pools(problem: LoopProblem) -> tuple[str, ...]:
    """The pools that leave no schedule, if that is easily proved: some pool by itself, or else all
    that are held together; empty if it is not.

    Without holds that reach into later iterations, one iteration of any schedule, run op by op, is
    a serial order; so where no serial order exists, no schedule does.
    """
    small = pools_too_small(problem)
    if small or any(distance for hold in problem.holds for _, distance in hold.last):
        return small
    return blamed(problem, lambda some: _serial(some) == [])


def blamed(problem: LoopProblem, hopeless: Callable[[LoopProblem], bool]) -> tuple[str, ...]:
    """The pools whose holds alone make ``problem`` hopeless, or all if only together they do."""
    pools = sorted({hold.pool for hold in problem.holds})
    alone = []
    for pool in pools:
        holds = tuple(hold for hold in problem.holds if hold.pool == pool)
        if hopeless(replace(problem, holds=holds)):
            alone.append(pool)
    return tuple(alone or (pools if hopeless(problem) else ()))


@dataclass(frozen=True, slots=True)
class _Priority:
    """Op x of iteration i is the more urgent, the smaller i * ``step`` + ``due[x]``."""

    due: Mapping[str, int]
    step: int


def _one_by_one(problem: LoopProblem, order: Sequence[str]) -> ModuloSchedule:
    """One iteration after the other, one op at a time."""
    table, now, starts = problem.table, 0, dict[str, int]()
    for name in order:
        starts[name] = now
        now += max(1, table[name].duration)
    return ModuloSchedule(now, starts)


def _drafts(problem: LoopProblem, low: int, draws: int) -> Iterator[ModuloSchedule]:
    """Two middle iterations of each list schedule, at the periods that they suggest."""
    tails = _tails(problem)
    early = 1 + -(-max(tails.values()) // low)
    iterations = 2 * early + 4
    for priority in _priorities(problem, tails, low, draws):
        starts = _Greedy(problem, iterations, early, priority).run()
        if starts is None:
            continue
        for i in (iterations // 2, iterations // 2 + 1):
            slice_ = {op.name: starts[op.name, i] for op in problem.ops}
            steps = [starts[op.name, i + 1] - slice_[op.name] for op in problem.ops]
            for period in sorted({max(low, min(steps)), max(low, *steps)}):
                yield ModuloSchedule(period, slice_)


def _tails(problem: LoopProblem) -> dict[str, int]:
    """The ticks from each op's start to the end of all that depends on it in its iteration."""
    table, tails = problem.table, {op.name: op.duration for op in problem.ops}
    for name in sorted(table, key=ranks(problem).__getitem__, reverse=True):
        for earlier, distance in table[name].after:
            if distance == 0:
                tails[earlier] = max(tails[earlier], table[earlier].duration + tails[name])
    return tails


def _priorities(
    problem: LoopProblem, tails: Mapping[str, int], low: int, draws: int
) -> Iterator[_Priority]:
    place = ranks(problem)
    critical = {name: -ticks for name, ticks in tails.items()}
    apart = 2 * (max(tails.values()) + low) + len(place)
    yield _Priority(critical, low)
    yield _Priority(critical, apart)
    yield _Priority(place, apart)
    for seed in range(draws):
        rng = random.Random(seed)
        spread = low if seed % 2 else max(1, low // 4)
        yield _Priority({x: due + rng.randrange(spread) for x, due in critical.items()}, low)


class _Greedy:
    """One list schedule of ``iterations`` iterations."""

    def __init__(
        self, problem: LoopProblem, iterations: int, early: int, priority: _Priority
    ) -> None:
        self._table, self._priority, self._early = problem.table, priority, early
        self._place = ranks(problem)
        self._all = [(op.name, i) for i in range(iterations) for op in problem.ops]
        self._clock = LoopClock(problem, self._all)
        # An op also waits for the start of those before it in a chain, and of its own last run.
        self._gates: Counter[Instance] = Counter()
        self._opens: dict[Instance, list[Instance]] = {}
        links = [*(pair for chain in problem.chains for pair in pairwise(chain))]
        for i in range(iterations):
            for u, v in links:
                self._gate((u, i), (v, i))
            for name in self._table:
                if i:
                    self._gate((name, i - 1), (name, i))
        takers = {(hold.pool, hold.first) for hold in problem.holds}
        self._turns = {(pool, i): 0 for pool in problem.pools for i in range(iterations)}
        for pool, _ in takers:
            for i in range(iterations):
                self._turns[pool, i] += 1
        self._turn = dict.fromkeys(problem.pools, 0)
        self._left = [len(problem.ops)] * iterations
        self._queues: dict[tuple[str, str], list[tuple[int, int, int, Instance]]] = {}

    def _gate(self, earlier: Instance, later: Instance) -> None:
        self._gates[later] += 1
        self._opens.setdefault(earlier, []).append(later)

    def run(self) -> dict[Instance, int] | None:
        """The start of every op; None if nothing can start any more."""
        clock = self._clock
        for instance in self._all:
            self._offer(instance)
        while len(clock.runs) < len(self._all):
            while self._start_one():
                pass
            ready = clock.advance()
            if ready is None:
                return None
            for instance in ready:
                self._offer(instance)
        return {(run.op, run.iteration): run.start for run in clock.runs}

    def _offer(self, instance: Instance) -> None:
        """Queues an op that waits for no other. Ops of an engine that want the same units share a
        queue: where its head cannot start, none of it can."""
        if self._clock.waiting(instance) or self._gates[instance]:
            return
        name, i = instance
        needs = self._clock.needs(instance)
        urgency = i * self._priority.step + self._priority.due[name]
        key = (self._table[name].engine, repr(sorted(needs.items())))
        entry = (i if needs else 0, urgency, self._place[name], instance)
        heapq.heappush(self._queues.setdefault(key, []), entry)

    def _start_one(self) -> bool:
        heads = [queue for queue in self._queues.values() if queue and self._may(queue[0][3])]
        if not heads:
            return False
        # Across queues, only urgency counts.
        queue = min(heads, key=lambda queue: queue[0][1:3])
        instance = heapq.heappop(queue)[3]
        self._clock.start(instance)
        i = instance[1]
        self._left[i] -= 1
        for pool in self._clock.needs(instance):
            self._turns[pool, i] -= 1
            while self._turns.get((pool, self._turn[pool])) == 0:
                self._turn[pool] += 1
        for later in self._opens.get(instance, ()):
            self._gates[later] -= 1
            self._offer(later)
        return True

    def _may(self, instance: Instance) -> bool:
        i = instance[1]
        if i >= self._early and self._left[i - self._early]:
            return False
        if any(self._turn[pool] != i for pool in self._clock.needs(instance)):
            return False
        return self._clock.can_start(instance)


def _serial(problem: LoopProblem) -> list[str] | None:
    """An order in which one iteration after the other runs op by op; [] if there is none, None if
    too many sets of ops would have to be looked at.

    Ops that take no units are run as soon as they can: they only ever let go of some.
    """
    takes = {hold.first for hold in problem.holds}
    dead: set[frozenset[str]] = set()

    def search(done: list[str]) -> list[str]:
        ran = set(done)
        while free := [x for x in _open(problem, ran) if x not in takes]:
            done = [*done, *free]
            ran.update(free)
        if len(done) == len(problem.ops):
            return done
        if frozenset(ran) in dead or len(dead) > _SERIAL_STATES:
            return []
        for name in _open(problem, ran):
            if _fits(problem, ran, name) and (found := search([*done, name])):
                return found
        dead.add(frozenset(ran))
        return []

    found = search([])
    return None if not found and len(dead) > _SERIAL_STATES else found


def _open(problem: LoopProblem, ran: set[str]) -> list[str]:
    """The ops that wait for no other of their iteration."""
    return [
        op.name
        for op in problem.ops
        if op.name not in ran and all(d > 0 or u in ran for u, d in op.after)
    ]


def _fits(problem: LoopProblem, ran: set[str], name: str) -> bool:
    """Whether there is room for what ``name`` takes when ``ran`` have run in its iteration."""
    room = dict(problem.pools)
    for hold in problem.holds:
        held = int(hold.first == name)
        for age in range(1 + max((d for _, d in hold.last), default=0)):
            taken = age > 0 or hold.first in ran
            # Of an instance this old, an op further on is still to come.
            wanted = any(d > age or (d == age and x not in ran) for x, d in hold.last)
            held += taken and wanted
        room[hold.pool] -= hold.units * held
    return all(units >= 0 for units in room.values())
