"""Modulo scheduling with CP-SAT: the shortest period of a loop on engines with finite buffers.

N copies of the body, the period T a variable, s_x the start of op x in copy 0 (all in ticks):

    copies       t_xl = s_x + l T                                 l = 0 .. N-1
    engines      no two of [t_xl, t_xl + p_x) overlap
    dependences  s_v + d T >= s_u + p_u                           (u, d) in v.after
    holds        s_first + len >= s_x + d T + p_x, and len <= floor(capacity / units) T
    pools        sum of units over [t_first,l, t_first,l + len) <= capacity
                 sum of units * len <= capacity * T
    chains       s_x <= s_y, in one iteration
    objective    min T, from the bounds of ``period_bounds`` up

Copies meet in this model if they are fewer than N iterations apart. Inside a window of W periods
(s_x + p_x <= W T) and with enough copies those are all that can meet, so every solution is a
schedule; without a window, every schedule is a solution. Starting everything later by the same
ticks changes nothing, so without a window one op is *anchored*: it starts at a fixed tick. That is
what lets CP-SAT prove anything: every other start gets a domain of a few periods around it.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from ortools.sat.python import cp_model

from dovetail.solvers.loop_problem import Hold, LoopProblem, ModuloSchedule, release

# Without a window, conflicts of several copies may take a hundred times the seconds that CP-SAT's
# deterministic time counts; so many per unit of it are left to a body of one op.
_CONFLICTS = 10_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What one solve gave: perhaps a schedule, a bound for its model, the work that it took, and
    whether the model is proved to have no solution."""

    schedule: ModuloSchedule | None
    bound: int
    work: float
    impossible: bool = False


