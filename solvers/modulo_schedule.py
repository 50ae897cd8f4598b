"""The periodic schedule of a loop on engines with finite buffers, with a bound on its period.

List scheduling first; where that meets the bounds, nothing more is done. Otherwise the model of
modulo_model.py is solved without a window, where the optimum bounds every schedule from below, and
is itself one if the checker says so: first with one copy, a small problem that often proves all
there is to prove, then with more. In between it is solved in a window of N periods, where every
answer is a schedule.
"""

import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from dovetail.solvers.list_schedule import (
    best_listed,
    blamed,
    blocked_pools,
    infeasible,
)
from dovetail.solvers.loop_bounds import lowest_period
from dovetail.solvers.loop_problem import LoopProblem, ModuloSchedule, check, check_problem
from dovetail.solvers.modulo_model import Answer, ModuloModel
from dovetail.solvers.retime import retime
from dovetail.solvers.solved import Solved

# Copies beyond this many cost more than they tell, and beyond few they seldom tell more.
_MOST_COPIES, _FEW_COPIES = 6, 3
# Shares of the work that is left, first for the bound of one copy, then for finding schedules.
_FIRST_SHARE, _WINDOW_SHARE = 0.2, 0.6


def solve(
    problem: LoopProblem,
    work: float = 10.0,
    workers: int = 1,
    start: ModuloSchedule | None = None,
    enough: float = 0.0,
) -> Solved[ModuloSchedule]:
    """The schedule of the shortest period that is found within ``work``, in CP-SAT's deterministic
    units, about seconds of one core; ``start`` is a legal schedule that it must not be worse than.
    A period that is proved to be within ``enough`` (a share) of the shortest ends the search.

    ``objective`` is the period and ``bound`` what no schedule can beat, both in ticks. With one or
    two ``workers``, bounds of hard bodies stay weak; eight run more kinds of search, in turns, so
    that results repeat, and take several times the seconds per unit of work. Where no schedule
    exists, ``value.blocked`` names the pools. Raises ValueError for a bad problem, RuntimeError if
    ``work`` yields neither schedule nor proof.
    """
    begin = time.perf_counter()
    check_problem(problem)
    low = lowest_period(problem)
    found = best_listed(problem, low) or _any_schedule(problem, work, workers)
    if found is None:
        blocked = blocked_pools(problem) or _blocked(problem, work, workers)
        return infeasible(blocked, time.perf_counter() - begin)
    search = _Search(problem, found, low, work, workers, enough)
    if start is not None and start.period < found.period and not check(problem, start):
        search.offer(start)
    if search.open:
        search.run()
    return _solved(search.best, search.bound, time.perf_counter() - begin)


def _solved(best: ModuloSchedule, bound: float, seconds: float) -> Solved[ModuloSchedule]:
    proved = best.period == bound
    return Solved(best, best.period, bound, "optimal" if proved else "feasible", seconds)


def pareto(
    problem: LoopProblem,
    pool: str,
    capacities: Iterable[int],
    work: float = 10.0,
    workers: int = 1,
) -> dict[int, Solved[ModuloSchedule]]:
    """``solve`` for each capacity of ``pool``, in units. A schedule for less room serves where
    there is more, and a bound for more room holds where there is less."""
    found: dict[int, Solved[ModuloSchedule]] = {}
    start: ModuloSchedule | None = None
    for capacity in sorted(set(capacities)):
        roomier = replace(problem, pools={**problem.pools, pool: capacity})
        found[capacity] = solve(roomier, work, workers, start)
        if found[capacity].status != "infeasible":
            start = found[capacity].value
    bound = 0.0
    for capacity in sorted(found, reverse=True):
        solved = found[capacity]
        if solved.bound is not None:
            bound = max(bound, solved.bound)
            found[capacity] = _solved(solved.value, bound, solved.seconds)
    return found


