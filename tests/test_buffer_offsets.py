"""Buffer offsets against brute force, their bound, and identities of time on a circle."""

import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.solvers.buffer_offsets import EXACT, Buffer, check, solve

PERIOD = 8


def alive(b: Buffer, period: int | None) -> set[int]:
    times = range(b.start, b.end)
    return {t if period is None else t % period for t in times}


def brute(buffers: Sequence[Buffer], period: int | None) -> int:
    """The least peak over all orders, each buffer right above those before it that it meets.

    Exact: taken in the order of an optimum's offsets, no buffer ends up above its place there.
    """
    peaks = []
    for order in permutations(buffers):
        offsets: dict[str, int] = {}
        for n, b in enumerate(order):
            met = [o for o in order[:n] if alive(o, period) & alive(b, period)]
            floor = max((offsets[o.name] + o.size for o in met), default=0)
            offsets[b.name] = -(-floor // b.align) * b.align
        peaks.append(max((offsets[b.name] + b.size for b in order), default=0))
    return min(peaks)


@st.composite
def pools(draw: st.DrawFn, most: int = 5, circle: bool = True) -> tuple[list[Buffer], int | None]:
    period = PERIOD if circle and draw(st.booleans()) else None
    buffers = []
    for i in range(draw(st.integers(0, most))):
        start, length = draw(st.integers(-3, 9)), draw(st.integers(1, PERIOD))
        size, align = draw(st.integers(1, 20)), draw(st.sampled_from((1, 1, 2, 4, 3)))
        buffers.append(Buffer(f"b{i}", size, start, start + length, align))
    return buffers, period


def most_alive(buffers: Sequence[Buffer], period: int | None) -> int:
    times = {t for b in buffers for t in alive(b, period)}
    return max((sum(b.size for b in buffers if t in alive(b, period)) for t in times), default=0)


@settings(max_examples=200)
@given(pools())
def test_the_peak_is_brute_forces(pool: tuple[list[Buffer], int | None]) -> None:
    buffers, period = pool
    solved = solve(buffers, period=period)
    assert solved.objective == brute(buffers, period) and solved.status == "optimal"
    assert solved.bound == solved.objective >= most_alive(buffers, period)
    assert check(buffers, solved.value, int(solved.objective), period) == []


@settings(max_examples=30)
@given(pools(most=30))
def test_greedy_alone_is_sound(pool: tuple[list[Buffer], int | None]) -> None:
    buffers, period = pool
    solved = solve(buffers, period=period, work=0.0)
    assert check(buffers, solved.value, None, period) == []
    assert solved.bound is not None
    assert most_alive(buffers, period) <= solved.bound <= solved.objective
    assert solved.objective <= sum(b.size + b.align - 1 for b in buffers)


@settings(max_examples=50)
@given(pools(circle=False), st.integers(-20, 20))
def test_a_long_period_is_none_and_time_has_no_origin(
    pool: tuple[list[Buffer], int | None], later: int
) -> None:
    buffers, _ = pool
    straight = solve(buffers).objective
    assert solve(buffers, period=100).objective == straight
    moved = [replace(b, start=b.start + later, end=b.end + later) for b in buffers]
    assert solve(moved).objective == straight
    circle = solve(buffers, period=PERIOD).objective
    assert solve(moved, period=PERIOD).objective == circle >= straight


@settings(max_examples=30)
@given(pools())
def test_a_capacity_is_met_or_proved_too_small(pool: tuple[list[Buffer], int | None]) -> None:
    buffers, period = pool
    least = brute(buffers, period)
    assert solve(buffers, least, period=period).status == "optimal"
    if least:
        refused = solve(buffers, least - 1, period=period)
        assert (refused.status, refused.value) == ("infeasible", {})
        assert refused.bound is not None and refused.bound > least - 1


def test_where_a_pool_cannot_reach_the_most_alive_that_is_proved() -> None:
    # At most two of these are alive at a time, each meets its two neighbours on an odd circle.
    buffers = [Buffer(f"b{i}", 1, 2 * i, 2 * i + 3) for i in range(5)]
    solved = solve(buffers, period=10)
    assert most_alive(buffers, 10) == 2
    assert (solved.objective, solved.bound, solved.status) == (3, 3, "optimal")


def test_alignment_is_in_the_bound() -> None:
    buffers = [Buffer(f"b{i}", 65, 0, 2, align=64) for i in range(10)]
    solved = solve(buffers, work=0.0)
    assert solved.status == "optimal" and solved.objective == 9 * 128 + 65


def test_two_thousand_buffers_of_a_layered_model() -> None:
    draw = random.Random(3)
    buffers = []
    for i in range(2000):
        length = draw.choice((1, 1, 2, 3, 40))
        buffers.append(Buffer(f"b{i}", 256 * draw.randint(1, 64), i // 4, i // 4 + length, 256))
    assert len(buffers) > EXACT
    solved = solve(buffers)
    assert check(buffers, solved.value) == []
    assert solved.bound is not None and solved.objective <= 1.1 * solved.bound


def test_the_same_offsets_every_time() -> None:
    draw = random.Random(4)
    starts = [draw.randint(0, 30) for _ in range(40)]
    buffers = [
        Buffer(f"b{i}", draw.randint(1, 99), s, s + draw.randint(1, 9))
        for i, s in enumerate(starts)
    ]
    first, second = (solve(buffers, work=0.5) for _ in range(2))
    assert first.value == second.value and first.bound == second.bound


@pytest.mark.parametrize(
    ("buffers", "period", "message"),
    [
        ([Buffer("a", 0, 0, 1)], None, "size and align must be at least 1"),
        ([Buffer("a", 1, 0, 1, 0)], None, "size and align must be at least 1"),
        ([Buffer("a", 1, 3, 3)], None, "end after start"),
        ([Buffer("a", 1, 0, 5)], 4, "outlives the period 4: it would overwrite itself"),
        ([Buffer("a", 1, 0, 1), Buffer("a", 1, 1, 2)], None, "two buffers are named a"),
        ([], 0, "period 0: it must be at least 1"),
    ],
)
def test_solve_refuses_malformed_buffers(
    buffers: list[Buffer], period: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solve(buffers, period=period)


def test_solve_refuses_to_guess_whether_a_capacity_holds() -> None:
    buffers = [Buffer(f"b{i}", 1, 2 * i, 2 * i + 3) for i in range(5)]
    with pytest.raises(RuntimeError, match=r"a peak of 3 bytes at best, 2 at least, in 2"):
        solve(buffers, 2, period=10, work=0.0)


def test_check_names_every_fault() -> None:
    buffers = [Buffer("a", 4, 0, 2), Buffer("b", 4, 1, 3, 2), Buffer("c", 4, 2, 4)]
    assert check(buffers, {"a": 0, "b": 3, "d": 0}, capacity=6) == [
        "c has no offset",
        "d is no buffer",
        "b is at 3, no multiple of 2 from 0 on",
        "b ends at 7, over the capacity of 6",
        "a and b share bytes at time 1",
    ]
    assert check(buffers, {"a": 0, "b": 4, "c": 0}) == []
    assert check(buffers, {"a": 0, "b": 4, "c": 0}, period=3) == ["a and c share bytes at time 0"]


def test_checking_loads_no_solver() -> None:
    code = (
        "import sys; from dovetail.solvers.buffer_offsets import *\n"
        "assert check([Buffer('a', 1, 0, 1)], {'a': 0}) == []\n"
        "sys.exit('ortools' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
