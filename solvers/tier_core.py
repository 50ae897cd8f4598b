"""Tier placement: the search of a core that widens, with CP-SAT (Balas and Zemel 1980)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dovetail.solvers.tier_classes import Classes, Fill, Ints, fill_tiers

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

# Relative difference under which two times are one: sums of floats in different orders.
SAME = 1e-9
_CORE = 64


def _greedy(classes: Classes, order: Ints) -> Ints | None:
    """Every class in turn into the cheapest tiers with room; None if a block is left over."""
    room, size = classes.capacity.tolist(), classes.size.tolist()
    counts = np.zeros((len(size), len(room)), dtype=np.int64)
    for c in order.tolist():
        left = int(classes.count[c])
        for k in range(len(room)):
            n = min(left, room[k] // size[c])
            counts[c, k] = n
            left -= n
            room[k] -= n * size[c]
        if left:
            return None
    return counts


@dataclass(frozen=True, slots=True)
class Found:
    counts: Ints | None  # (classes, tiers)
    bound: float
    why: str = ""
    work: float = 0.0


def search(classes: Classes, fill: Fill, work: float, gap: float) -> Found:
    """Greedy, then cores of four times the width, until the gap closes or a core is the whole."""
    counts, bound, left, width = _start(classes, fill), fill.bound, work, _CORE
    reduced = (classes.weight @ fill.shares)[:, None] * classes.cost
    reduced += classes.size[:, None] * fill.prices
    reduced -= reduced.min(axis=1, keepdims=True)
    ranked = np.sort(reduced[reduced > 0])
    why = "the tiers filled by value per byte divide no block"
    while counts is None or (_short(classes, counts, bound) > max(gap, SAME) and left > 0):
        best = classes.worst(counts)
        # Beyond this reduced cost, a pair is in no placement better than the one at hand.
        reach = math.inf if counts is None else (best - bound) + SAME * best
        whole = width >= len(ranked) or ranked[width] > reach
        core = reduced <= (reach if whole else ranked[width])
        found = _search_core(classes, core, counts, bound, gap, left if whole else left / 4)
        if found.counts is None:
            return found
        counts, left, width = found.counts, left - found.work, 4 * width
        why = "a search found a placement that meets the bound"
        if whole:
            bound = max(bound, min(found.bound, classes.worst(counts)))
            why = f"searched: the bound leaves {int((core.sum(axis=1) > 1).sum())} classes open"
            break
    short = _short(classes, counts, bound)
    return Found(counts, bound, why if short <= SAME else f"within {short:.1e} of the bound")


def _short(classes: Classes, counts: Ints, bound: float) -> float:
    """The share of the worst scenario's seconds by which ``bound`` falls short of them."""
    worst = classes.worst(counts)
    return (worst - bound) / worst if worst > 0 else 0.0


def _start(classes: Classes, fill: Fill) -> Ints | None:
    """The best greedy placement: by density under two shares of the scenarios, or by size."""
    even = np.full(len(fill.shares), 1 / len(fill.shares))
    by_size = np.argsort(-classes.size, kind="stable")
    orders = (fill.order, fill_tiers(classes, even).order, by_size)
    starts = [counts for o in orders if (counts := _greedy(classes, o)) is not None]
    return min(starts, key=classes.worst, default=None)


def _search_core(
    classes: Classes,
    core: NDArray[np.bool_],
    start: Ints | None,
    bound: float,
    gap: float,
    work: float,
) -> Found:
    """CP-SAT over the (class, tier) pairs of ``core`` and of ``start``; never worse than start.

    The bound found is for placements within the core; no counts: none is possible.
    """
    # Here, because checking a placement must not load a solver.
    from ortools.sat.python import cp_model

    within = core if start is None else core | (start > 0)
    model, n, fixed, scale = _core_model(classes, within, start, bound)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = work
    solver.parameters.relative_gap_limit = max(gap, SAME / 8)
    status = solver.solve(model)
    spent = solver.deterministic_time
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        for pair, variable in n.items():
            fixed[pair] = solver.value(variable)
        counts = fixed if classes.worst(fixed) < classes.worst(start) else start
        return Found(counts, solver.best_objective_bound / scale, work=spent)
    if start is not None:
        return Found(start, 0.0, work=spent)
    total, hold = int(classes.size @ classes.count), int(classes.capacity.sum())
    amount = f"{total * classes.unit} of the {hold * classes.unit} bytes that the tiers can hold"
    if status == cp_model.INFEASIBLE:
        return Found(None, math.inf, f"items take {amount}: no way to keep every block whole")
    raise RuntimeError(
        f"items take {amount}, and {work} deterministic seconds found neither a placement nor a "
        "proof that there is none: allow more work or more bytes"
    )


def _core_model(
    classes: Classes, within: NDArray[np.bool_], start: Ints | None, bound: float
) -> tuple["cp_model.CpModel", dict[tuple[int, int], "cp_model.IntVar"], Ints, float]:
    """The model, its counts by (class, tier), those that are fixed, and its units in a second."""
    from ortools.sat.python import cp_model

    most = float((classes.count @ classes.weight).max() * classes.cost[-1]) or 1.0
    scale = min(2.0**44 / min(classes.worst(start) or 1.0, most), 2.0**55 / most)
    model = cp_model.CpModel()
    n, fixed = _core_counts(model, classes, within, start)
    low = max(0, math.floor(bound * scale) - len(n) - 2)
    worst = model.new_int_var(low, max(low, math.ceil(most * scale)), "worst")
    for s, base in enumerate(classes.seconds(fixed).tolist()):
        each = np.floor(classes.weight[:, s, None] * classes.cost * scale)
        seconds = cp_model.LinearExpr.weighted_sum(list(n.values()), [int(each[p]) for p in n])
        model.add(seconds + math.floor(base * scale) <= worst)
    model.minimize(worst)
    return model, n, fixed, scale


def _core_counts(
    model: "cp_model.CpModel",
    classes: Classes,
    within: NDArray[np.bool_],
    start: Ints | None,
) -> tuple[dict[tuple[int, int], "cp_model.IntVar"], Ints]:
    """The counts that are open, by (class, tier), and the counts of classes with one tier."""
    alone = within.sum(axis=1) == 1
    fixed: Ints = np.where(alone[:, None] & within, classes.count[:, None], 0)
    n: dict[tuple[int, int], cp_model.IntVar] = {}
    for c in np.flatnonzero(~alone).tolist():
        count, tiers = int(classes.count[c]), np.flatnonzero(within[c]).tolist()
        for k in tiers:
            n[c, k] = model.new_int_var(0, count, f"n_{c}_{k}")
            if start is not None:
                model.add_hint(n[c, k], int(start[c, k]))
        model.add(sum(n[c, k] for k in tiers) == count)
    room = (classes.capacity - classes.size @ fixed).tolist()
    for k in range(len(room)):
        inside = [int(classes.size[c]) * v for (c, j), v in n.items() if j == k]
        model.add(sum(inside) <= room[k])
    return n, fixed
