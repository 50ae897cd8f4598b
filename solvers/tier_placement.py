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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from dovetail.solvers.solved import Solved

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Block = tuple[int, ...]

# Relative difference under which two times are one: sums of floats in different orders.
SAME = 1e-9
# GLOP's answers are no more precise than this.
_CLOSE = 1e-8
_CUTS = 300
_CORE = 64


@dataclass(frozen=True, slots=True)
class Item:
    """What lies in exactly one tier: a tensor, an expert.

    ``size`` is in bytes; ``value`` is, per scenario, the expected uses in one step.
    """

    name: str
    size: int
    value: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TierProblem:
    """Items, and tiers from the cheapest to the dearest.

    ``capacities`` are in bytes, the last may be None (unlimited); ``costs`` are the seconds a byte
    takes from a tier to where it is used, never falling; a group is a set of indices of items that
    share a tier.
    """

    items: tuple[Item, ...]
    capacities: tuple[int | None, ...]
    costs: tuple[float, ...]
    groups: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the items are and what proves it.

    ``tiers`` is the tier of each item (None: there is no placement), ``why`` the proof in words or
    the capacity that binds, ``shares`` the p of the scenarios under which ``divided_bound`` is
    highest, and ``prices`` what one more byte of each tier saves by that bound, in seconds.
    """

    tiers: tuple[int, ...] | None
    why: str
    shares: tuple[float, ...] = ()
    prices: tuple[float, ...] = ()


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
    _refuse_malformed(problem)
    shares = _mean_shares(problem, objective, weights)
    answer = _solve(problem, shares, work, gap)
    if answer.value.tiers is not None:
        faults = check(problem, answer.value.tiers)
        assert not faults, faults
    return replace(answer, seconds=time.perf_counter() - begin)


def step_seconds(problem: TierProblem, tiers: Sequence[int]) -> tuple[float, ...]:
    """Seconds in which each scenario's step brings its items: Σ value · size · cost."""
    weight = np.array([[v * item.size for v in item.value] for item in problem.items])
    cost = np.array([problem.costs[tier] for tier in tiers])
    return tuple(math.fsum(column) for column in (weight * cost[:, None]).T)


def divided_bound(problem: TierProblem, shares: Sequence[float]) -> float:
    """Seconds below which no placement comes, by the ``shares`` of the scenarios alone.

    Holds for the mean under these shares, and so for the worst scenario, whatever the shares.
    """
    given = np.array(shares) / math.fsum(shares)
    return _fill(_classes(problem, _blocks(problem), given), np.ones(1)).bound


def check(problem: TierProblem, tiers: Sequence[int]) -> list[str]:
    """What is wrong with a placement, in words; empty when every rule is kept."""
    if len(tiers) != len(problem.items):
        return [f"{len(tiers)} tiers for {len(problem.items)} items: give one for each"]
    used = [0] * len(problem.capacities)
    wrong = []
    for item, tier in zip(problem.items, tiers, strict=True):
        if not 0 <= tier < len(used):
            wrong.append(f"{item.name} is in tier {tier}, and the tiers are 0 to {len(used) - 1}")
        else:
            used[tier] += item.size
    for k, (held, capacity) in enumerate(zip(used, problem.capacities, strict=True)):
        if capacity is not None and held > capacity:
            wrong.append(f"tier {k} holds {held} bytes, {held - capacity} over its {capacity}")
    for group in problem.groups:
        where = {tiers[i] for i in group}
        if len(where) > 1:
            names = ", ".join(problem.items[i].name for i in group)
            wrong.append(f"the group {names} is divided among tiers {sorted(where)}")
    return wrong


def _refuse_malformed(problem: TierProblem) -> None:
    items, capacities, costs = problem.items, problem.capacities, problem.costs
    if not capacities or len(capacities) != len(costs):
        raise ValueError(f"{len(capacities)} capacities and {len(costs)} costs: one each per tier")
    if None in capacities[:-1] or any(c is not None and c < 0 for c in capacities):
        raise ValueError(f"capacities {capacities}: only the last may be None, none negative")
    if not all(math.isfinite(c) and c >= 0 for c in costs) or list(costs) != sorted(costs):
        raise ValueError(f"costs {costs}: they must be finite, not negative and never falling")
    for item in items:
        if item.size < 1 or not item.value or len(item.value) != len(items[0].value):
            raise ValueError(f"{item}: size must be at least 1, and one value given per scenario")
        if not all(math.isfinite(v) and v >= 0 for v in item.value):
            raise ValueError(f"{item}: values must be finite and not negative")
    for group in problem.groups:
        if not all(0 <= i < len(items) for i in group):
            raise ValueError(f"group {group}: members must be indices from 0 to {len(items) - 1}")


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
    blocks = _blocks(problem)
    if why := _overfull(problem, blocks):
        return Solved(Placement(None, why), math.inf, math.inf, "infeasible", 0.0)
    classes = _classes(problem, blocks, shares)
    fill = _best_fill(classes)
    found = _search(classes, fill, work, gap)
    if found.counts is None:
        return Solved(Placement(None, found.why), math.inf, math.inf, "infeasible", 0.0)
    tiers = _unpack(classes, found.counts)
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


