"""Experts dealt to CPU and GPU by load, and HeteGen's share: optima against brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.solvers import expert_assignment, linear_share
from dovetail.solvers.expert_assignment import AssignProblem, by_load, check, greedy, makespan

TIMES = st.floats(0.0, 10.0)


def simulated(problem: AssignProblem, on_cpu: tuple[bool, ...]) -> float:
    """The end of the best order of copies and products, by trying all."""
    on_gpu = [i for i, here in enumerate(on_cpu) if not here]
    best = math.inf
    for order in itertools.permutations(on_gpu):
        copied = computed = 0.0
        for i in order:
            copied += problem.copy[i]
            computed = max(computed, copied) + problem.gpu[i]
        best = min(best, computed)
    return max(best, sum(t for t, here in zip(problem.cpu, on_cpu, strict=True) if here))


@st.composite
def problems(draw: st.DrawFn, most: int = 5) -> AssignProblem:
    count = draw(st.integers(1, most))
    cpu, gpu, copy = (tuple(draw(TIMES) for _ in range(count)) for _ in range(3))
    held = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return AssignProblem(cpu, gpu, tuple(0.0 if h else c for h, c in zip(held, copy, strict=True)))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_optimum_is_that_of_brute_force(problem: AssignProblem) -> None:
    sides = itertools.product((False, True), repeat=len(problem.cpu))
    legal = [s for s in sides if not check(problem, s)]
    for side in legal:
        assert makespan(problem, side) == pytest.approx(simulated(problem, side), abs=1e-9)
    best = min(makespan(problem, side) for side in legal)
    solved = expert_assignment.solve(problem)
    assert solved.status == "optimal" and not check(problem, solved.value)
    assert solved.objective == pytest.approx(best, rel=1e-4, abs=1e-9)
    assert solved.bound is not None and solved.bound <= best * (1 + 1e-9)
    assert expert_assignment.lower_bound(problem) <= best * (1 + 1e-9) + 1e-12
    quick = greedy(problem)
    assert quick.objective >= best * (1 - 1e-9)
    assert quick.bound is not None and quick.bound <= best * (1 + 1e-9) + 1e-12


def routed(seed: int, experts: int, tokens: int, held: int) -> AssignProblem:
    """A layer under skewed routing: the CPU is slower by the token, copies take equally long."""
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(experts, 0.5))
    rows = generator.multinomial(tokens, shares).astype(float)
    cpu = np.where(rows > 0, 0.3 + 0.10 * rows, 0.0)
    gpu = np.where(rows > 0, 0.05 + 0.004 * rows, 0.0)
    copy = np.where((rows > 0) & (np.arange(experts) >= held), 1.0, 0.0)
    return AssignProblem(tuple(cpu.tolist()), tuple(gpu.tolist()), tuple(copy.tolist()))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("experts", "tokens"), [(8, 16), (16, 64), (32, 32), (60, 240)])
def test_greedy_is_near_the_optimum_and_no_static_mapping_beats_it(
    seed: int, experts: int, tokens: int
) -> None:
    problem = routed(seed, experts, tokens, held=seed % 4 * experts // 8)
    quick, proved = greedy(problem), expert_assignment.solve(problem, work=0.5)
    assert quick.objective <= 1.05 * proved.objective
    assert not check(problem, quick.value)
    # A static mapping gives the CPU the same experts whatever their load.
    movable = [i for i, copy in enumerate(problem.copy) if copy]
    for count in range(len(movable) + 1):
        static = tuple(i in movable[:count] for i in range(experts))
        assert quick.objective <= makespan(problem, static) * (1 + 1e-9)
    sides, seconds = by_load(problem)
    assert seconds == pytest.approx(makespan(problem, sides))
    assert seconds <= 1.25 * proved.objective


def test_malformed_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="1, 2 and 1 times"):
        AssignProblem((1.0,), (1.0, 2.0), (1.0,))
    with pytest.raises(ValueError, match="finite and not negative"):
        AssignProblem((1.0,), (-1.0,), (1.0,))
    held = AssignProblem((1.0,), (1.0,), (0.0,))
    assert check(held, (True,)) == ["expert 0 is held by the GPU and assigned to the CPU"]


@given(st.floats(1e-6, 1e3), st.floats(0, 1e3), st.floats(0, 1e3))
def test_closed_form_share_is_the_best_of_a_sweep(cpu: float, link: float, gpu: float) -> None:
    solved = linear_share.solve(cpu, link, gpu)
    assert 0 <= solved.value <= 1
    sweep = [linear_share.seconds(i / 1000, cpu, link, gpu) for i in range(1001)]
    assert solved.objective <= min(sweep) * (1 + 1e-9)
    # The sweep's step misses the best share by at most a thousandth of either side's slope.
    assert min(sweep) - solved.objective <= max(cpu, link, gpu) / 1000 + 1e-12


def test_shares_at_their_ends() -> None:
    assert linear_share.solve(1.0, 0.0, 0.0).value == 0.0
    assert linear_share.solve(0.0, 1.0, 0.5).value == 1.0
    with pytest.raises(ValueError, match="finite and not negative"):
        linear_share.solve(-1.0, 0.0, 0.0)
