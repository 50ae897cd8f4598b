"""Which of a layer's experts the CPU computes, when each one's load is known.

    minimise    max( Σ_{e on the CPU} cpu_e ,  end of the GPU's last expert )

The GPU's experts that it does not hold are copied one after the other and computed in the order of
their copies, a flow shop of two machines in which Johnson's order (1954) is best for every choice
of experts. With y_e = 1 on the GPU and experts numbered in that order, its end is the greatest of

    Σ_{i <= k} copy_i y_i + Σ_{i >= k} gpu_i y_i     over all k,

so the problem is a linear program in whole y, which CP-SAT proves. ``greedy`` is the rule of
HybriMoE (arXiv 2504.05897): the CPU takes the experts of least load; here as many as are best, and
no single expert that changes sides, and no pair that changes places, makes it better.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.solvers.solved import Solved

Floats = NDArray[np.float64]
Sides = tuple[bool, ...]
"""For every expert whether the CPU computes it."""

_TICKS = 10**6
_ROUNDS = 200
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class AssignProblem:
    """Seconds of every expert on the CPU, on the GPU, and of its copy; a copy of 0 seconds is an
    expert that the GPU holds, which stays there."""

    cpu: tuple[float, ...]
    gpu: tuple[float, ...]
    copy: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.cpu) == len(self.gpu) == len(self.copy):
            raise ValueError(
                f"{len(self.cpu)}, {len(self.gpu)} and {len(self.copy)} times: give one of each "
                "for every expert"
            )
        for times in (self.cpu, self.gpu, self.copy):
            if not all(math.isfinite(t) and t >= 0 for t in times):
                raise ValueError(f"times {times}: they must be finite and not negative")

    @property
    def order(self) -> list[int]:
        """Johnson's order: what is copied faster than computed first, by copy; the others by
        falling time on the GPU."""
        keys = [
            (0, copy, i) if copy < gpu else (1, -gpu, i)
            for i, (copy, gpu) in enumerate(zip(self.copy, self.gpu, strict=True))
        ]
        return [i for _, _, i in sorted(keys)]


def makespan(problem: AssignProblem, on_cpu: Sequence[bool]) -> float:
    """Seconds until CPU and GPU have computed their experts."""
    copied = computed = 0.0
    for i in problem.order:
        if not on_cpu[i]:
            copied += problem.copy[i]
            computed = max(computed, copied) + problem.gpu[i]
    on_host = math.fsum(t for t, here in zip(problem.cpu, on_cpu, strict=True) if here)
    return max(on_host, computed)


def check(problem: AssignProblem, on_cpu: Sequence[bool]) -> list[str]:
    """What is wrong with an assignment, in words; empty if it is one."""
    if len(on_cpu) != len(problem.cpu):
        return [f"{len(on_cpu)} sides for {len(problem.cpu)} experts: give one for each"]
    return [
        f"expert {i} is held by the GPU and assigned to the CPU"
        for i, (here, copy) in enumerate(zip(on_cpu, problem.copy, strict=True))
        if here and not copy
    ]


def lower_bound(problem: AssignProblem) -> float:
    """Seconds that no assignment beats: CPU, GPU and link each busy under prices that add up to 1,
    every expert where it costs least at these prices."""
    cpu, gpu, copy = (np.array(t) for t in (problem.cpu, problem.gpu, problem.copy))
    held = copy == 0
    best = 0.0
    for host in _SHARES:
        for link in _SHARES:
            if host + link <= 1 + 1e-12:
                device = max(0.0, 1 - host - link)
                there = device * gpu + link * copy
                each = np.where(held, there, np.minimum(host * cpu, there))
                best = max(best, float(each.sum()))
    return best


def greedy(problem: AssignProblem, rounds: int = _ROUNDS) -> Solved[Sides]:
    """The best number of experts of least load on the CPU, or of greatest, or of the first ones,
    then improved by single moves and swaps, at most ``rounds`` of them."""
    begin = time.perf_counter()
    best, least = _climb(problem, rounds)
    bound = min(least, lower_bound(problem))
    proved = bound >= least * (1 - 1e-9)
    seconds = time.perf_counter() - begin
    return Solved(best, least, bound, "optimal" if proved else "feasible", seconds)


def _climb(problem: AssignProblem, rounds: int) -> tuple[Sides, float]:
    best, least = min(_prefixes(problem), key=lambda found: found[1])
    for _ in range(rounds):
        better = min(_neighbours(problem, best), key=lambda f: f[1], default=(best, least))
        if better[1] >= least * (1 - 1e-12):
            break
        best, least = better
    return best, least


def by_load(problem: AssignProblem) -> tuple[Sides, float]:
    """The best number of experts of least load on the CPU, and the seconds: one pass over experts
    in order of load, for experts whose copies take equally long."""
    movable = [i for i, copy in enumerate(problem.copy) if copy]
    movable.sort(key=lambda i: (problem.gpu[i] + problem.cpu[i], i))
    held = math.fsum(g for g, copy in zip(problem.gpu, problem.copy, strict=True) if not copy)
    heavy = movable[::-1]
    copied = np.cumsum([0.0, *(problem.copy[i] for i in heavy)])
    computed = np.cumsum([0.0, *(problem.gpu[i] for i in heavy)])
    # The latest start of all work from the j-th copy on, had it nothing to wait for.
    starts = np.maximum.accumulate(np.concatenate([[held], copied[1:] - computed[:-1]]))
    on_gpu = computed + starts
    on_cpu = np.cumsum([0.0, *(problem.cpu[i] for i in movable)])[::-1]
    count = int(np.argmin(np.maximum(on_gpu, on_cpu)))
    there = set(heavy[:count])
    sides = tuple(bool(copy) and i not in there for i, copy in enumerate(problem.copy))
    return sides, float(max(on_gpu[count], on_cpu[count]))


def solve(problem: AssignProblem, work: float = 2.0) -> Solved[Sides]:
    """The assignment that takes least, proved by CP-SAT within ``work`` deterministic seconds."""
    # Here, because checking an assignment must not load a solver.
    from ortools.sat.python import cp_model

    begin = time.perf_counter()
    best, least = _climb(problem, _ROUNDS)
    bound = min(least, lower_bound(problem))
    if bound >= least * (1 - 1e-9):
        return Solved(best, least, bound, "optimal", time.perf_counter() - begin)
    scale = _TICKS / least
    cpu, gpu, copy = ([math.floor(t * scale) for t in times] for times in (
        problem.cpu, problem.gpu, problem.copy))  # fmt: skip
    model = cp_model.CpModel()
    here = [model.new_bool_var(f"gpu_{i}") for i in range(len(cpu))]
    span = model.new_int_var(math.floor(bound * scale), _TICKS, "span")
    for i, held in enumerate(problem.copy):
        model.add_hint(here[i], int(not best[i]))
        if not held:
            model.add(here[i] == 1)
    model.add(sum(t * (1 - y) for t, y in zip(cpu, here, strict=True)) <= span)
    order = problem.order
    for k in range(len(order)):
        copies = sum(copy[i] * here[i] for i in order[: k + 1])
        products = sum(gpu[i] * here[i] for i in order[k:])
        model.add(copies + products <= span)
    model.minimize(span)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = work
    status = solver.solve(model)
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = tuple(not solver.value(y) for y in here)
        if makespan(problem, found) < least:
            best, least = found, makespan(problem, found)
        bound = max(bound, solver.best_objective_bound / scale)
    bound = min(bound, least)
    # Times were rounded down to a millionth: an optimum of those is one to that precision.
    proved = status == cp_model.OPTIMAL or bound >= least * (1 - 1e-9)
    faults = check(problem, best)
    assert not faults, faults
    seconds = time.perf_counter() - begin
    return Solved(best, least, bound, "optimal" if proved else "feasible", seconds)


def _prefixes(problem: AssignProblem) -> Iterator[tuple[Sides, float]]:
    movable = [i for i, copy in enumerate(problem.copy) if copy]
    light = sorted(movable, key=lambda i: (problem.cpu[i] + problem.gpu[i], i))
    for order in (light, light[::-1], movable):
        for count in range(len(order) + 1):
            there = set(order[:count])
            sides = tuple(i in there for i in range(len(problem.cpu)))
            yield sides, makespan(problem, sides)


def _neighbours(problem: AssignProblem, sides: Sides) -> Iterator[tuple[Sides, float]]:
    movable = [i for i, copy in enumerate(problem.copy) if copy]
    moves = [(i,) for i in movable]
    swaps = [(i, j) for i in movable for j in movable if sides[i] and not sides[j]]
    for changed in (*moves, *swaps):
        other = tuple(here != (i in changed) for i, here in enumerate(sides))
        yield other, makespan(problem, other)
