"""Solvers of expert placement against brute force, and their checkers against broken answers."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.solvers import expert_copies, expert_robust, expert_split
from dovetail.solvers.expert_copies import fewest_copies
from dovetail.solvers.expert_eplb import eplb
from dovetail.solvers.expert_exact import exact_even, exact_weighted
from dovetail.solvers.expert_fill import fill
from dovetail.solvers.expert_greedy_copies import greedy_copies, least
from dovetail.solvers.expert_robust import price_bound, relative, robust_split
from dovetail.solvers.expert_search import SlotSearch
from dovetail.solvers.expert_split import Split, split
from dovetail.solvers.expert_weigh import improve

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# The example of the published program's README: 12 experts, 16 slots, 4 groups, 2 nodes, 8 devices.
PUBLISHED_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED_SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def zipf(power: float, layers: int, experts: int, seed: int) -> Floats:
    """Loads of ``layers`` by Zipf's law, each in another order."""
    ranks = np.tile(1 / np.arange(1, experts + 1) ** power, (layers, 1))
    return np.asarray(np.random.default_rng(seed).permuted(ranks, axis=1))


def hall(loads: Floats, held: Bools) -> float:
    """The best heaviest device of any shares, by every set of devices."""
    devices = range(held.shape[1])
    worst = 0.0
    for size in range(1, len(devices) + 1):
        for inside in combinations(devices, size):
            outside = [g for g in devices if g not in inside]
            worst = max(worst, float(loads[~held[:, outside].any(1)].sum()) / size)
    return worst


def holdings(experts: int, capacity: Ints) -> Iterator[Bools]:
    """Every way that devices can hold experts."""
    rows = [
        [row for row in product((False, True), repeat=experts) if sum(row) <= room]
        for room in capacity.tolist()
    ]
    for columns in product(*rows):
        held = np.array(columns).T
        if held.any(1).all():
            yield held


@st.composite
def small(draw: st.DrawFn) -> tuple[Floats, Ints]:
    """Loads of up to 4 experts, and the slots of up to 3 devices that hold them."""
    experts, devices = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    loads = draw(st.lists(st.integers(0, 20), min_size=experts, max_size=experts))
    capacity = draw(
        st.lists(st.integers(1, 3), min_size=devices, max_size=devices).filter(
            lambda c: sum(c) >= experts
        )
    )
    return np.array(loads, float), np.array(capacity)


@st.composite
def held_small(draw: st.DrawFn) -> tuple[Floats, Ints, Bools]:
    """The same with a placement."""
    loads, capacity = draw(small())
    ways = list(holdings(len(loads), capacity))
    return loads, capacity, draw(st.sampled_from(ways))


def test_eplb_equals_the_published_example() -> None:
    assert eplb(PUBLISHED_LOADS, 16, 4, 2, 8).tolist() == PUBLISHED_SLOTS


def literal_eplb(
    loads: list[float], slots: int, groups: int, nodes: int, devices: int
) -> list[int]:
    """The published steps one at a time, on scalars of single precision."""

    def pack(weights: list[np.float32], packs: int) -> list[list[int]]:
        each = len(weights) // packs
        if each == 1:
            return [[i] for i in range(packs)]
        found: list[list[int]] = [[] for _ in range(packs)]
        total = [np.float32(0)] * packs
        for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
            pack = min((p for p in range(packs) if len(found[p]) < each), key=lambda p: total[p])
            found[pack].append(item)
            total[pack] += weights[item]
        return found

    if groups % nodes:
        groups = nodes = 1
    w = [np.float32(x) for x in loads]
    size = len(w) // groups
    group_w = [
        np.sum(np.array(w[g * size : (g + 1) * size]), dtype=np.float32) for g in range(groups)
    ]
    answer = []
    for packed in pack(group_w, nodes):
        experts = [g * size + i for g in packed for i in range(size)]
        count, replicas = [1] * len(experts), list(range(len(experts)))
        while len(replicas) < slots // nodes:
            each = [w[e] / np.float32(c) for e, c in zip(experts, count, strict=True)]
            heaviest = each.index(max(each))
            replicas.append(heaviest)
            count[heaviest] += 1
        weights = [w[experts[i]] / np.float32(count[i]) for i in replicas]
        for device in pack(weights, devices // nodes):
            answer += [experts[replicas[i]] for i in device]
    return answer


@pytest.mark.parametrize(
    ("slots", "groups", "nodes", "devices"),
    [(20, 4, 2, 4), (24, 1, 1, 8), (16, 3, 2, 8), (32, 8, 4, 8)],
)
def test_eplb_equals_its_steps_one_at_a_time(
    slots: int, groups: int, nodes: int, devices: int
) -> None:
    experts = 12 if groups in (3, 4) else 16
    loads = np.random.default_rng(1).integers(0, 50, (6, experts)).astype(float)
    loads[0] = 7.0
    expected = [literal_eplb(row, slots, groups, nodes, devices) for row in loads.tolist()]
    assert eplb(loads, slots, groups, nodes, devices).tolist() == expected


def test_eplb_refuses_slots_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="slots over devices: 17 over 8"):
        eplb(PUBLISHED_LOADS, 17, 4, 2, 8)


