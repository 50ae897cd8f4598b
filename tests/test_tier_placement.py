"""Tier placement against brute force, its own bound, and real routing counts."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.solvers.solved import Solved
from dovetail.solvers.tier_placement import (
    Item,
    Placement,
    TierProblem,
    check,
    divided_bound,
    solve,
    step_seconds,
)

COUNTS = json.loads((Path(__file__).parent / "data/olmoe_expert_counts.json").read_text())["counts"]


def items(*sizes_and_values: tuple[int, Sequence[float]]) -> tuple[Item, ...]:
    return tuple(Item(f"x{i}", s, tuple(v)) for i, (s, v) in enumerate(sizes_and_values))


def seconds(problem: TierProblem, tiers: Sequence[int]) -> list[float]:
    return [
        sum(
            i.value[s] * i.size * problem.costs[t]
            for i, t in zip(problem.items, tiers, strict=True)
        )
        for s in range(len(problem.items[0].value))
    ]


def fits(problem: TierProblem, tiers: Sequence[int]) -> bool:
    for k, capacity in enumerate(problem.capacities):
        held = sum(i.size for i, t in zip(problem.items, tiers, strict=True) if t == k)
        if capacity is not None and held > capacity:
            return False
    return all(len({tiers[i] for i in group}) <= 1 for group in problem.groups)


def brute(problem: TierProblem, shares: Sequence[float] | None = None) -> float:
    """The least seconds over every placement: of the worst scenario, or the mean by ``shares``."""
    best = math.inf
    for tiers in product(range(len(problem.capacities)), repeat=len(problem.items)):
        if fits(problem, tiers):
            each = seconds(problem, tiers)
            mean = sum(a * b for a, b in zip(shares or (), each, strict=False))
            best = min(best, max(each) if shares is None else mean)
    return best


@st.composite
def problems(draw: st.DrawFn, most: int = 6, limited: bool = True) -> TierProblem:
    scenarios = draw(st.integers(1, 3))
    value = st.sampled_from((0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0, 2.0))
    kinds = draw(
        st.lists(
            st.tuples(st.integers(1, 12), st.tuples(*[value] * scenarios)),
            min_size=1,
            max_size=most,
        )
    )
    # Members are drawn from few kinds, so that there are classes of several.
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most))
    tiers = draw(st.integers(1, 3))
    capacities: list[int | None] = [draw(st.integers(0, 30)) for _ in range(tiers)]
    if not limited or draw(st.booleans()):
        capacities[-1] = None
    costs = sorted(draw(st.sampled_from((0.0, 0.5, 1.0, 3.0))) for _ in range(tiers))
    index = st.integers(0, len(chosen) - 1)
    groups = draw(st.lists(st.lists(index, min_size=1, max_size=3).map(tuple), max_size=2))
    return TierProblem(items(*chosen), tuple(capacities), tuple(costs), tuple(groups))


def exact(problem: TierProblem) -> Solved[Placement]:
    return solve(problem, gap=0.0)


@settings(max_examples=150)
@given(problems())
def test_worst_case_is_brute_forces(problem: TierProblem) -> None:
    solved, least = exact(problem), brute(problem)
    assert solved.objective == pytest.approx(least, rel=1e-8)
    assert solved.status == ("infeasible" if least == math.inf else "optimal")
    if solved.value.tiers is None:
        assert solved.value.why
        return
    assert solved.bound is not None and solved.bound <= solved.objective
    assert check(problem, solved.value.tiers) == [] and fits(problem, solved.value.tiers)
    assert divided_bound(problem, solved.value.shares) <= solved.objective * (1 + 1e-9)


@settings(max_examples=60)
@given(problems(), st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_mean_is_brute_forces(problem: TierProblem, drawn: list[int]) -> None:
    weights = tuple(drawn[: len(problem.items[0].value)])
    if not sum(weights):
        weights = (1,) * len(weights)
    solved = solve(problem, "mean", weights, gap=0.0)
    least = brute(problem, [w / sum(weights) for w in weights])
    assert solved.objective == pytest.approx(least, rel=1e-8)
    assert solved.status == ("infeasible" if least == math.inf else "optimal")


def with_more(problem: TierProblem, tier: int, extra: int) -> TierProblem:
    grown = [
        c + extra if c is not None and k == tier else c for k, c in enumerate(problem.capacities)
    ]
    return replace(problem, capacities=tuple(grown))


@settings(max_examples=60)
@given(problems(limited=False), st.integers(0, 2), st.integers(1, 10))
def test_more_capacity_is_never_worse(problem: TierProblem, tier: int, extra: int) -> None:
    assert exact(with_more(problem, tier, extra)).objective <= exact(problem).objective * (1 + 1e-9)


@settings(max_examples=60)
@given(problems(limited=False), st.integers(0, 2), st.integers(1, 3))
def test_a_price_is_the_slope_of_the_bound(problem: TierProblem, tier: int, units: int) -> None:
    problem = replace(problem, groups=())
    tier %= len(problem.capacities)
    if problem.capacities[tier] is None:
        return
    extra = units * math.gcd(*(item.size for item in problem.items))
    answer = exact(problem).value
    before = divided_bound(problem, answer.shares)
    after = divided_bound(with_more(problem, tier, extra), answer.shares)
    # The bound is convex in a capacity: what is saved is at most what the slope says.
    assert -1e-9 <= before - after <= extra * answer.prices[tier] + 1e-9


@settings(max_examples=60)
@given(problems(limited=False))
def test_robust_is_no_worse_in_the_worst_case_than_mean_optimal(problem: TierProblem) -> None:
    mean = solve(problem, "mean", gap=0.0)
    assert mean.value.tiers is not None
    worst = exact(problem).objective
    assert worst <= max(step_seconds(problem, mean.value.tiers)) * (1 + 1e-9)
    assert mean.objective <= worst * (1 + 1e-9)


@given(problems(limited=False), st.integers(0, 2**31))
def test_any_shares_bound_any_placement(problem: TierProblem, seed: int) -> None:
    draw = random.Random(seed)
    shares = [draw.random() + 1e-3 for _ in problem.items[0].value]
    bound = divided_bound(problem, shares)
    for tiers in product(range(len(problem.capacities)), repeat=len(problem.items)):
        if fits(problem, tiers):
            each = seconds(problem, tiers)
            mean = sum(p * s for p, s in zip(shares, each, strict=True)) / sum(shares)
            assert bound <= mean + 1e-9


def test_equal_sizes_and_one_scenario_need_no_solver() -> None:
    many = items(*((7, (1 / (1 + i),)) for i in range(5000)))
    # 1000 and 2000 items, and bytes left over that no item can use.
    solved = solve(TierProblem(many, (7003, 14006, None), (0.0, 1e-3, 1.0)), work=0.0)
    assert solved.status == "optimal" and solved.bound == pytest.approx(solved.objective)
    assert solved.value.tiers == (0,) * 1000 + (1,) * 2000 + (2,) * 2000
    assert solved.value.why == "the tiers filled by value per byte divide no block"
    assert solved.value.prices[1] == pytest.approx(1 / 3001 * (1 - 1e-3))
    assert solved.value.prices[0] == pytest.approx(solved.value.prices[1] + 1e-3 / 1001)
    assert solved.value.prices[2] == 0


def test_alike_items_are_counted_not_enumerated() -> None:
    kinds = [(3, (1.0, 0.2)), (3, (0.2, 1.0)), (5, (0.6, 0.6))]
    problem = TierProblem(
        items(*(kind for kind in kinds for _ in range(4000))), (20_001, None), (0, 1)
    )
    solved = exact(problem)
    assert solved.status == "optimal" and solved.value.tiers is not None
    assert check(problem, solved.value.tiers) == []
    # By symmetry both scenarios weigh the same, and a byte of each kind is worth the same.
    assert solved.value.shares == pytest.approx((0.5, 0.5))
    assert solved.objective == pytest.approx((2 * 12_000 + 20_000 - 20_001) * 0.6, rel=1e-4)


def routing(domains: Sequence[str], layers: Sequence[int]) -> tuple[Item, ...]:
    """One item of one byte an expert; its value is its share of the layers' routed pairs."""
    pairs = sum(COUNTS[domains[0]][layers[0]]) * len(layers)
    return tuple(
        Item(f"{layer}.{e}", 1, tuple(COUNTS[d][layer][e] / pairs for d in domains))
        for layer in layers
        for e in range(64)
    )


