"""Search: `policy, setting -> ranked knobs`, by hill climbing on the coarse estimate.

Deterministic: the same policy and setting always give the same list.
"""

from dataclasses import dataclass

from dovetail.ir.moves import Move
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.estimate import estimate
from dovetail.passes.memory import ram_bytes
from dovetail.passes.policies.common import Knobs, Policy, Setting

CLIMBS = 3
"""Best starts from which the search climbs."""


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule that fits: its knobs, moves and estimated seconds."""

    knobs: Knobs
    moves: tuple[Move, ...]
    seconds: float


class Search:
    """Remembers what was tried, so that climbs from several starts share work."""

    def __init__(self, policy: Policy, setting: Setting, costs: Costs) -> None:
        self._policy, self._setting, self._costs = policy, setting, costs
        self._tried: dict[tuple[tuple[str, int | bool], ...], Found | None] = {}

    def run(self) -> list[Found]:
        """All schedules that were found to fit, best first."""
        starts = [found for k in self._policy.starts(self._setting) if (found := self.attempt(k))]
        starts.sort(key=_rank)
        for start in starts[:CLIMBS]:
            self._climb(start)
        return sorted((found for found in self._tried.values() if found), key=_rank)

    @property
    def refused(self) -> int:
        """How many schedules did not fit."""
        return sum(found is None for found in self._tried.values())

    def attempt(self, knobs: Knobs) -> Found | None:
        """The schedule of these knobs, or None if it does not fit."""
        key = tuple(sorted(knobs.items()))
        if key not in self._tried:
            self._tried[key] = self._make(knobs)
        return self._tried[key]

    def _make(self, knobs: Knobs) -> Found | None:
        setting = self._setting
        moves = self._policy.moves(setting, knobs)
        if moves is None:
            return None
        layout = apply_moves(setting.graph, moves)
        if sum(ram_bytes(layout).values()) > setting.budget:
            return None
        seconds = estimate(layout, setting.machine, setting.workload, self._costs)
        return Found(dict(knobs), moves, seconds)

    def _climb(self, best: Found) -> None:
        ladders = self._policy.ladders(self._setting)
        improved = True
        while improved:
            improved = False
            for name, ladder in ladders.items():
                while (better := self._step(best, name, ladder)) is not None:
                    best, improved = better, True

    def _step(self, best: Found, name: str, ladder: tuple[int | bool, ...]) -> Found | None:
        """The better neighbour along one knob, if any is better."""
        if name not in best.knobs:
            return None
        here = best.knobs[name]
        above = [v for v in ladder if v > here][:1]
        below = [v for v in ladder if v < here][-1:]
        tried = [self.attempt({**best.knobs, name: value}) for value in (*above, *below)]
        found = [f for f in tried if f and f.seconds < best.seconds * (1 - 1e-6)]
        return min(found, key=_rank) if found else None


def _rank(found: Found) -> tuple[float, str]:
    return (found.seconds, str(sorted(found.knobs.items())))