@given(held_small())
def test_split_equals_brute_force(case: tuple[Floats, Ints, Bools]) -> None:
    loads, _, held = case
    solved = split(loads, held)
    assert not expert_split.check(loads, held, solved)
    assert solved.objective == pytest.approx(hall(loads, held), abs=1e-6)


def test_split_is_even_beyond_the_heaviest_device() -> None:
    held = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool)
    loads = np.array([9.0, 4.0, 2.0])
    solved = split(loads, held)
    assert loads @ solved.value.shares == pytest.approx([9, 2, 2, 2])


def test_split_checker_refuses_broken_answers() -> None:
    held = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]], bool)
    loads = np.array([4.0, 2.0, 6.0])
    solved = split(loads, held)
    assert not expert_split.check(loads, held, solved)
    uneven = np.array([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    half = solved.value.shares * 0.5
    elsewhere = np.eye(3)[[2, 1, 0]]
    for shares, said in (
        (uneven, "heaviest device"),
        (half, "do not sum to 1"),
        (elsewhere, "does not hold"),
    ):
        broken = replace(solved, value=Split(shares, solved.value.tight))
        assert any(said in p for p in expert_split.check(loads, held, broken))
    unproved = replace(solved, value=Split(uneven, (1,)), objective=10.0)
    assert any("prove only" in p for p in expert_split.check(loads, held, unproved))


def test_split_refuses_an_expert_without_a_device() -> None:
    with pytest.raises(ValueError, match="no device holds expert 1"):
        split(np.ones(2), np.array([[True], [False]]))


@settings(max_examples=40)
@given(small())
def test_exact_weighted_equals_brute_force(case: tuple[Floats, Ints]) -> None:
    loads, capacity = case
    best = min(hall(loads, held) for held in holdings(len(loads), capacity))
    solved = exact_weighted(loads, capacity)
    assert solved.objective == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert solved.bound is not None
    assert solved.bound <= best * (1 + 1e-6) + 1e-9
    if best:
        assert solved.status == "optimal"


def test_random_steps_come_close_to_even_with_few_slots_to_spare() -> None:
    loads, capacity = np.array(PUBLISHED_LOADS[0], float), np.full(8, 2)
    start = np.zeros((12, 8), bool)
    start[np.arange(12), np.arange(12) % 8] = True
    mean = loads.sum() / 8
    found = improve(loads, start, capacity, 600, mean)
    assert found.any(1).all()
    assert (found.sum(0) <= capacity).all()
    assert mean / split(loads, found).objective > 0.95 > mean / split(loads, start).objective


@settings(max_examples=40)
@given(small(), st.integers(0, 9))
def test_exact_even_equals_brute_force_over_scenarios(case: tuple[Floats, Ints], seed: int) -> None:
    first, capacity = case
    loads = np.stack([first, np.random.default_rng(seed).permutation(first)])
    ratio = relative(loads, len(capacity))
    ways = holdings(len(first), capacity)
    best = min(float((ratio @ (h / h.sum(1, keepdims=True))).max()) for h in ways)
    solved = exact_even(loads, capacity)
    if best:
        assert solved.objective == pytest.approx(best, rel=1e-5)
        assert solved.status == "optimal"


@settings(max_examples=60)
@given(held_small(), st.sampled_from([1.0, 1.05, 1.3, 2.0]))
def test_fewest_copies_equals_brute_force(case: tuple[Floats, Ints, Bools], slack: float) -> None:
    loads, capacity, now = case
    limit = float(loads.sum()) / len(capacity) * slack
    enough = [
        int((held & ~now).sum())
        for held in holdings(len(loads), capacity)
        if hall(loads, held) <= limit * (1 + 1e-9)
    ]
    solved = fewest_copies(loads, now, capacity, limit, work=5.0)
    assert least(loads, now, limit) <= min(enough, default=now.size)
    if enough:
        assert solved.status == "optimal"
        assert solved.objective == solved.bound == min(enough)
        assert not expert_copies.check(loads, now, capacity, limit, solved)
    else:
        assert solved.status == "infeasible"


@given(held_small())
def test_greedy_copies_keep_slots_and_their_limit(case: tuple[Floats, Ints, Bools]) -> None:
    loads, capacity, now = case
    for most in (0, 1, 2):
        held = greedy_copies(loads, now, capacity, float(loads.sum()) / len(capacity), most)
        assert held.any(1).all()
        assert (held.sum(0) <= capacity).all()
        assert (held & ~now).sum() <= most
        assert split(loads, held).objective <= split(loads, now).objective * (1 + 1e-9)


def test_copies_checker_refuses_broken_answers() -> None:
    loads = np.array([8.0, 1.0, 1.0, 2.0])
    now = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    capacity, limit = np.array([3, 3]), 6.0
    solved = fewest_copies(loads, now, capacity, limit)
    assert not expert_copies.check(loads, now, capacity, limit, solved)
    assert solved.objective == 1
    everywhere = np.ones((4, 2), bool)
    nowhere = solved.value.copy()
    nowhere[0] = False
    for broken, said in (
        (replace(solved, value=everywhere), "more than its slots"),
        (replace(solved, value=nowhere), "has no device"),
        (replace(solved, objective=0), "1 copies, not 0"),
        (replace(solved, value=now, objective=0, bound=0), "the limit is 6.0"),
        (replace(solved, value=now, objective=0), "fewer than the bound"),
    ):
        found = expert_copies.check(loads, now, capacity, limit, broken)
        assert any(said in problem for problem in found), found


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
@pytest.mark.parametrize(("slots", "devices"), [(72, 8), (80, 16), (75, 9)])
def test_fill_makes_every_device_carry_the_mean(power: float, slots: int, devices: int) -> None:
    loads = zipf(power, 5, 64, 3)
    capacity = np.diff(np.linspace(0, slots, devices + 1).astype(int))
    state = fill(loads, capacity)
    assert state.load == pytest.approx(np.tile(loads.sum(1)[:, None] / devices, (1, devices)))
    for layer, experts in enumerate(state.expert):
        served = np.zeros(64)
        for row, amount, room in zip(experts, state.amount[layer], capacity, strict=True):
            used = row[row >= 0]
            assert len(used) == len(set(used.tolist())) <= room
            np.add.at(served, used, amount[row >= 0])
        assert served == pytest.approx(loads[layer])


def test_search_keeps_its_books_and_never_an_expert_twice_on_a_device() -> None:
    loads = zipf(1.2, 4, 32, 0)[:, None] * 8
    search = SlotSearch(loads, np.array([5] * 7 + [6]))
    before = search.worst()
    search.run(np.ones(4), rounds=3)
    assert (search.worst() <= before).all()
    assert (search.worst() < before).any()
    for layer in range(4):
        slots = search.slots[layer][search.exists]
        count = np.bincount(slots, minlength=32)
        assert (count >= 1).all()
        assert (count == search.count[layer]).all()
        value = np.append(loads[layer, 0] / count, 0.0)
        load = [
            value[row[ok]].sum() for row, ok in zip(search.slots[layer], search.exists, strict=True)
        ]
        assert search.load[layer, 0] == pytest.approx(load)
        assert all(
            len(set(row[ok])) == ok.sum()
            for row, ok in zip(search.slots[layer], search.exists, strict=True)
        )


@settings(max_examples=40)
@given(small())
def test_search_is_not_below_the_optimum(case: tuple[Floats, Ints]) -> None:
    loads, capacity = case
    if not loads.any() or capacity.sum() > len(loads) * len(capacity):
        return
    search = SlotSearch(relative(loads, len(capacity))[None, None], capacity)
    search.run(np.ones(1), rounds=5)
    assert search.worst()[0] >= exact_even(loads[None], capacity).objective * (1 - 1e-5)


@settings(max_examples=50)
@given(held_small(), st.integers(0, 9))
def test_robust_split_is_proved_by_its_prices(case: tuple[Floats, Ints, Bools], seed: int) -> None:
    first, capacity, held = case
    loads = np.stack([first, np.random.default_rng(seed).permutation(first)])
    solved = robust_split(loads, held)
    assert not expert_robust.check(loads, held, solved)
    assert solved.status == "optimal"
    alone = robust_split(loads[:1], held).objective
    if first.sum():
        assert alone == pytest.approx(split(first, held).objective * len(capacity) / first.sum())


def test_robust_checker_refuses_broken_answers() -> None:
    held = np.ones((2, 2), bool)
    loads = np.array([[4.0, 1.0], [1.0, 4.0]])
    solved = robust_split(loads, held)
    worse = replace(solved.value, shares=np.eye(2))
    cheap = replace(solved.value, prices=np.eye(2) / 2)
    assert price_bound(relative(loads, 2), held, cheap.prices) < 1
    for value, said in ((worse, "worst ratio is off"), (cheap, "do not prove the bound")):
        found = expert_robust.check(loads, held, replace(solved, value=value))
        assert any(said in problem for problem in found), found