def missed(domains: Sequence[str], fast: int, objective: str) -> tuple[float, ...]:
    """Share of routed pairs, by domain, that a plan for ``domains`` brings from the slow tier."""
    problem = TierProblem(routing(domains, (0, 1, 2)), (3 * fast, None), (0.0, 1.0))
    solved = solve(problem, "mean" if objective == "mean" else "worst")
    assert solved.value.tiers is not None and check(problem, solved.value.tiers) == []
    assert solved.bound is not None and solved.objective - solved.bound <= 1e-3 * solved.objective
    every = TierProblem(routing(tuple(COUNTS), (0, 1, 2)), problem.capacities, problem.costs)
    return step_seconds(every, solved.value.tiers)


@pytest.mark.parametrize("fast", [8, 16, 32])
def test_real_routing_same_domain_mix_and_robust(fast: int) -> None:
    domains = tuple(COUNTS)
    same = [missed((d,), fast, "mean")[i] for i, d in enumerate(domains)]
    mix, robust = missed(domains, fast, "mean"), missed(domains, fast, "worst")
    assert max(robust) <= max(mix) and sum(mix) <= sum(robust) + 1e-9
    assert all(
        own <= m + 1e-9 and own <= r + 1e-9 for own, m, r in zip(same, mix, robust, strict=True)
    )
    # A plan for one domain serves another about as well as chance would.
    crossed = max(missed((d,), fast, "mean")[j] for d in domains for j in range(3))
    assert crossed > 0.8 * (1 - fast / 64) > max(robust) * 0.8


