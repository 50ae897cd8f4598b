"""Residuals: what measured ratios say beyond the predicted ones, knob by knob.

A Bayesian linear regression (Bishop, Pattern Recognition and Machine Learning, 3.3) of the
logarithm of measured over predicted ratios. A knob has a term for every value between the untuned
plan's and its own, so that what is learnt of one value says something of those beyond it. Where
nothing was measured the prior's spread is left: how far off the cost model may be there.
"""

import math
from collections.abc import Mapping, Sequence

import numpy
from numpy.typing import NDArray

from dovetail.tuning.space import Ladders, Point

NOISE = 0.06
"""Spread of the logarithm of a ratio of two runs."""
MOST = 1.0
"""A larger logarithm says that something else was at work."""
DOUBTS: Mapping[str, float] = {"workers": 0.25, "threads": 0.15, "readers": 0.12, "refill": 0.1}
"""How far off, as a logarithm, the cost model may be in what one step of a knob does. Engines that
come or go change what all the others do to each other: one worker instead of two was predicted to
take 1.2 of the time and took 0.7."""
DOUBT = 0.06
"""The same for all other knobs."""

Term = tuple[str, bool, int]
"""A knob, whether upwards, and the step's number from the base."""
Floats = NDArray[numpy.floating]


class Residuals:
    """What to expect of points of a space; ``shares`` are those of the time that knobs act on,
    ``doubt`` is that of knobs which DOUBTS does not name."""

    def __init__(self, space: Ladders, shares: Mapping[str, float], doubt: float = DOUBT) -> None:
        self._space = space
        self._spread = {n: DOUBTS.get(n, doubt) + DOUBT * shares.get(n, 0.0) for n in space.ladders}
        self._places: dict[Term, int] = {}
        self._mean: Floats = numpy.zeros(0)
        self._covariance: Floats = numpy.zeros((0, 0))

    def learn(self, seen: Sequence[tuple[Point, float]]) -> None:
        """Forget what was learnt, and learn from points and measured over predicted ratios."""
        terms = [self._terms(point) for point, _ in seen]
        names = sorted({term for each in terms for term in each})
        self._places = {term: place for place, term in enumerate(names)}
        x = numpy.zeros((len(seen), len(names)))
        for row, each in enumerate(terms):
            x[row, [self._places[term] for term in each]] = 1.0
        y = [min(MOST, max(-MOST, math.log(ratio))) for _, ratio in seen]
        prior = numpy.diag([self._spread[name] ** -2 for name, _, _ in names])
        self._covariance = numpy.linalg.inv(x.T @ x / NOISE**2 + prior)
        self._mean = self._covariance @ (x.T @ numpy.array(y, dtype=numpy.float64)) / NOISE**2

    def expect(self, point: Point) -> tuple[float, float]:
        """Mean and spread of the logarithm of measured over predicted ratio at a point."""
        terms = self._terms(point)
        known = [self._places[term] for term in terms if term in self._places]
        unknown = sum(self._spread[t[0]] ** 2 for t in terms if t not in self._places)
        variance = float(self._covariance[numpy.ix_(known, known)].sum()) + unknown
        return float(self._mean[known].sum()), math.sqrt(max(0.0, variance))

    def _terms(self, point: Point) -> list[Term]:
        found = []
        for name, values in self._space.ladders.items():
            apart = values.index(point[name]) - values.index(self._space.base[name])
            found += [(name, apart > 0, step) for step in range(abs(apart))]
        return found
