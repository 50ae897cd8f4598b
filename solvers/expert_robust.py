"""Shares that serve several load scenarios at once, for replicas that are where they are.

    minimise t   with  sum_e w[s,e] f[e,g] <= t mean[s]   for every scenario s and device g
                       sum_g f[e,g] = 1,  f[e,g] > 0 only where e is held

A linear program (GLOP). Its duals y[s,g] >= 0, summing to 1, are the proof: no shares are below
sum_e min over holders g of e of sum_s y[s,g] w[s,e] / mean[s].
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ortools.linear_solver import pywraplp

from dovetail.solvers.solved import Solved

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ScenarioSplit:
    """``shares[expert, device]``, and the ``prices[scenario, device]`` that prove them best."""

    shares: Floats
    prices: Floats


def relative(loads: Floats, devices: int) -> Floats:
    """``loads[..., expert]`` in units of the mean device's load; 0 where nothing is loaded."""
    total = loads.sum(-1, keepdims=True)
    return np.asarray(np.where(total > 0, loads / np.maximum(total, 1e-300) * devices, 0.0))


def robust_split(loads: Floats, held: Bools) -> Solved[ScenarioSplit]:
    """Shares for ``loads[scenario, expert]`` where ``held[expert, device]``; the objective is the
    worst scenario's heaviest device over its mean."""
    begin = time.perf_counter()
    ratio = relative(loads, held.shape[1])
    solver = pywraplp.Solver.CreateSolver("GLOP")
    worst = solver.NumVar(0, solver.infinity(), "t")
    solver.Minimize(worst)
    rows = [[solver.Constraint(-solver.infinity(), 0) for _ in range(held.shape[1])] for _ in ratio]
    for row in rows:
        for constraint in row:
            constraint.SetCoefficient(worst, -1)
    shares = held / held.sum(1, keepdims=True)
    free = {}
    for e in np.flatnonzero(ratio.any(0)):
        whole = solver.Constraint(1, 1)
        for g in np.flatnonzero(held[e]):
            free[e, g] = part = solver.NumVar(0, 1, "")
            whole.SetCoefficient(part, 1)
            for s, row in enumerate(rows):
                row[g].SetCoefficient(part, float(ratio[s, e]))
    status = solver.Solve()
    assert status == pywraplp.Solver.OPTIMAL, status
    for (e, g), part in free.items():
        shares[e, g] = max(0.0, part.solution_value())
    shares /= shares.sum(1, keepdims=True)
    prices = np.array([[max(0.0, -c.dual_value()) for c in row] for row in rows])
    prices /= max(float(prices.sum()), 1e-300)
    value, bound = float((ratio @ shares).max()), price_bound(ratio, held, prices)
    best = "optimal" if value - bound <= 1e-6 * value else "feasible"
    seconds = time.perf_counter() - begin
    return Solved(ScenarioSplit(shares, prices), value, bound, best, seconds)  # type: ignore[arg-type]


def price_bound(ratio: Floats, held: Bools, prices: Floats) -> float:
    """What no shares are below, by any ``prices`` that sum to 1."""
    worth = ratio.T @ prices
    return float(np.where(held, worth, np.inf).min(1).sum())


def check(loads: Floats, held: Bools, solved: Solved[ScenarioSplit]) -> list[str]:
    """What is wrong with an answer of ``robust_split``; empty if shares and proof hold."""
    shares, prices, problems = solved.value.shares, solved.value.prices, []
    ratio = relative(loads, held.shape[1])
    if (shares < -1e-12).any() or (np.abs(shares.sum(1) - 1) > 1e-9).any():
        problems.append("shares of an expert are negative or do not sum to 1")
    if (shares[~held] != 0).any():
        problems.append("a device serves an expert that it does not hold")
    if abs(value := float((ratio @ shares).max()) - solved.objective) > 1e-9:
        problems.append(f"the worst ratio is off by {value} from {solved.objective}")
    if ratio.any() and ((prices < 0).any() or abs(prices.sum() - 1) > 1e-9):
        problems.append("prices are negative or do not sum to 1")
    elif solved.bound is None or solved.bound > price_bound(ratio, held, prices) + 1e-9:
        problems.append(f"the prices do not prove the bound {solved.bound}")
    return problems
