"""Fewest copies of experts after which no device exceeds a limit: proved, by budget and cuts.

    minimise  sum over (e,g) not held now of z[e,g]     z[e,g]: device g holds expert e
    with      sum_e z[e,g] <= capacity[g],   sum_g z[e,g] >= 1,
              sum_e w[e] [e is held only inside D] <= limit |D|      for every set D of devices

The last line is Hall's condition: it holds just where shares exist that keep every device within
the limit (expert_split.py), so that shares need no variables. It starts with single devices; sets
that an answer violates are added. The number of copies is not minimised but set to 0, 1, 2, ...:
few copies propagate strongly, and every number that is refuted raises the bound.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from dovetail.solvers.expert_split import split
from dovetail.solvers.solved import Solved

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_UNITS = 100_000_000
_CUTS_AT_ONCE = 8
_ENUMERATED = 10
"""Up to this many devices all their sets are looked at; beyond, those that set the loads."""


@dataclass(slots=True)
class _Effort:
    """Deterministic work that is left, and the most for one question."""

    left: float
    each: float


def fewest_copies(
    loads: Floats,
    now: Bools,
    capacity: Ints,
    limit: float,
    work: float = 20.0,
    free: Bools | None = None,
) -> Solved[Bools]:
    """Who holds what (``[expert, device]``) after the fewest copies from ``now`` that let shares
    keep every device at ``limit`` or below.

    ``free[device]`` restricts copies to some devices; the answer is then the best of those only,
    and ``bound`` is 0. ``work`` is CP-SAT's deterministic time, about seconds of a core. Loads are
    rounded to 1e-8 of their sum. Where nothing within ``work`` keeps the limit,
    ``value`` is ``now`` and the status ``infeasible`` (``bound`` copies at least are needed).
    """
    begin = time.perf_counter()
    units = np.rint(loads / max(loads.sum(), 1e-300) * _UNITS).astype(np.int64)
    # Rounding may add up to half a unit an expert; without that slack it could refute an answer.
    room = int(limit / max(loads.sum(), 1e-300) * _UNITS) + len(loads) // 2 + 1
    model = _Model(units, now, capacity, room, free)
    effort = _Effort(work, work / 5)
    held, bound = _search(model, effort)
    bound = bound if free is None else 0
    seconds = time.perf_counter() - begin
    if held is None:
        return Solved(now, float("inf"), bound, "infeasible", seconds)
    copies = int((held & ~now).sum())
    return Solved(held, copies, bound, "optimal" if copies == bound else "feasible", seconds)


def _search(model: "_Model", effort: _Effort) -> tuple[Bools | None, int]:
    """Budgets upwards; past the first open question in growing steps, for more room makes an
    answer easier to find, and from there downwards again."""
    budget, bound = 0, 0
    best: Bools | None = None
    while best is None and budget <= model.now.size and effort.left > 0:
        best, refuted = model.within(budget, effort)
        if refuted and budget == bound:
            bound = budget + 1
        budget += 1 + 2 * max(0, budget - bound)
    while best is not None and (copies := int((best & ~model.now).sum())) > bound:
        fewer, refuted = model.within(copies - 1, effort)
        if fewer is None:
            return best, copies if refuted else bound
        best = fewer
    return best, bound


def check(
    loads: Floats, now: Bools, capacity: Ints, limit: float, solved: Solved[Bools]
) -> list[str]:
    """What is wrong with an answer of ``fewest_copies``; empty if it keeps every rule."""
    held, problems = solved.value, []
    if not held.any(1).all():
        problems.append("an expert has no device")
    if (held.sum(0) > capacity).any():
        problems.append("a device holds more than its slots")
    if (copies := int((held & ~now).sum())) != solved.objective:
        problems.append(f"{copies} copies, not {solved.objective}")
    elif solved.bound is not None and copies < solved.bound:
        problems.append(f"{copies} copies are fewer than the bound {solved.bound}")
    if not problems and (worst := split(loads, held).objective) > limit * (1 + 1e-4):
        problems.append(f"the heaviest device has {worst}, the limit is {limit}")
    return problems


class _Model:
    """The CP-SAT model, its cuts, and the last answer as the next hint."""

    def __init__(
        self, units: Ints, now: Bools, capacity: Ints, room: int, free: Bools | None
    ) -> None:
        self.units, self.now, self.room = units, now, room
        self.model = cp_model.CpModel()
        self.z = [
            [
                self._variable(bool(now[e, g]), free is None or bool(free[g]))
                for g in range(now.shape[1])
            ]
            for e in range(now.shape[0])
        ]
        for row in self.z:
            self.model.add_bool_or(row)
        for g, column in enumerate(zip(*self.z, strict=True)):
            self.model.add(sum(column) <= int(capacity[g]))
        pairs = list(np.ndindex(*now.shape))
        self.copies = sum(self.z[e][g] for e, g in pairs if not now[e, g])
        drops = sum(1 - self.z[e][g] for e, g in pairs if now[e, g])
        self.budget = self.model.new_int_var(0, now.size, "budget")
        # Dropping more than is copied makes no room that is needed: slots were enough before.
        self.model.add(self.copies <= self.budget)
        self.model.add(drops <= self.budget)
        self.cuts: set[frozenset[int]] = set()
        for g in range(now.shape[1]):
            self._cut(frozenset([g]))
        self.hint = now

    def _variable(self, now: bool, free: bool) -> cp_model.IntVar:
        variable = self.model.new_bool_var("")
        if not free:
            self.model.add(variable == now)
        return variable

    def _cut(self, devices: frozenset[int]) -> None:
        """Experts held only inside ``devices`` fit into them."""
        if devices in self.cuts:
            return
        self.cuts.add(devices)
        outside = [g for g in range(self.now.shape[1]) if g not in devices]
        terms = []
        for e, row in enumerate(self.z):
            if self.units[e]:
                inside = self.model.new_bool_var("")
                self.model.add_bool_or([inside, *(row[g] for g in outside)])
                terms.append(int(self.units[e]) * inside)
        self.model.add(sum(terms) <= self.room * len(devices))

    def within(self, budget: int, effort: _Effort) -> tuple[Bools | None, bool]:
        """An answer of at most ``budget`` copies, or None and whether it is proved that none is."""
        domain = self.model.proto.variables[self.budget.index].domain
        domain[0], domain[1] = 0, budget
        # The cuts are knapsacks: full linear relaxations refute more of them, but not all.
        level = 2
        while effort.left > 0:
            solver, status = self._solve(min(effort.each, effort.left), level)
            effort.left -= solver.response_proto.deterministic_time
            if status == cp_model.INFEASIBLE:
                return None, True
            if status == cp_model.UNKNOWN:
                if level == 1:
                    return None, False
                level = 1
                continue
            held = np.array([[solver.boolean_value(z) for z in row] for row in self.z])
            violated = self._violated(held)
            if not violated:
                return held, False
            for devices in violated:
                self._cut(devices)
            self.hint = held
        return None, False

    def _solve(self, work: float, level: int) -> tuple[cp_model.CpSolver, cp_model.CpSolverStatus]:
        self.model.clear_hints()  # type: ignore[no-untyped-call]
        for (e, g), held in np.ndenumerate(self.hint):
            self.model.add_hint(self.z[e][g], bool(held))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 1
        solver.parameters.linearization_level = level
        solver.parameters.max_deterministic_time = work
        return solver, solver.solve(self.model)

    def _violated(self, held: Bools) -> list[frozenset[int]]:
        """Sets of devices that cannot carry what only they hold, worst first; none if shares exist
        within the room (up to its rounding)."""
        if split(self.units.astype(float), held).objective <= self.room * (1 + 1e-9):
            return []
        return overloaded_sets(self.units, held, self.room)[:_CUTS_AT_ONCE]


def overloaded_sets(units: Ints, held: Bools, room: int) -> list[frozenset[int]]:
    """Sets of devices whose own experts exceed ``room`` per device, most first."""
    devices = held.shape[1]
    if devices > _ENUMERATED:
        return _overloaded_levels(units, held, room)
    holders = held @ (1 << np.arange(devices))
    inside = np.bincount(holders, weights=units, minlength=1 << devices)
    sets = np.arange(1 << devices)
    for g in range(devices):
        with_g = sets[(sets >> g & 1) == 1]
        inside[with_g] += inside[with_g ^ (1 << g)]
    excess = inside / np.maximum(np.bitwise_count(sets), 1) - room
    worst = np.argsort(-excess, kind="stable")[: int((excess > 1e-9 * room).sum())]
    return [frozenset(g for g in range(devices) if s >> g & 1) for s in worst.tolist()]


def _overloaded_levels(units: Ints, held: Bools, room: int) -> list[frozenset[int]]:
    """The tightest set, then the tightest of what is outside of it with it, and so on."""
    found: list[frozenset[int]] = []
    inside: frozenset[int] = frozenset()
    loads = units.astype(float)
    while len(inside) < held.shape[1]:
        outside = [g for g in range(held.shape[1]) if g not in inside]
        left = loads * (held[:, outside].any(1))
        reachable = held[:, outside]
        keep = reachable.any(1)
        part = split(left[keep], reachable[keep])
        if part.objective <= room * (1 + 1e-9):
            break
        own = frozenset(outside[i] for i in part.value.tight)
        inside |= own
        found += [own, inside] if own != inside else [own]
    return found
