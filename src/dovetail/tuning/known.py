"""What a tuning knows of its candidates: the rows of the database, read as they come."""

import math
import statistics

from dovetail.ir import codec
from dovetail.ir.moves import Move
from dovetail.tuning.gate import DEFAULT
from dovetail.tuning_db.facts import Key, Trial
from dovetail.tuning_db.trials import Trials
from dovetail.tuning_db.winners import pooled


class Known:
    """All trials of a key, those of other tuners at work on the same file too. ``part`` is the one
    of a trial's parameters that names its candidate."""

    def __init__(self, trials: Trials, key: Key, part: str = "moves") -> None:
        self._trials, self._key, self._part, self._place = trials, key, part, 0
        self.rows: list[Trial] = []
        self.by_digest: dict[str, Trial] = {}
        self.over: set[str] = set()

    def read(self) -> None:
        """Read the rows that are new."""
        for place, trial in self._trials.since(self._key, self._place):
            self._place = place
            self.rows.append(trial)
            if self._part not in trial.parameters:
                self.over.add(codec.digest(trial.knobs))
            elif trial.state != "throttled":
                name = codec.digest(trial.parameters[self._part])
                same = [self.by_digest[name]] if name in self.by_digest else []
                (self.by_digest[name],) = pooled([*same, trial])

    @property
    def best(self) -> float:
        """The lowest median ratio so far, 1 for the default's."""
        ratios = (ratio_of(trial) for trial in self.by_digest.values())
        return min((ratio for ratio in ratios if ratio is not None), default=1.0)

    @property
    def default(self) -> Trial | None:
        """The default's row."""
        return next((t for t in self.by_digest.values() if t.note == DEFAULT), None)


def moves_of(trial: Trial) -> tuple[Move, ...]:
    """The moves that a trial timed."""
    return codec.decode(trial.parameters["moves"], tuple[Move, ...])


def point_of_trial(trial: Trial) -> dict[str, int]:
    """The point of the space that gave a trial's moves."""
    return {name: int(value) for name, value in trial.knobs.items()}


def ratio_of(trial: Trial) -> float | None:
    """The median ratio of a trial that ran, else None."""
    if trial.state != "ok" or not trial.ratios:
        return None
    return statistics.median(trial.ratios)


def told_of(trial: Trial) -> float:
    """What a sampler is told of a trial: its ratio, infinite for one that failed."""
    ratio = ratio_of(trial)
    return math.inf if ratio is None else ratio
