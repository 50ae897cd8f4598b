"""Ladder search: minimise f(x) where each coordinate x_i takes values of an ordered ladder L_i.

f is given as a function that may refuse a point (None: infeasible, such as too much memory). From
every start: move one coordinate to the neighbouring rung while f falls; when no single move helps,
move one coordinate up and another down, since what one gives back may be worth more in another. No
bound is proved. Deterministic: ties go to the point that sorts first.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from dovetail.solvers.solved import Solved

Point = Mapping[str, int | bool]
Ladders = Mapping[str, tuple[int | bool, ...]]
Objective = Callable[[Point], float | None]
Change = dict[str, int | bool]


class LadderSearch:
    """Searches one problem; every point is evaluated once."""

    def __init__(self, objective: Objective, ladders: Ladders) -> None:
        self._objective, self._ladders = objective, ladders
        self._seen: dict[tuple[tuple[str, int | bool], ...], float | None] = {}

    def solve(self, starts: Iterable[Point], climbs: int) -> Solved[list[dict[str, int | bool]]]:
        """All feasible points that were met, best first, climbing from the best ``climbs``."""
        begin = time.perf_counter()
        feasible = [dict(start) for start in starts if self.value(start) is not None]
        for start in sorted(feasible, key=self._rank)[:climbs]:
            self._climb(start)
        points = [dict(key) for key, value in self._seen.items() if value is not None]
        points.sort(key=self._rank)
        best = self._rank(points[0])[0] if points else float("inf")
        status: Literal["feasible", "infeasible"] = "feasible" if points else "infeasible"
        return Solved(points, best, None, status, time.perf_counter() - begin)

    def value(self, point: Point) -> float | None:
        """f at ``point``."""
        key = _key(point)
        if key not in self._seen:
            self._seen[key] = self._objective(point)
        return self._seen[key]

    def neighbours(self, point: Point) -> list[dict[str, int | bool]]:
        """The feasible points one rung away along one coordinate."""
        changes = [self._rung(point, name, side) for name in self._ladders for side in (1, -1)]
        points = [{**point, **change} for change in changes if change]
        return [p for p in points if self.value(p) is not None]

    @property
    def refused(self) -> int:
        """How many points were infeasible."""
        return sum(value is None for value in self._seen.values())

    def _climb(self, point: dict[str, int | bool]) -> None:
        moved = True
        while moved:
            moved = False
            for name in self._ladders:
                sides = [self._rung(point, name, side) for side in (1, -1)]
                while (better := self._better(point, sides)) is not None:
                    point, moved = better, True
                    sides = [self._rung(point, name, side) for side in (1, -1)]
            if not moved and (better := self._trade(point)) is not None:
                point, moved = better, True

    def _trade(self, point: dict[str, int | bool]) -> dict[str, int | bool] | None:
        for up in self._ladders:
            for down in self._ladders:
                raised, lowered = self._rung(point, up, 1), self._rung(point, down, -1)
                if up != down and raised and lowered:
                    better = self._better(point, [raised | lowered])
                    if better is not None:
                        return better
        return None

    def _better(
        self, point: dict[str, int | bool], changes: Iterable[Change]
    ) -> dict[str, int | bool] | None:
        here = self._rank(point)[0] * (1 - 1e-6)
        points = [{**point, **change} for change in changes if change]
        good = [p for p in points if (value := self.value(p)) is not None and value < here]
        return min(good, key=self._rank) if good else None

    def _rung(self, point: Point, name: str, side: int) -> Change:
        """The next value of a coordinate up (1) or down (-1); empty at the ladder's end."""
        if name not in point:
            return {}
        here = point[name]
        beyond = [v for v in self._ladders[name] if (v > here if side > 0 else v < here)]
        return {name: beyond[0] if side > 0 else beyond[-1]} if beyond else {}

    def _rank(self, point: Point) -> tuple[float, str]:
        value = self.value(point)
        return (float("inf") if value is None else value, str(_key(point)))


def _key(point: Point) -> tuple[tuple[str, int | bool], ...]:
    return tuple(sorted(point.items()))