def test_the_binding_capacity_is_named() -> None:
    two = items((10, (1.0,)), (25, (1.0,)), (4, (0.5,)))
    full = solve(TierProblem(two, (20, 15), (0, 1)))
    assert full.status == "infeasible" and full.value.tiers is None
    assert full.value.why == "x1: 25 bytes fit in no tier; the roomiest, tier 0, has 20"
    short = solve(TierProblem(two, (8, 30), (0, 1)))
    assert short.value.why == (
        "2 blocks fit in no tier but 1 (the largest: x1); they need 35 bytes and at most 30 can be "
        "filled: 5 bytes short"
    )
    grouped = TierProblem(two, (20, 25), (0, 1), groups=((0, 2), (2, 1)))
    assert "x0 with x1 with x2: 39 bytes fit in no tier" in solve(grouped).value.why


def test_a_packing_that_no_search_finds_is_infeasible() -> None:
    problem = TierProblem(items(*((s, (1.0,)) for s in (9, 9, 7, 2))), (14, 13), (0, 1))
    solved = solve(problem)
    assert solved.status == "infeasible" and brute(problem) == math.inf
    assert solved.value.why == (
        "items take 27 of the 27 bytes that the tiers can hold: no way to keep every block whole"
    )


def test_no_items() -> None:
    solved = solve(TierProblem((), (5,), (0.0,)))
    assert (solved.status, solved.objective, solved.value.tiers) == ("optimal", 0.0, ())


def test_the_same_answer_every_time() -> None:
    draw = random.Random(5)
    kinds = ((draw.randint(1, 9), [draw.random() for _ in range(3)]) for _ in range(80))
    problem = TierProblem(items(*kinds), (100, 120, None), (0, 1, 4))
    first, second = (solve(problem, work=1.0) for _ in range(2))
    assert first.value == second.value and first.bound == second.bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacities": (1,)}, "1 capacities and 2 costs"),
        ({"capacities": (None, 4)}, "only the last may be None"),
        ({"capacities": (-1, None)}, "none negative"),
        ({"costs": (2.0, 1.0)}, "never falling"),
        ({"items": items((0, (1.0,)))}, "size must be at least 1"),
        ({"items": items((1, (1.0,)), (1, (1.0, 2.0)))}, "one value given per scenario"),
        ({"items": items((1, (-1.0,)))}, "must be finite and not negative"),
        ({"groups": ((0, 3),)}, "indices from 0 to 0"),
    ],
)
def test_solve_refuses_malformed_problems(change: dict[str, object], message: str) -> None:
    sound = TierProblem(items((1, (1.0,))), (1, None), (0.0, 1.0))
    with pytest.raises(ValueError, match=message):
        solve(replace(sound, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("objective", "weights", "message"),
    [
        ("worst", (1.0,), "for the mean, 1 are expected"),
        ("mean", (1.0, 1.0), "for the mean, 1 are expected"),
        ("mean", (0.0,), "not all zero"),
    ],
)
def test_solve_refuses_weights(objective: str, weights: tuple[float, ...], message: str) -> None:
    problem = TierProblem(items((1, (1.0,))), (1, None), (0.0, 1.0))
    with pytest.raises(ValueError, match=message):
        solve(problem, objective, weights)  # type: ignore[arg-type]


def test_check_names_every_fault() -> None:
    problem = TierProblem(items((4, (1.0,)), (4, (1.0,))), (3, None), (0, 1), groups=((0, 1),))
    assert check(problem, (0, 1)) == [
        "tier 0 holds 4 bytes, 1 over its 3",
        "the group x0, x1 is divided among tiers [0, 1]",
    ]
    assert check(problem, (1,)) == ["1 tiers for 2 items: give one for each"]
    assert check(problem, (1, 2))[0] == "x1 is in tier 2, and the tiers are 0 to 1"


def test_checking_loads_no_solver() -> None:
    code = (
        "import sys; from dovetail.solvers.tier_placement import *\n"
        "problem = TierProblem((Item('a', 1, (1.0,)),), (1, None), (0.0, 1.0))\n"
        "assert check(problem, (0,)) == [] and divided_bound(problem, (1.0,)) == 0\n"
        "sys.exit('ortools' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
