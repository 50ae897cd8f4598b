"""Batch sizes and residency: the answer against brute force, its bound, and refusals."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.solvers.batch_model import undominated
from dovetail.solvers.batch_problem import (
    Batch,
    Choice,
    Home,
    Option,
    Span,
    Units,
    check,
    objective,
)
from dovetail.solvers.batch_residency import solve

ROWS = 3
TIERS = ("fast", "slow")
small = st.integers(0, 9)
loads = st.tuples(*[st.integers(-2, 9)] * ROWS)
bytes_of = st.dictionaries(st.sampled_from(TIERS), small, max_size=2)
options = st.builds(Option, load=loads, cost=small, nbytes=bytes_of, shared=bytes_of)
homes = st.builds(Home, load=st.tuples(*[st.integers(0, 4)] * ROWS), cost=small, nbytes=bytes_of)
units = st.builds(
    Units,
    count=st.integers(0, 3),
    homes=st.dictionaries(st.sampled_from(["fast", "slow", "none"]), homes, min_size=1, max_size=3),
)
batches = st.builds(
    Batch,
    fixed=small,
    spans=st.tuples(
        st.builds(Span, weight=st.integers(0, 3), first=st.just(0), last=st.just(2)),
        st.builds(Span, weight=st.integers(0, 3), first=st.just(2), last=st.just(3)),
    ),
    start=st.tuples(*[small] * ROWS),
    roles=st.lists(st.lists(options, min_size=1, max_size=4).map(tuple), max_size=2).map(tuple),
    units=st.lists(units, max_size=2).map(tuple),
    taken=bytes_of,
)
problems = st.lists(batches, min_size=1, max_size=4)
capacities = st.fixed_dictionaries({tier: st.integers(0, 40) for tier in TIERS})


def spread(count: int, tiers: list[str]) -> Iterator[dict[str, int]]:
    """Every way to have ``count`` units in these tiers."""
    if len(tiers) == 1:
        yield {tiers[0]: count}
        return
    for first in range(count + 1):
        for rest in spread(count - first, tiers[1:]):
            yield {tiers[0]: first, **rest}


def answers(found: list[Batch]) -> Iterator[Choice]:
    """Every choice of every batch."""
    for number, batch in enumerate(found):
        picks = itertools.product(*(range(len(role)) for role in batch.roles))
        places = [list(spread(u.count, list(u.homes))) for u in batch.units]
        for chosen, where in itertools.product(picks, itertools.product(*places)):
            yield Choice(number, chosen, where)


def brute(found: list[Batch], limits: dict[str, int]) -> int | None:
    """The least objective of all choices that fit."""
    good = [c for c in answers(found) if not check(found[c.batch], limits, c)]
    return min((objective(found[c.batch], c) for c in good), default=None)


@settings(max_examples=60)
@given(found=problems, limits=capacities)
def test_the_optimum_is_that_of_brute_force(found: list[Batch], limits: dict[str, int]) -> None:
    solved = solve(found, limits)
    expected = brute(found, limits)
    if expected is None:
        assert solved.status == "infeasible" and solved.bound is None
        return
    best = solved.value.choices[0]
    assert solved.status == "optimal" and solved.bound == solved.objective == expected
    assert check(found[best.batch], limits, best) == []
    assert objective(found[best.batch], best) == expected


@settings(max_examples=40)
@given(found=problems, limits=capacities)
def test_a_budget_that_fits_nothing_names_the_fewest_tiers_that_bind(
    found: list[Batch], limits: dict[str, int]
) -> None:
    solved = solve(found, limits)
    if solved.status != "infeasible":
        return
    (blamed,) = solved.value.choices
    alone = {tier: limits[tier] for tier in blamed.binding}
    assert blamed.binding and brute(found, alone) is None
    for tier in blamed.binding:
        others = {name: size for name, size in alone.items() if name != tier}
        assert brute(found, others) is not None
    for tier, least in blamed.least.items():
        assert brute(found, {**limits, tier: least}) is not None
        assert brute(found, {**limits, tier: least - 1}) is None


@settings(max_examples=40)
@given(found=problems, limits=capacities, more=st.integers(0, 20))
def test_more_room_is_never_slower(found: list[Batch], limits: dict[str, int], more: int) -> None:
    less = solve(found, limits)
    roomier = solve(found, {tier: size + more for tier, size in limits.items()})
    assert roomier.objective <= less.objective


@settings(max_examples=30)
@given(found=problems, limits=capacities)
def test_floors_change_nothing_and_near_answers_are_within_their_share(
    found: list[Batch], limits: dict[str, int]
) -> None:
    floors = [brute([batch], limits) or 0 for batch in found]
    plain, floored = solve(found, limits), solve(found, limits, floors=floors, near=0.5)
    assert floored.objective == plain.objective
    assert floored.status == plain.status
    if plain.status != "infeasible":
        ticks = floored.value.objectives
        assert list(ticks) == sorted(ticks) and ticks[-1] <= 1.5 * plain.objective
        for choice, taken in zip(floored.value.choices, ticks, strict=True):
            assert objective(found[choice.batch], choice) == taken
        inside = [f for f in floors if f and f <= 1.5 * plain.objective]
        assert len(ticks) >= len(inside)


@settings(max_examples=30)
@given(role=st.lists(options, min_size=1, max_size=6).map(tuple))
def test_what_is_left_out_is_beaten_by_what_is_kept(role: tuple[Option, ...]) -> None:
    kept = undominated(role)
    batch = Batch(0, (Span(1, 0, ROWS),), (0,) * ROWS, (role,), ())
    few = replace(batch, roles=(tuple(role[place] for place in kept),))
    for limits in ({"fast": 5, "slow": 5}, {"fast": 12, "slow": 3}, {}):
        assert brute([batch], limits) == brute([few], limits)


def test_answers_slower_than_asked_for_are_not_looked_for() -> None:
    batch = Batch(10, (Span(2, 0, 1),), (5,), (), ())
    solved = solve([batch], {}, most=19)
    assert solved.value.choices == () and solved.bound == 20
    assert solve([batch], {}, most=20).objective == 20


def test_only_batches_that_leave_room_are_looked_at() -> None:
    batch = Batch(10, (Span(2, 0, 1),), (5,), (), ())
    solved = solve([batch, batch, batch], {}, floors=[25, 20, 30])
    assert solved.objective == solved.bound == 20 and solved.value.effort.batches == 1


def test_the_same_problem_gives_the_same_answer() -> None:
    role = tuple(Option((7 * n % 5, 3 * n % 4), n) for n in range(9))
    batch = Batch(0, (Span(3, 0, 2),), (1, 1), (role, role), ())
    assert solve([batch], {}).value.choices == solve([batch], {}).value.choices


def test_solve_refuses_tables_that_do_not_fit_together() -> None:
    batch = Batch(0, (Span(1, 0, 2),), (1,), ((Option((1, 2)),),), ())
    with pytest.raises(
        ValueError, match=r"every load needs 1 rows; spans must have rows of 0\.\.1"
    ):
        solve([batch], {})


def test_the_checker_refuses_each_kind_of_fault() -> None:
    home = Home((0,), nbytes={"fast": 4})
    batch = Batch(0, (Span(1, 0, 1),), (0,), ((Option((1,)),),), (Units(2, {"fast": home}),))
    good = Choice(0, (0,), ({"fast": 2},))
    assert check(batch, {"fast": 8}, good) == []
    assert check(batch, {"fast": 7}, good) == ["tier 'fast': 8 bytes taken, capacity 7"]
    wrong = [
        (replace(good, options=()), "0 options and 1 kinds of units are decided"),
        (replace(good, options=(1,)), "option 1 of a role that has 1"),
        (replace(good, homes=({"fast": 1},)), r"units are \{'fast': 1\}, expected 2 together"),
        (replace(good, homes=({"slow": 2},)), r"units are in \['slow'\], which is no home"),
    ]
    for choice, text in wrong:
        with pytest.raises(AssertionError, match=text):
            faults = check(batch, {"fast": 8}, choice)
            assert not faults, "; ".join(faults)
