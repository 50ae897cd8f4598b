"""The ladder search against brute force on small problems."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from dovetail.solvers.ladder_search import LadderSearch, Point


def convex(point: Point) -> float | None:
    """A separable bowl under a shared capacity: x + y + z <= 12."""
    x, y, z = (int(point[name]) for name in "xyz")
    return None if x + y + z > 12 else (x - 5) ** 2 + (y - 4) ** 2 + (z - 1) ** 2


def test_finds_the_optimum_of_a_bowl_under_a_capacity() -> None:
    ladders = {name: tuple(range(9)) for name in "xyz"}
    search = LadderSearch(convex, ladders)
    solved = search.solve([{"x": 0, "y": 0, "z": 0}], climbs=1)
    assert solved.status == "feasible" and solved.bound is None
    assert solved.value[0] == {"x": 5, "y": 4, "z": 1} and solved.objective == 0


@given(st.lists(st.integers(0, 50), min_size=16, max_size=16), st.integers(0, 15))
def test_never_beats_brute_force_and_never_loses_to_its_start(table: list[int], start: int) -> None:
    ladders = {"a": (0, 1, 2, 3), "b": (0, 1, 2, 3)}

    def value(point: Point) -> float | None:
        found = table[int(point["a"]) * 4 + int(point["b"])]
        return None if found % 7 == 6 else float(found)

    begin = {"a": start // 4, "b": start % 4}
    solved = LadderSearch(value, ladders).solve([begin], climbs=1)
    points = [{"a": a, "b": b} for a, b in product(range(4), repeat=2)]
    best = min((v for p in points if (v := value(p)) is not None), default=float("inf"))
    if (first := value(begin)) is None:
        assert solved.status == "infeasible" and solved.value == []
        return
    assert best <= solved.objective <= first
    assert solved.objective == value(solved.value[0])
    ranked = [value(p) for p in solved.value]
    assert ranked == sorted(ranked, key=lambda v: v or 0)


def test_a_trade_leaves_a_point_that_no_single_move_improves() -> None:
    def value(point: Point) -> float | None:
        a, b = int(point["a"]), int(point["b"])
        return None if a + b > 3 else -float(10 * a + b)

    ladders = {"a": (0, 1, 2, 3), "b": (0, 1, 2, 3)}
    solved = LadderSearch(value, ladders).solve([{"a": 0, "b": 3}], climbs=1)
    assert solved.value[0] == {"a": 3, "b": 0}
