"""Winners: which candidate is best is asked of the samples, never stored.

The rule: of the candidates whose median ratio to the default lies below 1 with an interval that
excludes 1, the one with the lowest median; if there is none, the default. Ties go to the smaller
digest, so that two machines with the same rows name the same winner.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dovetail.tuning_db.facts import Trial

CONFIDENCE = 0.95
GATE_CONFIDENCE = 0.98
"""Of the interval that decides: samples are looked at after every pair, and all looks together are
to be wrong as rarely as one at 95 % is."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and what it lies between with the confidence asked for; without enough samples
    from 0 to infinity."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def faster(self) -> bool:
        """Whether a ratio to the default is below 1 beyond doubt."""
        return self.high < 1.0

    @property
    def slower(self) -> bool:
        """Whether a ratio to the default is above 1 beyond doubt."""
        return self.low > 1.0


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The interval of the median between order statistics, which asks nothing of how the samples
    are distributed (Conover, Practical Nonparametric Statistics, 3.2).

    The k-th smallest and k-th largest of n enclose the median with probability
    ``1 - 2 P(Binomial(n, 1/2) < k)``: the narrowest such pair is taken. Six samples are the fewest
    that reach 95 %.
    """
    ordered, n = sorted(samples), len(samples)
    if not n:
        return Interval(math.nan, 0.0, math.inf, 0)
    low, high = 0.0, math.inf
    outside = 0.0
    for k in range(1, n // 2 + 1):
        outside += 2 * math.comb(n, k - 1) / 2**n
        if 1 - outside < confidence:
            break
        low, high = ordered[k - 1], ordered[n - k]
    return Interval(statistics.median(ordered), low, high, n)


def pooled(trials: Iterable[Trial]) -> list[Trial]:
    """One trial per candidate with all its samples, by digest; a failure of any outweighs them."""
    found: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda t: (t.created_at, t.uid)):
        found.setdefault(trial.digest, []).append(trial)
    return [_pooled(found[digest]) for digest in sorted(found)]


def _pooled(trials: Sequence[Trial]) -> Trial:
    failed = [trial for trial in trials if trial.state not in ("ok", "throttled")]
    ran = [trial for trial in trials if trial.state == "ok"]
    if failed or not ran:
        return (failed or trials)[0]
    errors = [trial.max_error for trial in ran if trial.max_error is not None]
    return replace(
        ran[0],
        samples=tuple(x for trial in ran for x in trial.samples),
        default_samples=tuple(x for trial in ran for x in trial.default_samples),
        max_error=max(errors, default=None),
    )


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The candidates that ran, pooled, lowest median ratio first."""
    ran = [trial for trial in pooled(trials) if trial.state == "ok" and trial.ratios]
    return sorted(ran, key=lambda t: (statistics.median(t.ratios), t.digest))


def winner(trials: Iterable[Trial]) -> Trial | None:
    """The best candidate by the rule, or None where that is the default."""
    ranks = ranked(trials)
    sure = [trial for trial in ranks if median_interval(trial.ratios, GATE_CONFIDENCE).faster]
    return sure[0] if sure else None
