"""Affinity placement against brute force, on planted and on missing affinity, and its checker."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.solvers.expert_affinity import (
    AffinityProblem,
    Block,
    Edge,
    alternate,
    check,
    crossing_cost,
    lower_bound,
    start,
    swap,
)
from dovetail.solvers.expert_affinity_solve import solve

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def chain(
    flows: list[Floats], devices: int, slack: float, cost: Floats | None = None
) -> AffinityProblem:
    """Layers with ``flows`` between them; loads are what flows in (out, for the first)."""
    weights = [flows[0].sum(1), *(flow.sum(0) for flow in flows)]
    each = -(-len(weights[0]) // devices)
    blocks = tuple(
        Block(w, np.full(devices, each), max(w.sum() / devices * (1 + slack), w.max()))
        for w in weights
    )
    edges = tuple(Edge(n, n + 1, flow) for n, flow in enumerate(flows))
    return AffinityProblem(blocks, edges, 1 - np.eye(devices) if cost is None else cost)


def planted(
    layers: int, experts: int, devices: int, noise: float, seed: int
) -> tuple[AffinityProblem, list[Ints]]:
    """Flows of clusters that tokens leave with probability ``noise``, and the clusters."""
    rng = np.random.default_rng(seed)
    home = [rng.permutation(np.arange(experts) % devices) for _ in range(layers)]
    flows = []
    for here, there in pairwise(home):
        same = here[:, None] == there[None, :]
        rate = np.where(same, (1 - noise) * devices / experts, 0) + noise / experts
        flows.append(rng.poisson(rate * 2000).astype(float))
    return chain(flows, devices, 1.0), home


def ways(problem: AffinityProblem) -> list[list[Ints]]:
    """For every block, all assignments within its counts and limit."""
    found = []
    for block in problem.blocks:
        devices = range(len(block.count))
        kept = []
        for at in product(devices, repeat=len(block.weight)):
            count = np.bincount(at, minlength=len(devices))
            load = np.bincount(at, weights=block.weight, minlength=len(devices))
            if (count <= block.count).all() and (load <= block.limit * (1 + 1e-9)).all():
                kept.append(np.array(at))
        found.append(kept)
    return found


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.5]))
def test_solve_equals_brute_force_at_4_experts_2_devices_3_layers(seed: int, slack: float) -> None:
    rng = np.random.default_rng(seed)
    flows = [rng.integers(0, 9, (4, 4)).astype(float) for _ in range(2)]
    problem = chain(flows, 2, slack)
    every = list(product(*ways(problem)))
    solved = solve(problem, starts=2, work=2.0)
    if not every:
        assert solved.status == "infeasible"
        return
    best = min(crossing_cost(problem, x) for x in every)
    assert not check(problem, solved)
    assert solved.status == "optimal"
    assert solved.objective == pytest.approx(best)
    assert lower_bound(problem) <= best + 1e-9


def test_solve_equals_brute_force_with_nodes_and_token_groups() -> None:
    rng = np.random.default_rng(3)
    near = np.array([[0, 1, 5, 5], [1, 0, 5, 5], [5, 5, 0, 1], [5, 5, 1, 0]], float)
    groups = Block(np.array([3.0, 2, 2]), np.full(4, 2), np.inf)
    experts = Block(np.ones(4), np.ones(4, int), np.inf)
    edges = (
        Edge(0, 1, rng.integers(0, 9, (3, 4)).astype(float)),
        Edge(1, 2, rng.integers(0, 9, (4, 4)).astype(float)),
    )
    problem = AffinityProblem((groups, experts, experts), edges, near)
    solved = solve(problem, work=20.0)
    best = min(crossing_cost(problem, x) for x in product(*ways(problem)))
    assert solved.objective == pytest.approx(best)
    assert not check(problem, solved)


def test_alternation_finds_planted_clusters() -> None:
    problem, home = planted(6, 32, 4, 0.3, 0)
    found = alternate(problem, start(problem, 0))
    assert crossing_cost(problem, tuple(found)) <= crossing_cost(problem, tuple(home)) * (1 + 1e-9)


def test_swaps_bring_loads_under_the_limit() -> None:
    problem, home = planted(3, 16, 4, 0.3, 1)
    tight = replace(
        problem,
        blocks=tuple(replace(b, limit=float(b.weight.sum()) / 4 * 1.02) for b in problem.blocks),
    )
    heavy = [np.argsort(np.argsort(-b.weight)) // 4 for b in tight.blocks]
    found = swap(tight, [np.asarray(x) for x in heavy])
    for block, at in zip(tight.blocks, found, strict=True):
        assert np.bincount(at, weights=block.weight).max() <= block.limit * (1 + 1e-6)
    assert len(home) == 3


def test_without_affinity_there_is_nothing_to_gain_on_other_tokens() -> None:
    """Trained on one sample of independent layers and judged on another: as many crossings as any
    placement has. Planted affinity, in contrast, carries over."""
    rng = np.random.default_rng(5)
    for noise, most, least in ((1.0, 0.76, 0.74), (0.2, 0.30, 0.0)):
        problem, home = planted(4, 16, 4, noise, 7)
        solved = solve(problem, starts=2, work=1.0)
        other = tuple(
            replace(e, flow=rng.poisson(_rate(home[e.first], home[e.second], noise)).astype(float))
            for e in problem.edges
        )
        held_out = replace(problem, edges=other)
        share = crossing_cost(held_out, solved.value) / sum(e.flow.sum() for e in other)
        assert least <= share <= most


def _rate(here: Ints, there: Ints, noise: float) -> Floats:
    same = here[:, None] == there[None, :]
    return np.asarray((np.where(same, (1 - noise) * 4 / 16, 0) + noise / 16) * 2000)


def test_checker_refuses_broken_answers() -> None:
    problem, _ = planted(3, 8, 2, 0.3, 2)
    solved = solve(problem, starts=1, work=1.0)
    assert not check(problem, solved)
    crowded = (np.zeros(8, int), *solved.value[1:])
    flipped = (1 - solved.value[0], *solved.value[1:])
    tight = replace(problem, blocks=tuple(replace(b, limit=1.0) for b in problem.blocks))
    for broken, of, said in (
        (replace(solved, value=crowded), problem, "more items"),
        (replace(solved, value=flipped), problem, "crossing cost is"),
        (replace(solved, bound=solved.objective * 2), problem, "below the bound"),
        (solved, tight, "over the limit"),
    ):
        found = check(of, broken)
        assert any(said in p for p in found), found
