"""Samplers of the tuner: which points to look at next.

Every sampler proposes points and is told what came of them: the median ratio to the default, that a
point does not fit (a constraint, by how much), or that the cost model ruled it out. State lives in
memory only and is rebuilt from the database's rows, in their order, when a tuning is resumed.
"""

import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState

from dovetail.tuning.space import Ladders, Point

FIT = "fits"
"""The name of the constraint that a schedule stays within the budget."""
KICK = 3
"""Knobs that a restart of the coordinate descent changes."""
AROUND = 1.1
"""A restart goes on only from a point that takes no more than so many times the best."""
FURTHER = 6
"""After so many timed points one more knob may be changed at once."""


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


class OptunaSampler:
    """An optuna sampler over positions on the ladders, near the best point so far.

    Of what the sampler asks for, a few knobs are taken and the others left as they are in the best
    point, more of them the longer the search goes on: a point that differs from a good plan in
    everything is slow to time and says little (trust regions: TuRBO, arXiv 1910.01739). An
    infeasible point is a constraint on a finished trial, never a failed one: told as failures,
    univariate TPE proposed 84 % invalid points in a trial of ours. With ``generations`` every
    finished trial is one that the sampler asked for, as an evolutionary one wants it.
    """

    def __init__(
        self,
        space: Ladders,
        sampler: optuna.samplers.BaseSampler,
        seed: int,
        *,
        generations: bool = False,
    ) -> None:
        self._space, self._random, self._generations = space, random.Random(seed), generations
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(sampler=sampler)
        self._spread: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1) for name, values in space.ladders.items()
        }
        self._finished = 0
        self._best: tuple[float, dict[str, int]] = (1.0, dict(space.base))
        if space.ladders:
            self.tell(space.base, 1.0)

    def propose(self, count: int) -> list[dict[str, int]]:
        """``count`` points, new or old."""
        found = []
        for _ in range(count):
            trial = self._study.ask(self._spread)
            values = {name: self._space.ladders[name][at] for name, at in trial.params.items()}
            # What is timed is another point: this one is forgotten.
            self._study.tell(trial, state=TrialState.FAIL)
            found.append(self._near_best(values))
        return found

    def _near_best(self, values: Point) -> dict[str, int]:
        best = self._best[1]
        apart = sorted(name for name, value in values.items() if best[name] != value)
        reach = min(len(apart), self._random.randint(1, 1 + self._finished // FURTHER))
        return {**best, **{name: values[name] for name in self._random.sample(apart, reach)}}

    def tell(self, point: Point, ratio: float) -> None:
        """A finished trial."""
        self._finished += 1
        if ratio < self._best[0]:
            self._best = (ratio, self._space.complete(point))
        self._end(point, ratio, over=0.0)

    def tell_over(self, point: Point, over: float) -> None:
        """A finished trial that breaks the constraint; its value counts for nothing."""
        self._end(point, 10.0, over=over)

    def tell_skipped(self, point: Point, predicted: float) -> None:
        """A pruned trial: what it learns from is the prediction."""
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.PRUNED,
                params=self._params(point),
                distributions=self._spread,
                intermediate_values={0: predicted},
                constraints={FIT: 0.0},
            )
        )

    def tell_later(self, point: Point, predicted: float) -> None:
        """It may be asked for again."""

    def _params(self, point: Point) -> dict[str, int]:
        return {name: values.index(point[name]) for name, values in self._space.ladders.items()}

    def _end(self, point: Point, value: float, over: float) -> None:
        if self._generations:
            self._study.enqueue_trial(self._params(point))
            asked = self._study.ask(self._spread)
            asked.set_constraint(FIT, over)
            self._study.tell(asked, value)
            return
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE,
                value=value,
                params=self._params(point),
                distributions=self._spread,
                constraints={FIT: over},
            )
        )


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
    with warnings.catch_warnings():
        # group and multivariate are marked experimental in some releases.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            made: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(
                multivariate=True, group=True, seed=seed
            )
        elif name == "nsga2":
            made = optuna.samplers.NSGAIISampler(population_size=8, seed=seed)
        else:
            assert name == "random", name
            made = optuna.samplers.RandomSampler(seed=seed)
    return OptunaSampler(space, made, seed, generations=name == "nsga2")


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
