"""Affinity placement: alternation and swaps, then CP-SAT on one block at a time as the others are,
or on a small problem whole.

x[b,i,g]  item i of block b on device g:  one g per item, count and limit per device
one block    minimise  sum_{i,g} cost[i,g] x[i,g]                 (generalised assignment)
whole        maximise  sum over edges of W[i,j] (max C - C[g,h]) y,   y <= x[a,i,g], x[b,j,h]
"""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from dovetail.solvers.expert_affinity import (
    AffinityProblem,
    Assignment,
    Block,
    alternate,
    block_costs,
    crossing_cost,
    excess,
    lower_bound,
    start,
    swap,
)
from dovetail.solvers.solved import Solved

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Grid = list[list[cp_model.IntVar]]
_UNITS = 1_000_000
_WHOLE = 3000
"""Products of the whole model up to which it is tried."""
_SLICE = 0.5


def solve(
    problem: AffinityProblem, starts: int = 8, work: float = 10.0, seed: int = 0
) -> Solved[Assignment]:
    """The best of ``starts`` alternations with swaps, then polished block by block with CP-SAT for
    ``work`` (deterministic, about seconds). Small problems are solved whole and proved.

    The status is ``infeasible`` where no answer within the limits was found.
    """
    begin = time.perf_counter()
    found: list[tuple[float, float, int, list[Ints]]] = []
    for number in range(starts):
        x = swap(problem, alternate(problem, start(problem, seed + number)))
        over = sum(excess(b, d) for b, d in zip(problem.blocks, x, strict=True))
        found.append((over, crossing_cost(problem, tuple(x)), number, x))
    x = min(found, key=lambda f: f[:3])[3]
    bound = lower_bound(problem)
    if whole_fits(problem):
        x, bound = solve_whole(problem, x, work, bound)
    else:
        x = polish(problem, x, work)
    value = crossing_cost(problem, tuple(x))
    total = sum(float(b.weight.sum()) for b in problem.blocks)
    over = sum(excess(b, d) for b, d in zip(problem.blocks, x, strict=True))
    seconds = time.perf_counter() - begin
    if over > 1e-6 * total:
        return Solved(tuple(x), value, bound, "infeasible", seconds)
    proved = value <= bound * (1 + 1e-6) + 1e-9
    return Solved(tuple(x), value, min(bound, value), "optimal" if proved else "feasible", seconds)


def polish(problem: AffinityProblem, x: Sequence[Ints], work: float) -> list[Ints]:
    """Blocks in turn, each solved with CP-SAT as the others are and followed by swaps, up and down
    until a round changes nothing or ``work`` is used."""
    x, left = list(x), work
    sweep, changed = 0, True
    while changed and left > 0:
        changed = False
        order = range(len(x)) if sweep % 2 == 0 else range(len(x) - 1, -1, -1)
        for b in order:
            if left <= 0:
                break
            block = problem.blocks[b]
            found, used = _block(block, block_costs(problem, x, b), x[b], min(_SLICE, left))
            left -= used
            if _better(problem, x, b, found):
                x[b], changed = found, True
        if changed:
            x = swap(problem, x)
        sweep += 1
    return x


def _better(problem: AffinityProblem, x: Sequence[Ints], b: int, found: Ints) -> bool:
    block, cost = problem.blocks[b], block_costs(problem, x, b)
    every = np.arange(len(found))
    old = (excess(block, x[b]), float(cost[every, x[b]].sum()))
    new = (excess(block, found), float(cost[every, found].sum()))
    slack = 1e-9 * max(1.0, float(block.weight.sum()))
    if abs(new[0] - old[0]) > slack:
        return new[0] < old[0]
    return new[1] < old[1] - 1e-9 * max(1.0, old[1])


