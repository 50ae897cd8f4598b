"""Search: `policy, setting -> schedules that fit, best first`, by the coarse estimate.

The ladder search of ``solvers`` walks the policy's knobs; this file says what a point is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.ir.moves import Move
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.estimate import estimate
from dovetail.passes.memory import ram_bytes
from dovetail.passes.policies.common import Knobs, Policy, Setting
from dovetail.solvers.ladder_search import LadderSearch

CLIMBS = 3
"""Best starts from which the search climbs."""


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule that fits: its knobs, moves and estimated seconds."""

    knobs: Knobs
    moves: tuple[Move, ...]
    seconds: float


class Search:
    """Schedules of one policy in one setting."""

    def __init__(self, policy: Policy, setting: Setting, costs: Costs) -> None:
        self.policy, self._setting, self._costs = policy, setting, costs
        self._moves: dict[tuple[tuple[str, int | bool], ...], tuple[Move, ...]] = {}
        self._solver = LadderSearch(self._seconds, policy.ladders(setting))

    def run(self, near: Sequence[Knobs] = ()) -> list[Found]:
        """All schedules that were found to fit, best first, from the policy's own starts or from
        those ``near`` which the best is thought to be."""
        solved = self._solver.solve(near or self.policy.starts(self._setting), CLIMBS)
        return [self._found(knobs) for knobs in solved.value]

    def neighbours(self, knobs: Knobs) -> list[Found]:
        """The schedules that fit one step from ``knobs`` along one knob."""
        return [self._found(point) for point in self._solver.neighbours(knobs)]

    def attempt(self, knobs: Knobs) -> Found | None:
        """The schedule of these knobs, or None if it does not fit."""
        return self._found(knobs) if self._solver.value(knobs) is not None else None

    @property
    def refused(self) -> int:
        """How many schedules did not fit."""
        return self._solver.refused

    def _found(self, knobs: Knobs) -> Found:
        seconds = self._solver.value(knobs)
        assert seconds is not None
        return Found(dict(knobs), self._moves[tuple(sorted(knobs.items()))], seconds)

    def _seconds(self, knobs: Knobs) -> float | None:
        setting = self._setting
        moves = self.policy.moves(setting, knobs)
        if moves is None:
            return None
        layout = apply_moves(setting.graph, moves)
        if sum(ram_bytes(layout).values()) > setting.budget:
            return None
        self._moves[tuple(sorted(knobs.items()))] = moves
        return estimate(layout, setting.machine, setting.workload, self._costs)
