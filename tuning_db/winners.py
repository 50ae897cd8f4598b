"""Winners: which candidate is best is asked of the samples, never stored.

The rule: of the candidates whose typical ratio to the default lies below 1 with an interval that
excludes 1, the one with the lowest median; if there is none, the default. Ties go to the smaller
digest, so that two machines with the same rows name the same winner.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from dovetail.tuning_db.facts import Trial

CONFIDENCE = 0.95
FIRST_LOOK, LATER_LOOKS = 0.96, 0.992
"""Confidence of the interval that decides, at six pairs and at more: samples are looked at after
every pair, and all looks together, of twenty pairs, are to be wrong as rarely as one at 95 % is."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A median, or an estimate of it, and what it lies between with the confidence asked for;
    without enough samples from 0 to infinity."""

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


def deciding_interval(ratios: Sequence[float]) -> Interval:
    """The interval that says whether a schedule is faster, however often it was looked at."""
    return ratio_interval(ratios, gate_confidence(len(ratios)))


def gate_confidence(pairs: int) -> float:
    """The confidence of ``deciding_interval``."""
    return FIRST_LOOK if pairs <= 6 else LATER_LOOKS


def ratio_interval(ratios: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The interval of the typical ratio of two runs in turn, by Wilcoxon's signed ranks, with the
    estimate of Hodges and Lehmann (Hollander, Wolfe, Nonparametric Statistical Methods, 3.1-3.3).

    Where neither run is faster a pair's logarithm is as likely to be x as -x, since the two might
    be exchanged: that is all it asks for. Six pairs are the fewest that reach 95 %. It says more of
    as many pairs than an interval between order statistics, which sees who won and not by how much.
    """
    logs, n = [math.log(ratio) for ratio in ratios], len(ratios)
    if not n:
        return Interval(math.nan, 0.0, math.inf, 0)
    means = sorted((a + b) / 2 for i, a in enumerate(logs) for b in logs[i:])
    out = _outside(n, (1 - confidence) / 2)
    low, high = (means[out - 1], means[-out]) if out else (-math.inf, math.inf)
    middle = statistics.median(means)
    return Interval(math.exp(middle), math.exp(low), math.exp(high), n)


@cache
def _outside(n: int, tail: float) -> int:
    """How many sums of n signed ranks, from 0 on, together are no likelier than ``tail``."""
    ways = [1]
    for rank in range(1, n + 1):
        more = [0] * rank + ways
        ways = [a + b for a, b in zip([*ways, *[0] * rank], more, strict=True)]
    total, count = 0, 0
    for each in ways:
        total += each
        if total > tail * 2**n:
            break
        count += 1
    return count


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
    sure = [trial for trial in ranks if deciding_interval(trial.ratios).faster]
    return sure[0] if sure else None
