"""Optuna's samplers as samplers of the tuner."""

import random
import warnings

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState

from dovetail.tuning.space import Ladders, Point

FIT = "fits"
"""The name of the constraint that a schedule stays within the budget."""
FURTHER = 6
"""After so many timed points one more knob may be changed at once."""


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


def make_optuna_sampler(name: str, space: Ladders, seed: int) -> OptunaSampler:
    """The sampler of this name: tpe, nsga2 or random."""
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