class _Search:
    """The best schedule and the best bound so far, and the work that is left."""

    def __init__(
        self,
        problem: LoopProblem,
        best: ModuloSchedule,
        bound: int,
        work: float,
        workers: int,
        enough: float,
    ) -> None:
        self.problem, self.best, self.bound = problem, best, bound
        self._work, self._workers, self._enough = work, workers, enough
        # The list schedule keeps every chain, so it is a hint that the model accepts.
        self._hint = best
        self._reach = max((d for hold in problem.holds for _, d in hold.last), default=0)

    def offer(self, schedule: ModuloSchedule) -> None:
        """Takes a legal schedule that is no worse than the best."""
        self.best, starts = schedule, schedule.starts
        pairs = [pair for chain in self.problem.chains for pair in pairwise(chain)]
        if all(starts[x] <= starts[y] for x, y in pairs):
            self._hint = schedule

    def run(self) -> None:
        """Looks for bounds, for schedules in a window, and for bounds again."""
        self._prove(1, self.best.period - 1, self._work * _FIRST_SHARE)
        if self.open:
            copies = max(2, _stages(self.problem, self._hint))
            model = self._model(copies + self._reach, copies, self.best.period)
            if self._hint.period == self.best.period:
                model.hint(self._hint)
            self._take(model.solve(self._work * _WINDOW_SHARE, self._workers))
        for copies in range(2, 1 + (_FEW_COPIES if self._enough else _MOST_COPIES)):
            if not self.open or self._work <= 0:
                break
            # The most that may still be beaten by more than does not matter.
            high = min(self.best.period - 1, int(self.best.period / (1 + self._enough)))
            self._prove(copies + self._reach, high, self._work)

    @property
    def open(self) -> bool:
        """Whether a schedule may be shorter than the best by more than does not matter."""
        return self.best.period > self.bound * (1 + self._enough)

    def _prove(self, copies: int, high: int, work: float) -> None:
        """Tries to prove that no period is ``high`` or less; what is found instead may be a
        schedule."""
        if high < self.bound:
            return
        answer = self._model(copies, None, high).solve(work, self._workers)
        self.bound = max(self.bound, high + 1 if answer.impossible else answer.bound)
        self._take(answer)

    def _model(self, copies: int, window: int | None, high: int) -> ModuloModel:
        return ModuloModel(self.problem, copies, window, self.bound, high)

    def _take(self, answer: Answer) -> None:
        self._work -= answer.work
        if answer.schedule is not None and not check(self.problem, answer.schedule):
            found = retime(self.problem, answer.schedule, self.bound) or answer.schedule
            if found.period <= self.best.period:
                self.offer(found)


def _any_schedule(problem: LoopProblem, work: float, workers: int) -> ModuloSchedule | None:
    """Some schedule, or None if it is proved that there is none; RuntimeError if neither.

    Run the ops of any schedule one at a time, in the order in which they start: whatever had ended
    before an op started still has. So if there is a schedule, there is one at this period.
    """
    if blocked_pools(problem):
        return None
    period = sum(max(1, op.duration) for op in problem.ops)
    reach = max((d for hold in problem.holds for _, d in hold.last), default=0)
    for copies in range(2, _MOST_COPIES + 1):
        answer = ModuloModel(problem, copies + reach, None, period, period).solve(work, workers)
        if answer.impossible:
            return None
        if answer.schedule is not None and not check(problem, answer.schedule):
            return retime(problem, answer.schedule)
    raise RuntimeError(
        "no schedule of this loop was found, and no proof that there is none; raise work above "
        f"{work} or give more units than {dict(problem.pools)}"
    )


def _blocked(problem: LoopProblem, work: float, workers: int) -> tuple[str, ...]:
    """The pools to blame where ``_any_schedule`` has proved that there is no schedule."""

    def hopeless(some: LoopProblem) -> bool:
        return some is problem or _any_schedule(some, work, workers) is None

    return blamed(problem, hopeless)


def _stages(problem: LoopProblem, schedule: ModuloSchedule) -> int:
    """How many periods an iteration of ``schedule`` takes, rounded up."""
    ends = [schedule.starts[op.name] + op.duration for op in problem.ops]
    return -(-(max(ends) - min(schedule.starts.values())) // schedule.period)