def _block(block: Block, cost: Floats, hint: Ints, work: float) -> tuple[Ints, float]:
    model = cp_model.CpModel()
    x = _grid(model, block)
    span = float(np.ptp(cost)) or 1.0
    units = np.rint((cost - cost.min(1, keepdims=True)) / span * _UNITS).astype(np.int64)
    model.minimize(
        sum(int(units[i, g]) * x[i][g] for i, g in np.ndindex(*cost.shape) if units[i, g])
    )
    for i, g in np.ndindex(*cost.shape):
        model.add_hint(x[i][g], bool(hint[i] == g))
    solver, _ = _solve(model, work)
    used = solver.response_proto.deterministic_time
    return (_devices(solver, x) if solver.response_proto.solution else hint), used


def whole_fits(problem: AffinityProblem) -> bool:
    """Whether the problem is small enough to be solved and proved whole."""
    devices = len(problem.cost)
    same = _same_price(problem)
    return sum(e.flow.size * (devices if same else devices**2) for e in problem.edges) <= _WHOLE


def solve_whole(
    problem: AffinityProblem, hint: Sequence[Ints], work: float, bound: float
) -> tuple[list[Ints], float]:
    """The best devices of every block within ``work``, at least as good as ``hint`` where that
    keeps the limits, and a bound (at least ``bound``)."""
    model = cp_model.CpModel()
    grids = [_grid(model, block) for block in problem.blocks]
    high, devices = float(problem.cost.max()), len(problem.cost)
    scale = _UNITS / max(high * max(float(e.flow.max()) for e in problem.edges), 1e-300)
    gain = []
    for edge in problem.edges:
        for i, j in np.argwhere(edge.flow > 0):
            for g in range(devices):
                for h in range(devices):
                    saved = round(float(edge.flow[i, j]) * (high - problem.cost[g, h]) * scale)
                    if saved > 0:
                        both = model.new_bool_var("")
                        model.add_implication(both, grids[edge.first][i][g])
                        model.add_implication(both, grids[edge.second][j][h])
                        gain.append(saved * both)
    model.maximize(sum(gain))
    for grid, at in zip(grids, hint, strict=True):
        for i, row in enumerate(grid):
            for g, variable in enumerate(row):
                model.add_hint(variable, bool(at[i] == g))
    solver, status = _solve(model, work)
    total = high * sum(float(e.flow.sum()) for e in problem.edges)
    rounding = 0.5 * len(gain) / scale
    low = max(bound, total - solver.best_objective_bound / scale - rounding)
    if not solver.response_proto.solution:
        return list(hint), low
    found = [_devices(solver, grid) for grid in grids]
    over = sum(excess(b, d) for b, d in zip(problem.blocks, hint, strict=True))
    better = over > 0 or crossing_cost(problem, tuple(found)) < crossing_cost(problem, tuple(hint))
    best = found if better else list(hint)
    value = crossing_cost(problem, tuple(best))
    proved = status == cp_model.OPTIMAL and value - low <= 4 * rounding
    return best, value if proved else low


def _same_price(problem: AffinityProblem) -> bool:
    off = ~np.eye(len(problem.cost), dtype=bool)
    prices = problem.cost[off]
    return bool(len(prices) == 0 or np.ptp(prices) == 0)


def _grid(model: cp_model.CpModel, block: Block) -> Grid:
    devices = range(len(block.count))
    x = [[model.new_bool_var("") for _ in devices] for _ in block.weight]
    top = max(float(block.weight.max(initial=0.0)), 1e-300)
    units = np.ceil(block.weight / top * _UNITS - 1e-6).astype(np.int64)
    for row in x:
        model.add_exactly_one(row)
    for g in devices:
        column = [row[g] for row in x]
        model.add(sum(column) <= int(block.count[g]))
        if np.isfinite(block.limit):
            room = int(block.limit / top * _UNITS * (1 + 1e-9)) + len(x)
            model.add(sum(int(u) * v for u, v in zip(units, column, strict=True)) <= room)
    return x


def _solve(
    model: cp_model.CpModel, work: float
) -> tuple[cp_model.CpSolver, cp_model.CpSolverStatus]:
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = work
    return solver, solver.solve(model)


def _devices(solver: cp_model.CpSolver, x: Grid) -> Ints:
    held = np.array([[solver.boolean_value(v) for v in row] for row in x])
    return np.asarray(held.argmax(1))
