"""Which memory tier each item lives in, so that bringing items to where they are used takes least.

    minimise    max_s Σ_i w_is · cost_t(i)     or     Σ_s p_s Σ_i w_is · cost_t(i)
    subject to  Σ_{i: t(i) = k} size_i <= capacity_k,   t equal within a group

with w_is = value_is · size_i: bytes of item i that a step of scenario s needs. A group is one
block; blocks alike in size and values are one class with a count.

**Bound.** Under shares p of the scenarios (p >= 0, Σp = 1), with blocks divisible, the optimum
fills the tiers from the cheapest in falling density w_i·p / size_i: density times cost is a Monge
array (Hoffman 1963; Dantzig 1957 for one knapsack). Every p gives a bound; cutting planes (Kelley
1960) find the best, with GLOP on one variable per scenario, so that no linear program grows with
the items. The p that proves it is in the answer, and ``divided_bound`` confirms it unaided.

**Answer.** Where the filling divides no block (one scenario and equal sizes, always) it is optimal
as it stands. Otherwise it is the hint of CP-SAT over a *core* that widens (Balas and Zemel 1980):
the class-tier pairs of least reduced cost. Once every pair whose reduced cost is below the gap is
in the core, the search of the core is a proof for the whole. CP-SAT and not a MIP solver, because
its limit of work is deterministic and its numbers are whole: seconds are rounded down to 2^-44 of
the best known, which keeps its bound a bound.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from dovetail.solvers.solved import Solved
from dovetail.solvers.tier_classes import (
    Floats,
    best_fill,
    blocks_of,
    classes_of,
    fill_tiers,
    unpack,
)
from dovetail.solvers.tier_core import SAME, search
from dovetail.solvers.tier_problem import (
    Block,
    Item,
    Placement,
    TierProblem,
    check,
    refuse_malformed,
    step_seconds,
)

__all__ = [
    "SAME",
    "Item", "Placement", "TierProblem", "check", "divided_bound", "solve", "step_seconds",
]  # fmt: skip


def solve(
    problem: TierProblem,
    objective: Literal["worst", "mean"] = "worst",
    weights: tuple[float, ...] | None = None,
    work: float = 5.0,
    gap: float = 1e-4,
) -> Solved[Placement]:
    """The placement of least seconds a step in the worst scenario, or on (weighted) average.

    The search ends when objective and bound differ by less than the share ``gap``, or when
    ``work`` of CP-SAT's deterministic seconds is spent. Raises ValueError for a malformed problem,
    and RuntimeError if that work found neither a placement nor a proof that there is none, which
    takes a limited last tier.
    """
    begin = time.perf_counter()
    refuse_malformed(problem)
    shares = _mean_shares(problem, objective, weights)
    answer = _solve(problem, shares, work, gap)
    if answer.value.tiers is not None:
        faults = check(problem, answer.value.tiers)
        assert not faults, faults
    return replace(answer, seconds=time.perf_counter() - begin)


def divided_bound(problem: TierProblem, shares: Sequence[float]) -> float:
    """Seconds below which no placement comes, by the ``shares`` of the scenarios alone.

    Holds for the mean under these shares, and so for the worst scenario, whatever the shares.
    """
    given = np.array(shares) / math.fsum(shares)
    return fill_tiers(classes_of(problem, blocks_of(problem), given), np.ones(1)).bound


def _mean_shares(
    problem: TierProblem, objective: str, weights: tuple[float, ...] | None
) -> Floats | None:
    """The scenarios' shares of the mean; None for the worst of them."""
    scenarios = len(problem.items[0].value) if problem.items else len(weights or ())
    if weights is not None:
        if objective != "mean" or len(weights) != scenarios:
            raise ValueError(f"weights {weights}: they are for the mean, {scenarios} are expected")
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
            raise ValueError(f"weights {weights}: none may be negative, and not all zero")
    if objective == "worst":
        return None
    given = np.array(weights if weights is not None else (1.0,) * scenarios)
    shares: Floats = given / given.sum()
    return shares


def _solve(
    problem: TierProblem, shares: Floats | None, work: float, gap: float
) -> Solved[Placement]:
    """``solve`` less the clock; ``shares`` are those of the mean."""
    if not problem.items:
        return Solved(Placement((), "there are no items"), 0.0, 0.0, "optimal", 0.0)
    blocks = blocks_of(problem)
    if why := _overfull(problem, blocks):
        return Solved(Placement(None, why), math.inf, math.inf, "infeasible", 0.0)
    classes = classes_of(problem, blocks, shares)
    fill = best_fill(classes)
    found = search(classes, fill, work, gap)
    if found.counts is None:
        return Solved(Placement(None, found.why), math.inf, math.inf, "infeasible", 0.0)
    tiers = unpack(classes, found.counts)
    each = step_seconds(problem, tiers)
    reached = max(each) if shares is None else float(shares @ np.array(each))
    bound = min(found.bound, reached)
    given = fill.shares if shares is None else shares
    prices = fill.prices / classes.unit
    placement = Placement(tiers, found.why, tuple(given.tolist()), tuple(prices.tolist()))
    status: Literal["optimal", "feasible"] = (
        "optimal" if reached - bound <= SAME * reached else "feasible"
    )
    return Solved(placement, reached, bound, status, 0.0)


def _overfull(problem: TierProblem, blocks: list[Block]) -> str:
    """The tiers that are too small for the blocks that fit in no other; "" if there are none.

    Capacities count in whole multiples of what divides every block's size.
    """
    if problem.capacities[-1] is None:
        return ""
    size = {block: sum(problem.items[i].size for i in block) for block in blocks}
    unit = math.gcd(*size.values())
    held = [(capacity or 0) // unit * unit for capacity in problem.capacities]
    roomiest = sorted(range(len(held)), key=lambda k: -held[k])
    for n in range(len(held) + 1):
        elsewhere = held[roomiest[n]] if n < len(held) else 0
        captive = [block for block in blocks if size[block] > elsewhere]
        need, hold = sum(size[b] for b in captive), sum(held[k] for k in roomiest[:n])
        if need <= hold:
            continue
        largest = max(captive, key=lambda b: size[b])
        names = " with ".join(problem.items[i].name for i in largest)
        if n == 0:
            return (
                f"{names}: {size[largest]} bytes fit in no tier; the roomiest, tier {roomiest[0]}, "
                f"has {problem.capacities[roomiest[0]]}"
            )
        tiers = ", ".join(map(str, sorted(roomiest[:n])))
        return (
            f"{len(captive)} blocks fit in no tier but {tiers} (the largest: {names}); they need "
            f"{need} bytes and at most {hold} can be filled: {need - hold} bytes short"
        )
    return ""