class ModuloModel:
    """The model of this file's text, for periods from ``low`` to ``high``; ``window`` is a number
    of periods, or None for none."""

    def __init__(
        self, problem: LoopProblem, copies: int, window: int | None, low: int, high: int
    ) -> None:
        self._problem, self._table, self._copies = problem, problem.table, copies
        # The anchor is in the middle, since ops may start that much before it or after it.
        reach = window * high if window else _horizon(problem, high)
        self._horizon = reach if window else 2 * reach
        self._anchor = None if window else (_anchor(problem), reach)
        self._most = self._horizon + (copies + 1) * high
        self._model = model = cp_model.CpModel()
        self._period = model.new_int_var(low, high, "T")
        names = list(self._table)
        self._starts = {x: model.new_int_var(0, self._horizon, f"s_{x}") for x in names}
        self._copied = {(x, 0): start for x, start in self._starts.items()}
        for x in names:
            for copy in range(1, copies):
                start = model.new_int_var(0, self._most, f"t_{x}_{copy}")
                model.add(start == self._starts[x] + copy * self._period)
                self._copied[x, copy] = start
        if self._anchor:
            name, tick = self._anchor
            model.add(self._starts[name] == tick)
        self._lengths = [model.new_int_var(1, self._most, f"len_{h.first}") for h in problem.holds]
        self._ends: dict[tuple[int, int], cp_model.IntVar] = {}
        self._add_ops(window)
        self._add_holds()
        model.minimize(self._period)

    def _add_ops(self, window: int | None) -> None:
        model, starts, table, period = self._model, self._starts, self._table, self._period
        engines: dict[str, list[cp_model.IntervalVar]] = {}
        for op in self._problem.ops:
            if window is not None:
                model.add(starts[op.name] + op.duration <= window * period)
            for u, distance in op.after:
                model.add(starts[op.name] + distance * period >= starts[u] + table[u].duration)
            for copy in range(self._copies):
                start = self._copied[op.name, copy]
                interval = model.new_fixed_size_interval_var(start, op.duration, "")
                engines.setdefault(op.engine, []).append(interval)
        for intervals in engines.values():
            model.add_no_overlap(intervals)
        for chain in self._problem.chains:
            for x, y in pairwise(chain):
                # Two ops of one engine that start in order also run in order.
                ticks = table[x].duration if table[x].engine == table[y].engine else 0
                model.add(starts[y] >= starts[x] + (ticks if table[y].duration else 0))

    def _add_holds(self) -> None:
        model, table, period = self._model, self._table, self._period
        used: dict[str, list[tuple[int, Hold]]] = {}
        for h, hold in enumerate(self._problem.holds):
            used.setdefault(hold.pool, []).append((h, hold))
            length = self._lengths[h]
            model.add(length >= max(1, table[hold.first].duration))
            for x, distance in hold.last:
                end = self._starts[x] + distance * period + max(1, table[x].duration)
                model.add(self._starts[hold.first] + length >= end)
            model.add(length <= self._problem.pools[hold.pool] // hold.units * period)
        for pool, found in used.items():
            capacity = self._problem.pools[pool]
            intervals, units = [], []
            for h, hold in found:
                for copy in range(self._copies):
                    end = self._ends[h, copy] = model.new_int_var(0, 2 * self._most, "")
                    start = self._copied[hold.first, copy]
                    intervals.append(model.new_interval_var(start, self._lengths[h], end, ""))
                    units.append(hold.units)
            model.add_cumulative(intervals, units, capacity)
            held = sum(hold.units * self._lengths[h] for h, hold in found)
            model.add(held <= capacity * period)

    def hint(self, schedule: ModuloSchedule) -> None:
        """Gives CP-SAT a schedule to begin with, complete to the last variable."""
        model, period, origin = self._model, schedule.period, min(schedule.starts.values())
        if self._anchor:
            origin = schedule.starts[self._anchor[0]] - self._anchor[1]
        starts = {x: start - origin for x, start in schedule.starts.items()}
        model.add_hint(self._period, period)
        for (x, copy), variable in self._copied.items():
            model.add_hint(variable, starts[x] + copy * period)
        for h, hold in enumerate(self._problem.holds):
            end = release(self._table, hold, starts, period)
            model.add_hint(self._lengths[h], end - starts[hold.first])
            for copy in range(self._copies):
                model.add_hint(self._ends[h, copy], end + copy * period)

    def solve(self, work: float, workers: int) -> Answer:
        """Runs CP-SAT for at most ``work``, in its deterministic units."""
        solver = cp_model.CpSolver()
        solver.parameters.max_deterministic_time = work
        # Proofs take fewer conflicts without this kind of reasoning.
        solver.parameters.use_precedences_in_disjunctive_constraint = not self._anchor
        if self._anchor and self._copies > 1:
            most = ceil(work * _CONFLICTS / len(self._table) ** 2)
            solver.parameters.max_number_of_conflicts = most
        solver.parameters.random_seed = 0
        solver.parameters.num_workers = workers
        # Workers that take turns give the same answer every time.
        solver.parameters.interleave_search = workers > 1
        status = solver.solve(self._model)
        assert status != cp_model.MODEL_INVALID, self._model.validate()
        spent = solver.response_proto.deterministic_time
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN):
            return Answer(None, 0, spent, impossible=status == cp_model.INFEASIBLE)
        bound = ceil(solver.best_objective_bound - 1e-6)
        if status == cp_model.UNKNOWN:
            return Answer(None, bound, spent)
        starts = {x: solver.value(start) for x, start in self._starts.items()}
        return Answer(ModuloSchedule(solver.value(self._period), starts), bound, spent)


def _anchor(problem: LoopProblem) -> str:
    """The op that others depend on the most, and that depends on most others."""
    ties = Counter(u for op in problem.ops for u, _ in op.after)
    return max(problem.ops, key=lambda op: (ties[op.name] + len(op.after), op.duration)).name


def _horizon(problem: LoopProblem, high: int) -> int:
    """A tick by which every op of iteration 0 of some best schedule has started, if its period is
    at most ``high``.

    Dependences and holds tie ops to each other; take the groups whose members are tied both ways.
    Moving a whole group a period earlier keeps every engine and pool as it is, so some best
    schedule has each group within a period of what it waits for. Inside a group, a dependence at
    distance d spans at most d periods, and a hold at most floor(capacity / units) + d.
    """
    reach = {op.name: 0 for op in problem.ops}
    for op in problem.ops:
        for _, distance in op.after:
            reach[op.name] = max(reach[op.name], distance)
    for hold in problem.holds:
        most = problem.pools[hold.pool] // hold.units
        for x, distance in hold.last:
            reach[hold.first] = max(reach[hold.first], most + distance)
            reach[x] = max(reach[x], most + distance)
    return sum((reach[op.name] + 1) * high + op.duration for op in problem.ops)
