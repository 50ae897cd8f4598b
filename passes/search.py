"""Search: `policy, setting -> ranked knobs`, by hill climbing on the coarse estimate.

Deterministic: the same policy and setting always give the same list.
"""

from dataclasses import dataclass

from dovetail.ir.moves import Move
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.estimate import estimate
from dovetail.passes.memory import ram_bytes
from dovetail.passes.policies.common import Knobs, Ladders, Policy, Setting

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

    def neighbours(self, knobs: Knobs) -> list[Found]:
        """The schedules that fit one step from ``knobs`` along one knob."""
        here = self.attempt(knobs)
        assert here is not None
        ladders = {n: v for n, v in self._policy.ladders(self._setting).items() if n in knobs}
        changes = [self._moved(here, name, side, ladders) for name in ladders for side in (1, -1)]
        tried = [self.attempt({**knobs, **change}) for change in changes if change]
        return [found for found in tried if found]

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
        """Change one knob at a time while that helps, then try one up with another down: memory
        that one knob gives back may be worth more in another."""
        ladders = {n: v for n, v in self._policy.ladders(self._setting).items() if n in best.knobs}
        better: Found | None = best
        while better is not None:
            best, better = better, None
            for name in ladders:
                while (found := self._best_step(best, [name], ladders)) is not None:
                    best = better = found
            if better is None:
                better = self._trade(best, ladders)

    def _trade(self, best: Found, ladders: Ladders) -> Found | None:
        for up in ladders:
            for down in ladders:
                if up != down and (found := self._best_step(best, [up, down], ladders)):
                    return found
        return None

    def _best_step(self, best: Found, names: list[str], ladders: Ladders) -> Found | None:
        """The better neighbour of ``best``: one knob to either side, or one up and one down."""
        if len(names) == 1:
            changes = [self._moved(best, names[0], side, ladders) for side in (1, -1)]
        else:
            up = self._moved(best, names[0], 1, ladders)
            down = self._moved(best, names[1], -1, ladders)
            changes = [up | down if up and down else {}]
        tried = [self.attempt({**best.knobs, **change}) for change in changes if change]
        found = [f for f in tried if f and f.seconds < best.seconds * (1 - 1e-6)]
        return min(found, key=_rank) if found else None

    def _moved(self, best: Found, name: str, side: int, ladders: Ladders) -> dict[str, int | bool]:
        here = best.knobs[name]
        beyond = [v for v in ladders[name] if (v > here if side > 0 else v < here)]
        return {name: beyond[0] if side > 0 else beyond[-1]} if beyond else {}


def _rank(found: Found) -> tuple[float, str]:
    return (found.seconds, str(sorted(found.knobs.items())))
