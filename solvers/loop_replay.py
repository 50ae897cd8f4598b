"""Running a loop in a fixed order: each engine its ops one by one, each pool its takers in turn.

A periodic schedule is unrolled (``expand``), or turned into the order that an executor follows
(``order_of``); an order runs with any durations (``replay``), and a finite run is pulled together
without changing its order (``compact``).
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dovetail.solvers.loop_problem import LoopProblem, ModuloSchedule, ranks

Instance = tuple[str, int]
Durations = Callable[[str, int], int]


class Run(NamedTuple):
    """One run of an op: its iteration, and its start and end in ticks."""

    op: str
    iteration: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class LoopOrder:
    """What each engine runs, and who takes units of each pool, period after period: in period n,
    (op, lag) stands for that op of iteration n - lag. Iterations that do not exist are skipped."""

    engines: Mapping[str, tuple[tuple[str, int], ...]]
    pools: Mapping[str, tuple[tuple[str, int], ...]]


def written_order(problem: LoopProblem) -> LoopOrder:
    """One iteration after the other, ops and holds in the order of the problem."""
    return _order(problem, [(op.name, 0) for op in problem.ops])


def order_of(problem: LoopProblem, schedule: ModuloSchedule) -> LoopOrder:
    """The order in which ``schedule`` runs ops and takes units, with a period that begins when the
    earliest op of an iteration starts."""
    origin, place, table = min(schedule.starts.values()), ranks(problem), problem.table
    found = []
    for op in problem.ops:
        lag, phase = divmod(schedule.starts[op.name] - origin, schedule.period)
        # At one instant, what takes no time goes first, and of that the older iteration.
        found.append((phase, table[op.name].duration, -lag, place[op.name], op.name))
    return _order(problem, [(name, -older) for _, _, older, _, name in sorted(found)])


def _order(problem: LoopProblem, sequence: Sequence[tuple[str, int]]) -> LoopOrder:
    table = problem.table
    takers = {pool: {h.first for h in problem.holds if h.pool == pool} for pool in problem.pools}
    engines = dict.fromkeys(op.engine for op in problem.ops)
    return LoopOrder(
        {e: tuple(step for step in sequence if table[step[0]].engine == e) for e in engines},
        {pool: tuple(s for s in sequence if s[0] in takers[pool]) for pool in problem.pools},
    )


def expand(problem: LoopProblem, schedule: ModuloSchedule, iterations: int) -> tuple[Run, ...]:
    """All runs of the first ``iterations`` iterations, by start; the first starts at 0."""
    origin = min(schedule.starts.values())
    runs = [
        Run(op.name, i, start, start + op.duration)
        for op in problem.ops
        for i in range(iterations)
        for start in [schedule.starts[op.name] - origin + i * schedule.period]
    ]
    return tuple(sorted(runs, key=_by_start(problem)))


def makespan(runs: Iterable[Run]) -> int:
    """The tick at which the last run ends; 0 without runs."""
    return max((run.end for run in runs), default=0)


def replay(
    problem: LoopProblem, order: LoopOrder, iterations: int, durations: Durations | None = None
) -> tuple[Run, ...]:
    """Runs ``iterations`` iterations in ``order``, each op as early as the order, its dependences
    and the pools let it; ``durations`` gives other ticks for an op of an iteration. Raises
    ValueError naming the ops that wait for each other."""
    steps = [step for found in (order.engines, order.pools) for s in found.values() for step in s]
    lags = [lag for _, lag in steps]
    periods = range(min(lags), iterations + max(lags))

    def unroll(sequence: Sequence[tuple[str, int]]) -> list[Instance]:
        found = [(name, n - lag) for n in periods for name, lag in sequence]
        return [instance for instance in found if 0 <= instance[1] < iterations]

    engines = {engine: unroll(sequence) for engine, sequence in order.engines.items()}
    pools = {pool: unroll(sequence) for pool, sequence in order.pools.items()}
    return _in_order(problem, engines, pools, durations)


def compact(
    problem: LoopProblem, expanded: Iterable[Run], durations: Durations | None = None
) -> tuple[Run, ...]:
    """``expanded`` with every run as early as possible, each engine's order and the order in which
    each pool's units are taken kept; raises ValueError as ``replay`` does."""
    sequence = [run[:2] for run in sorted(expanded, key=_by_start(problem))]
    order = _order(problem, sequence)
    return _in_order(problem, order.engines, order.pools, durations)


def _by_start(problem: LoopProblem) -> Callable[[Run], tuple[int, int, int, int]]:
    place = ranks(problem)
    return lambda run: (run.start, run.end - run.start, run.iteration, place[run.op])