def _blocks(problem: TierProblem) -> list[Block]:
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


@dataclass(frozen=True, slots=True)
class _Classes:
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


def _classes(problem: TierProblem, blocks: list[Block], shares: Floats | None) -> _Classes:
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
    return _Classes(
        blocks=list(alike.values()),
        size=np.array([in_bytes // unit for in_bytes, _ in alike], dtype=np.int64),
        count=np.array([len(same) for same in alike.values()], dtype=np.int64),
        weight=np.array([row for _, row in alike]),
        capacity=np.array(room, dtype=np.int64),
        cost=np.array(problem.costs),
        unit=unit,
    )


def _unpack(classes: _Classes, counts: Ints) -> tuple[int, ...]:
    """The tier of every item: the first blocks of a class are in the cheapest tiers."""
    tier: dict[int, int] = {}
    for same, row in zip(classes.blocks, counts.tolist(), strict=True):
        where = [k for k, n in enumerate(row) for _ in range(n)]
        tier |= {i: k for block, k in zip(same, where, strict=True) for i in block}
    return tuple(tier[i] for i in range(len(tier)))


@dataclass(frozen=True, slots=True)
class _Fill:
    """The optimum for divisible blocks under ``shares`` of the scenarios."""

    shares: Floats  # (scenarios)
    order: Ints  # (classes): falling density
    seconds: Floats  # (scenarios)
    prices: Floats  # (tiers): seconds that one more unit saves
    bound: float


def _fill(classes: _Classes, shares: Floats) -> _Fill:
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
    return _Fill(shares, order, seconds, prices, float(shares @ seconds))


def _best_fill(classes: _Classes) -> _Fill:
    """The filling of highest bound over the shares p, by cutting planes.

    The bound is concave in p and a filling's seconds are its slope, so that p·seconds of the
    fillings seen is never below the bound that p gives.
    """
    scenarios = classes.weight.shape[1]
    best = _fill(classes, np.full(scenarios, 1 / scenarios))
    cuts = [best.seconds]
    for _ in range(_CUTS if scenarios > 1 else 0):
        shares, ceiling = _highest(np.array(cuts))
        if ceiling - best.bound <= _CLOSE * ceiling:
            break
        fill = _fill(classes, shares)
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


def _greedy(classes: _Classes, order: Ints) -> Ints | None:
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
class _Found:
    counts: Ints | None  # (classes, tiers)
    bound: float
    why: str = ""
    work: float = 0.0


def _search(classes: _Classes, fill: _Fill, work: float, gap: float) -> _Found:
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
    return _Found(counts, bound, why if short <= SAME else f"within {short:.1e} of the bound")


def _short(classes: _Classes, counts: Ints, bound: float) -> float:
    """The share of the worst scenario's seconds by which ``bound`` falls short of them."""
    worst = classes.worst(counts)
    return (worst - bound) / worst if worst > 0 else 0.0


def _start(classes: _Classes, fill: _Fill) -> Ints | None:
    """The best greedy placement: by density under two shares of the scenarios, or by size."""
    even = np.full(len(fill.shares), 1 / len(fill.shares))
    by_size = np.argsort(-classes.size, kind="stable")
    orders = (fill.order, _fill(classes, even).order, by_size)
    starts = [counts for o in orders if (counts := _greedy(classes, o)) is not None]
    return min(starts, key=classes.worst, default=None)


def _search_core(
    classes: _Classes,
    core: NDArray[np.bool_],
    start: Ints | None,
    bound: float,
    gap: float,
    work: float,
) -> _Found:
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
        return _Found(counts, solver.best_objective_bound / scale, work=spent)
    if start is not None:
        return _Found(start, 0.0, work=spent)
    total, hold = int(classes.size @ classes.count), int(classes.capacity.sum())
    amount = f"{total * classes.unit} of the {hold * classes.unit} bytes that the tiers can hold"
    if status == cp_model.INFEASIBLE:
        return _Found(None, math.inf, f"items take {amount}: no way to keep every block whole")
    raise RuntimeError(
        f"items take {amount}, and {work} deterministic seconds found neither a placement nor a "
        "proof that there is none: allow more work or more bytes"
    )


def _core_model(
    classes: _Classes, within: NDArray[np.bool_], start: Ints | None, bound: float
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
    classes: _Classes,
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
