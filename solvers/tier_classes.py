"""Tier placement: blocks alike as classes with a count, and the tiers filled by value per byte."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.solvers.tier_problem import Block, TierProblem

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# GLOP's answers are no more precise than this.
_CLOSE = 1e-8
_CUTS = 300


def blocks_of(problem: TierProblem) -> list[Block]:
    """Items that must share a tier, as indices; groups with a common member are one block."""
    parent = list(range(len(problem.items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for group in problem.groups:
        for other in group[1:]:
            parent[root(other)] = root(group[0])
    blocks: dict[int, list[int]] = {}
    for i in range(len(parent)):
        blocks.setdefault(root(i), []).append(i)
    return [tuple(block) for block in blocks.values()]


@dataclass(frozen=True, slots=True)
class Classes:
    """Blocks alike, counted; sizes and capacities are in units of ``unit`` bytes."""

    blocks: list[list[Block]]
    size: Ints  # (classes)
    count: Ints  # (classes)
    weight: Floats  # (classes, scenarios): bytes that a step needs of one block
    capacity: Ints  # (tiers)
    cost: Floats  # (tiers): seconds a byte
    unit: int

    def seconds(self, counts: Ints) -> Floats:
        """Seconds of each scenario with ``counts`` (classes, tiers)."""
        each: Floats = (counts @ self.cost) @ self.weight
        return each

    def worst(self, counts: Ints | None) -> float:
        """Seconds of the worst scenario; infinite without counts."""
        return math.inf if counts is None else float(self.seconds(counts).max())


def classes_of(problem: TierProblem, blocks: list[Block], shares: Floats | None) -> Classes:
    """The classes of ``problem``; ``shares`` make its scenarios one."""
    size = np.array([item.size for item in problem.items], dtype=np.int64)
    weight: Floats = np.array([item.value for item in problem.items]) * size[:, None]
    if shares is not None:
        weight = (weight @ shares)[:, None]
    alike: dict[tuple[int, tuple[float, ...]], list[Block]] = {}
    for block in blocks:
        members = list(block)
        key = int(size[members].sum()), tuple(weight[members].sum(axis=0).tolist())
        alike.setdefault(key, []).append(block)
    unit = math.gcd(*(in_bytes for in_bytes, _ in alike))
    total = int(size.sum()) // unit
    room = [total if c is None else min(c // unit, total) for c in problem.capacities]
    return Classes(
        blocks=list(alike.values()),
        size=np.array([in_bytes // unit for in_bytes, _ in alike], dtype=np.int64),
        count=np.array([len(same) for same in alike.values()], dtype=np.int64),
        weight=np.array([row for _, row in alike]),
        capacity=np.array(room, dtype=np.int64),
        cost=np.array(problem.costs),
        unit=unit,
    )


def unpack(classes: Classes, counts: Ints) -> tuple[int, ...]:
    """The tier of every item: the first blocks of a class are in the cheapest tiers."""
    tier: dict[int, int] = {}
    for same, row in zip(classes.blocks, counts.tolist(), strict=True):
        where = [k for k, n in enumerate(row) for _ in range(n)]
        tier |= {i: k for block, k in zip(same, where, strict=True) for i in block}
    return tuple(tier[i] for i in range(len(tier)))


@dataclass(frozen=True, slots=True)
class Fill:
    """The optimum for divisible blocks under ``shares`` of the scenarios."""

    shares: Floats  # (scenarios)
    order: Ints  # (classes): falling density
    seconds: Floats  # (scenarios)
    prices: Floats  # (tiers): seconds that one more unit saves
    bound: float


def fill_tiers(classes: Classes, shares: Floats) -> Fill:
    density = (classes.weight @ shares) / classes.size
    order = np.argsort(-density, kind="stable")
    volume = (classes.size * classes.count)[order]
    end, edge = volume.cumsum(), np.concatenate([[0], classes.capacity.cumsum()])
    overlap = np.minimum(end[:, None], edge[1:]) - np.maximum((end - volume)[:, None], edge[:-1])
    blocks = np.maximum(overlap, 0) / classes.size[order, None]
    seconds = (blocks @ classes.cost) @ classes.weight[order]
    prices = np.zeros(len(classes.cost))
    for k in reversed(range(len(prices) - 1)):
        if edge[k + 1] < end[-1]:
            shut_out = order[np.searchsorted(end, edge[k + 1], side="right")]
            rise = classes.cost[k + 1] - classes.cost[k]
            prices[k] = prices[k + 1] + density[shut_out] * rise
    return Fill(shares, order, seconds, prices, float(shares @ seconds))


def best_fill(classes: Classes) -> Fill:
    """The filling of highest bound over the shares p, by cutting planes.

    The bound is concave in p and a filling's seconds are its slope, so that p·seconds of the
    fillings seen is never below the bound that p gives.
    """
    scenarios = classes.weight.shape[1]
    best = fill_tiers(classes, np.full(scenarios, 1 / scenarios))
    cuts = [best.seconds]
    for _ in range(_CUTS if scenarios > 1 else 0):
        shares, ceiling = _highest(np.array(cuts))
        if ceiling - best.bound <= _CLOSE * ceiling:
            break
        fill = fill_tiers(classes, shares)
        best = max(best, fill, key=lambda f: f.bound)
        cuts.append(fill.seconds)
    return best


def _highest(cuts: Floats) -> tuple[Floats, float]:
    """The shares p of largest min_j p·cuts_j, and that minimum."""
    # Here, because checking a placement must not load a solver.
    from ortools.math_opt.python import mathopt

    scale = float(cuts.max()) or 1.0
    model = mathopt.Model()
    p = [model.add_variable(lb=0.0) for _ in cuts[0]]
    lowest = model.add_variable()
    model.add_linear_constraint(mathopt.fast_sum(p) == 1)
    for cut in (cuts / scale).tolist():
        terms = [c * v for c, v in zip(cut, p, strict=True)]
        model.add_linear_constraint(lowest <= mathopt.fast_sum(terms))
    model.maximize(lowest)
    result = mathopt.solve(model, mathopt.SolverType.GLOP)
    shares = np.maximum([result.variable_values(v) for v in p], 0.0)
    return shares / shares.sum(), float(result.objective_value()) * scale
