"""Rows of kernels in the tuning database: how they are made, and which kernels they speak for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dovetail.ir import codec
from dovetail.ir.kernel_layer import LayerKernels
from dovetail.tuning.gate import GATE
from dovetail.tuning_db.facts import Key, Trial
from dovetail.tuning_db.trials import Trials
from dovetail.tuning_db.winners import Interval, deciding_interval, ranked

PART = "kernels"
"""Names the candidate among a trial's parameters."""
GAIN = 0.99
"""Kernels replace the default only if they surely take less than this share of its time."""
Pairs = list[tuple[float, float]]
"""Seconds of a candidate and of the default, timed in turn."""


@dataclass(slots=True)
class Ledger:
    """Where the trials of one rung go; ``numbers`` counts those of the whole call."""

    trials: Trials
    tuning: str
    key: Key
    numbers: Iterator[int]

    def add(self, trial: Trial) -> Trial:
        """Store a trial at once; returns it with its number."""
        numbered = replace(trial, number=next(self.numbers))
        self.trials.add(self.tuning, self.key, numbered)
        return numbered


def kernels_of(trial: Trial) -> LayerKernels:
    """The kernels that a trial timed. Raises PlanError for a row that is not one of kernels."""
    return codec.decode(trial.parameters.get(PART), LayerKernels)


def kernel_winner(rows: Sequence[Trial]) -> tuple[Trial, Interval] | None:
    """The kernels with the lowest median among those that the gate's pairs show to take surely less
    than GAIN of the default's time; None where that is the default. A function of rows alone."""
    for trial in ranked([row for row in rows if row.note == GATE]):
        interval = deciding_interval(trial.ratios)
        if interval.high < GAIN:
            return trial, interval
    return None


def timed(trial: Trial, why: str, pairs: Pairs) -> Trial:
    """The trial with its pairs; throttled where none can be used."""
    mine, its = tuple(mine for mine, _ in pairs), tuple(its for _, its in pairs)
    state = trial.state if pairs else "throttled"
    return replace(trial, state=state, note=why, samples=mine, default_samples=its)


def ratios(pairs: Pairs) -> list[float]:
    """Each candidate's seconds over the default's."""
    return [mine / its for mine, its in pairs]
