"""Engines that fill or drain a pool, busy with something else: bounds that schedules attain."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.solvers.list_schedule import best_listed
from dovetail.solvers.loop_bounds import lowest_period, period_bounds
from dovetail.solvers.loop_problem import Hold, LoopProblem, Op
from dovetail.solvers.modulo_schedule import solve


def fed(
    loads: list[int], works: list[int], weights: int, other: int, room: int, *, late: bool = False
) -> LoopProblem:
    """A layer whose groups' keys are copied to ``kv`` by a link that also copies weights, and are
    used by a GPU that also does other work; where ``late``, copies wait for that work."""
    after = (("other", 0),) if late else ()
    ops, holds, names = [Op("weights", "link", weights)], [], []
    for i, (load, work) in enumerate(zip(loads, works, strict=True)):
        ops.append(Op(f"load{i}", "link", load, after))
        ops.append(Op(f"work{i}", "gpu", work, (("weights", 0), (f"load{i}", 0))))
        holds.append(Hold("kv", 1, f"load{i}", ((f"work{i}", 0),)))
        names.append(f"work{i}")
    ops.append(Op("other", "gpu", other, tuple((name, 1) for name in names) if late else ()))
    return LoopProblem(tuple(ops), tuple(holds), {"kv": room})


def test_a_long_copy_of_weights_starves_the_gpu() -> None:
    problem = fed([6] * 5, [15] * 5, 54, 0, 2)
    bounds = period_bounds(problem)
    # While weights and the copies around them run, two groups can be worked on, and three cannot.
    assert bounds["stall:kv"] == 6 + 54 + 6 + 3 * 15
    assert max(value for name, value in bounds.items() if name != "stall:kv") < bounds["stall:kv"]
    solved = solve(problem)
    assert (solved.status, solved.objective) == ("optimal", bounds["stall:kv"])


def test_buffers_stay_full_while_the_gpu_does_other_work() -> None:
    problem = fed([3] * 4, [1] * 4, 0, 20, 1)
    # One copy runs beside it, and the rest take turns with their work.
    assert period_bounds(problem)["stall:kv"] == 20 - 3 + 4 * (3 + 1)
    solved = solve(problem)
    assert (solved.status, solved.objective) == ("optimal", 33)


def test_copies_that_wait_for_the_work_never_run_beside_it() -> None:
    problem = fed([3] * 4, [1] * 4, 0, 20, 1, late=True)
    assert period_bounds(problem)["stall:kv"] == 20 + 4 * (3 + 1)
    solved = solve(problem)
    assert (solved.status, solved.objective) == ("optimal", 36)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_schedule_beats_the_bound_of_stalls(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    loads, works = (
        data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)) for _ in range(2)
    )
    weights, other = data.draw(st.integers(0, 25)), data.draw(st.integers(0, 25))
    room, late = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    problem = fed(loads, works, weights, other, room, late=late)
    # The list schedules are made as if nothing were known of bounds.
    listed = best_listed(problem, 1)
    assert listed is not None and lowest_period(problem) <= listed.period
