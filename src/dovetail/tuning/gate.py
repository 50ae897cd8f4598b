"""The gate: fresh pairs of the best few, looked at after every pair, which alone decide.

Looking again and again makes luck likelier: of schedules that are no faster, an interval of 95 %
after every pair up to the twentieth would let 8 % through instead of 2.5 %. At 96 % after six pairs
(where runs are long there are no more) and 99.2 % from then on it is 2.5 %, counted in forty
thousand walks.
"""

import statistics
from collections.abc import Sequence

from dovetail.tuning_db.facts import Trial
from dovetail.tuning_db.winners import deciding_interval, pooled, winner

FEWEST = 6
"""Pairs that can show anything: so many wins in a row."""
ENOUGH, MOST_PAIRS = 8, 20
FAR_FASTER = 1e-6
FINALISTS = 3
DEFAULT, SEARCH, CONFIRM, GATE = "default", "", "confirm", "gate"
"""What a trial's note says of why it was made, if nothing else is to be said."""


def decided(ratios: Sequence[float]) -> bool:
    """Whether more pairs cannot change what these say: faster or slower beyond doubt, or too few
    wins for the pairs that may be left."""
    found = deciding_interval(ratios)
    if found.faster or found.slower:
        return True
    left = MOST_PAIRS - len(ratios)
    at_best = deciding_interval([*ratios, *[FAR_FASTER] * left])
    return not at_best.faster or (len(ratios) >= ENOUGH and found.median >= 1.0)


def finalists(rows: Sequence[Trial]) -> list[Trial]:
    """The best few that were faster than the default so far, best first."""
    ran = [t for t in pooled(rows) if t.state == "ok" and t.note != DEFAULT and t.ratios]
    ran = [t for t in ran if statistics.median(t.ratios) < 1.0]
    return sorted(ran, key=lambda t: (statistics.median(t.ratios), t.digest))[:FINALISTS]


def passed(rows: Sequence[Trial]) -> bool:
    """Whether one is faster by the gate's pairs."""
    return winner([row for row in rows if row.note == GATE]) is not None