def _in_order(
    problem: LoopProblem,
    engines: Mapping[str, Sequence[Instance]],
    pools: Mapping[str, Sequence[Instance]],
    durations: Durations | None,
) -> tuple[Run, ...]:
    clock = LoopClock(problem, [step for found in engines.values() for step in found], durations)
    queues = [deque(found) for found in engines.values()]
    lines = {pool: deque(found) for pool, found in pools.items()}

    def start(queue: deque[Instance]) -> bool:
        if not queue or not clock.can_start(queue[0]):
            return False
        wanted = [lines[pool] for pool in clock.needs(queue[0])]
        if any(line[0] != queue[0] for line in wanted):
            return False
        for line in wanted:
            line.popleft()
        clock.start(queue.popleft())
        return True

    while any(queues):
        if not any([start(queue) for queue in queues]) and clock.advance() is None:
            heads = [queue[0] for queue in queues if queue]
            turns = [line[0] for line in lines.values() if line]
            raise ValueError(
                "this order never ends; "
                + "; ".join(
                    f"{x!r} of iteration {i} waits for {clock.blocker((x, i))}" for x, i in heads
                )
                + f"; next to take units: {turns}"
            )
    return tuple(sorted(clock.runs, key=lambda run: (run.start, run.end, run.iteration, run.op)))


class LoopClock:
    """A finite loop as time passes: what has ended, what is held and which ops could start. Which
    of them do start, and when, is the caller's choice."""

    def __init__(
        self,
        problem: LoopProblem,
        instances: Iterable[Instance],
        durations: Durations | None = None,
    ) -> None:
        table = self._table = problem.table
        self.now, self.runs = 0, list[Run]()
        self._ticks = durations or (lambda name, _: table[name].duration)
        self._free, self._busy = dict(problem.pools), set[str]()
        self._ends: list[tuple[int, Instance]] = []
        self._releases: list[tuple[int, Instance]] = []
        self._waits = dict.fromkeys(instances, 0)
        self._behind: dict[Instance, list[Instance]] = {}
        for name, i in self._waits:
            for earlier, distance in table[name].after:
                if (earlier, i - distance) in self._waits:
                    self._waits[name, i] += 1
                    self._behind.setdefault((earlier, i - distance), []).append((name, i))
        self._needs: dict[str, dict[str, int]] = {name: {} for name in table}
        self._kept: dict[Instance, list[_Held]] = {}
        for hold in problem.holds:
            needs = self._needs[hold.first]
            needs[hold.pool] = needs.get(hold.pool, 0) + hold.units
            for name, i in self._waits:
                if name == hold.first:
                    last = {(x, i + d) for x, d in hold.last} & self._waits.keys()
                    parts = last | {(name, i)}
                    held = _Held(hold.pool, hold.units, len(parts))
                    for part in parts:
                        self._kept.setdefault(part, []).append(held)

    def needs(self, instance: Instance) -> Mapping[str, int]:
        """The units of each pool that an op takes when it starts."""
        return self._needs[instance[0]]

    def waiting(self, instance: Instance) -> bool:
        """Whether an op that comes before this one has not ended."""
        return self._waits[instance] > 0

    def can_start(self, instance: Instance) -> bool:
        """Whether nothing but the caller's choice keeps an op from starting now."""
        return self.blocker(instance) is None

    def blocker(self, instance: Instance) -> str | None:
        """What keeps an op from starting now, in words."""
        if self._waits[instance]:
            return "an op before it"
        if self._table[instance[0]].engine in self._busy:
            return "its engine"
        for pool, units in self._needs[instance[0]].items():
            if units > self._free[pool]:
                return f"{units} units of {pool!r}, {self._free[pool]} free"
        return None

    def start(self, instance: Instance) -> None:
        """Starts an op that can start."""
        name, i = instance
        end = self.now + self._ticks(name, i)
        for pool, units in self._needs[name].items():
            self._free[pool] -= units
        self._busy.add(self._table[name].engine)
        self.runs.append(Run(name, i, self.now, end))
        heapq.heappush(self._ends, (end, instance))
        if instance in self._kept:
            heapq.heappush(self._releases, (max(end, self.now + 1), instance))

    def advance(self) -> list[Instance] | None:
        """Moves on to the next end of an op or of a hold, and returns the ops that no longer wait
        for any other; None if nothing runs."""
        if not self._ends and not self._releases:
            return None
        self.now = min(queue[0][0] for queue in (self._ends, self._releases) if queue)
        while self._releases and self._releases[0][0] == self.now:
            for held in self._kept[heapq.heappop(self._releases)[1]]:
                held.left -= 1
                if not held.left:
                    self._free[held.pool] += held.units
        ready = []
        while self._ends and self._ends[0][0] == self.now:
            ended = heapq.heappop(self._ends)[1]
            self._busy.remove(self._table[ended[0]].engine)
            for later in self._behind.get(ended, ()):
                self._waits[later] -= 1
                if not self._waits[later]:
                    ready.append(later)
        return ready


@dataclass(slots=True)
class _Held:
    """One hold of one iteration; ``left`` ops still have to end."""

    pool: str
    units: int
    left: int
