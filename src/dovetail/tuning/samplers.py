"""Samplers of the tuner: which points to look at next.

Every sampler proposes points and is told what came of them: the median ratio to the default, that a
point does not fit (a constraint, by how much), or that the cost model ruled it out. State lives in
memory only and is rebuilt from the database's rows, in their order, when a tuning is resumed.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Protocol

from dovetail.tuning.space import Ladders, Point

KICK = 3
"""Knobs that a restart of the coordinate descent changes."""
AROUND = 1.1
"""A restart goes on only from a point that takes no more than so many times the best."""


class Sampler(Protocol):
    """What the tuner asks of a sampler."""

    def propose(self, count: int) -> list[dict[str, int]]:
        """Points, ``count`` from samplers that make them up; none when the space is used up."""
        ...

    def tell(self, point: Point, ratio: float) -> None:
        """The point was timed: below 1 is faster than the default."""
        ...

    def tell_over(self, point: Point, over: float) -> None:
        """The point exceeds the budget by this share."""
        ...

    def tell_skipped(self, point: Point, predicted: float) -> None:
        """The point is not timed, since the cost model rules out this ratio."""
        ...

    def tell_later(self, point: Point, predicted: float) -> None:
        """Another point was timed first; this one may be proposed again."""
        ...


class CoordinateDescent:
    """Coordinate descent with restarts: all points one value away from the best so far, of which
    the cost model takes the most hopeful; once none of them is better, again from the best with
    KICK knobs set at random."""

    def __init__(self, space: Ladders, seed: int) -> None:
        self._space, self._random = space, random.Random(seed)
        self._told: dict[tuple[int, ...], float] = {}
        self._here: dict[str, int] = dict(space.base)
        self._best: tuple[float, dict[str, int]] = (1.0, dict(space.base))
        self._told[self._place(space.base)] = 1.0

    def propose(self, count: int) -> list[dict[str, int]]:
        """All neighbours of the place where it stands that were not told of: were only some
        proposed, the knobs that come last would hardly ever be tried."""
        for _ in range(20):
            here = self._told.get(self._place(self._here))
            if here is None:
                return [dict(self._here)]
            near = self._space.neighbours(self._here) if here <= AROUND * self._best[0] else ()
            fresh = [point for _, point in near if self._place(point) not in self._told]
            if fresh:
                return fresh
            self._here = self._kicked()
        return []

    def tell(self, point: Point, ratio: float) -> None:
        """Move to the point if it is better than where it stands."""
        complete = self._space.complete(point)
        self._told[self._place(complete)] = ratio
        if ratio < self._told.get(self._place(self._here), float("inf")):
            self._here = complete
        if ratio < self._best[0]:
            self._best = (ratio, complete)

    def tell_over(self, point: Point, over: float) -> None:
        """Never go there."""
        self._told[self._place(point)] = float("inf")

    def tell_skipped(self, point: Point, predicted: float) -> None:
        """Not better than where it stands."""
        self._told[self._place(point)] = float("inf")

    def tell_later(self, point: Point, predicted: float) -> None:
        """It stays among the neighbours."""

    def _place(self, point: Point) -> tuple[int, ...]:
        return tuple(values.index(point[name]) for name, values in self._space.ladders.items())

    def _kicked(self) -> dict[str, int]:
        point = dict(self._best[1])
        names = sorted(self._space.ladders)
        for name in self._random.sample(names, min(KICK, len(names))):
            point[name] = self._random.choice(self._space.ladders[name])
        return point


def make_sampler(name: str, space: Ladders, seed: int) -> Sampler:
    """The sampler of this name: one of SAMPLERS."""
    if name == "coordinate":
        return CoordinateDescent(space, seed)
    # Optuna takes a while to import, and not every machine that measures kernels has it.
    from dovetail.tuning.optuna_sampler import make_optuna_sampler

    return make_optuna_sampler(name, space, seed)


SAMPLERS: Mapping[str, str] = {
    "coordinate": "coordinate descent with restarts",
    "tpe": "tree-structured Parzen estimator, multivariate (optuna)",
    "nsga2": "NSGA-II, an evolutionary search (optuna)",
    "random": "uniform (optuna)",
}


def rebuild(
    sampler: Sampler, space: Ladders, rows: Sequence[tuple[Mapping[str, int | bool | str], float]]
) -> int:
    """Tell the sampler of rows (knobs and ratio, infinite for what failed), oldest first, that lie
    in today's space; returns how many do."""
    count = 0
    for knobs, ratio in rows:
        if space.holds(knobs):
            point = {name: int(value) for name, value in knobs.items()}
            if ratio == float("inf"):
                sampler.tell_over(space.complete(point), 1.0)
            else:
                sampler.tell(space.complete(point), ratio)
            count += 1
    return count
