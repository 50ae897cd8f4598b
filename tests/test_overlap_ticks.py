"""Loop bodies are solved in coarser ticks: what is proved there holds for the exact durations."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.passes.gpu.overlap import _coarser, _finer
from dovetail.solvers.list_schedule import best_listed
from dovetail.solvers.loop_problem import Hold, LoopProblem, Op
from dovetail.solvers.modulo_schedule import solve


def taking_turns(loads: list[int], works: list[int]) -> LoopProblem:
    """Copies and their work, one after the other in one buffer."""
    ops, holds = [], []
    for i, (load, work) in enumerate(zip(loads, works, strict=True)):
        ops += [Op(f"load{i}", "link", load), Op(f"work{i}", "gpu", work, ((f"load{i}", 0),))]
        holds.append(Hold("buffer", 1, f"load{i}", ((f"work{i}", 0),)))
    return LoopProblem(tuple(ops), tuple(holds), {"buffer": 1})


def test_work_shorter_than_a_tick_is_not_counted_as_one() -> None:
    problem = taking_turns([100] * 4, [3] * 4)
    coarse = _coarser(problem, 10)
    # Every work holds the buffer for a tick of ten, though it takes three.
    solved, exact = solve(coarse), solve(problem)
    assert (solved.bound, exact.objective) == (44, 412)
    assert _finer(coarse, 10, 44) == 390


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=3),
    st.integers(1, 15),
)
def test_a_bound_in_coarser_ticks_holds(pairs: list[tuple[int, int]], grain: int) -> None:
    problem = taking_turns([load for load, _ in pairs], [work for _, work in pairs])
    coarse = _coarser(problem, grain)
    listed = best_listed(problem, 1)
    bound = solve(coarse, work=0.2).bound
    assert listed is not None and bound is not None
    assert _finer(coarse, grain, bound) <= listed.period
