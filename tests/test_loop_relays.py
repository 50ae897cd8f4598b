"""Buffers that hand on to others: the bound of two pools in a row, and jobs that are alike."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.solvers.list_schedule import best_listed
from dovetail.solvers.loop_bounds import lowest_period, period_bounds
from dovetail.solvers.loop_problem import Hold, LoopProblem, Op
from dovetail.solvers.loop_relays import relays
from dovetail.solvers.modulo_schedule import solve


def relay(
    reads: list[int], copies: list[int], works: list[int], attention: int, room: tuple[int, int]
) -> LoopProblem:
    """A layer whose experts are read into ``p``, copied to ``q`` and used once attention ended."""
    ops, holds, names = [], [], []
    for i, (read, copy, work) in enumerate(zip(reads, copies, works, strict=True)):
        ops += [Op(f"read{i}", "disk", read), Op(f"copy{i}", "link", copy, ((f"read{i}", 0),))]
        ops.append(Op(f"work{i}", "gpu", work, (("attention", 0), (f"copy{i}", 0))))
        holds.append(Hold("p", 1, f"read{i}", ((f"copy{i}", 0),)))
        holds.append(Hold("q", 1, f"copy{i}", ((f"work{i}", 0),)))
        names.append(f"work{i}")
    ops.append(Op("attention", "gpu", attention, tuple((name, 1) for name in names)))
    return LoopProblem(tuple(ops), tuple(holds), {"p": room[0], "q": room[1]})


def test_buffers_in_a_row_are_bounded_together() -> None:
    problem = relay([6] * 5, [1] * 5, [1] * 5, 30, (2, 1))
    bounds = period_bounds(problem)
    # Three experts wait for attention; two are read after it, the last is copied and used.
    assert bounds["relay:p+q"] == 1 + 2 * 6 + (1 + 1 + 30 + 1)
    assert max(value for name, value in bounds.items() if not name.startswith("relay")) == 39
    solved = solve(problem)
    assert (solved.status, solved.objective) == ("optimal", bounds["relay:p+q"])


def test_what_is_handed_on_counts_once() -> None:
    problem = relay([3, 3], [1, 1], [1, 1], 5, (2, 2))
    ops = tuple(
        replace(op, after=(*op.after, ("read1", 0))) if op.name == "copy0" else op
        for op in problem.ops
    )
    both = [Hold("p", 1, name, (("copy0", 0),)) for name in ("read0", "read1")]
    (found,) = relays(replace(problem, ops=ops, holds=(*both, *problem.holds[1::2])))
    assert [hold.first for hold in found.holds] == ["read0"]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_schedule_beats_the_bound_of_buffers_in_a_row(data: st.DataObject) -> None:
    ticks, count = st.integers(0, 5), data.draw(st.integers(3, 5))
    lines = [data.draw(st.lists(ticks, min_size=count, max_size=count)) for _ in range(3)]
    attention = data.draw(st.integers(0, 15))
    room = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    problem = relay(lines[0], lines[1], lines[2], attention, room)
    # The list schedules are made as if nothing were known of bounds.
    listed = best_listed(problem, 1)
    assert listed is not None and lowest_period(problem) <= listed.period


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.integers(0, 6),
    st.integers(1, 2),
)
def test_alike_jobs_may_go_first_in_first_out(ticks: list[int], last: int, room: int) -> None:
    problem = relay([ticks[0]] * 3, [ticks[1]] * 3, [ticks[2]] * 3, last, (room, room))
    lines = tuple(tuple(f"{stage}{i}" for i in range(3)) for stage in ("read", "copy", "work"))
    free, chained = solve(problem, work=2.0), solve(replace(problem, chains=lines), work=2.0)
    assert chained.status == "optimal" and chained.objective <= free.objective
    assert free.bound is not None and free.bound <= chained.objective
