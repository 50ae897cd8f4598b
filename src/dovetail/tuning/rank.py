"""Ranking: what the cost model says of candidates before any of them runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dovetail.ir.moves import Move
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.estimate import estimate
from dovetail.passes.policies.common import Setting
from dovetail.passes.simulate import Simulator
from dovetail.tuning.space import moves_digest

SHORTLIST = 4
"""So many of the best by the estimate are simulated."""
BONUS = 0.05
"""A knob that acts on all of the time is tried before another that acts on none of it, though the
model predicts this share more for it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule to be timed: its point, its moves and their digest."""

    point: Mapping[str, int]
    moves: tuple[Move, ...]
    digest: str


@dataclass(slots=True)
class Ranker:
    """Predicted times as ratios to the untuned schedule's, on the workload that is run."""

    setting: Setting
    sample: Workload
    untuned: tuple[Move, ...]
    shares: Mapping[str, float] = field(default_factory=dict)
    _costs: Costs = field(init=False)
    _estimates: dict[str, float] = field(default_factory=dict)
    _simulated: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._costs = Costs(self.setting.machine)

    def ratio(self, moves: tuple[Move, ...], digest: str = "") -> float:
        """Simulated seconds over the untuned schedule's."""
        return self._seconds(moves, digest) / self._seconds(self.untuned, "")

    def seconds(self, moves: tuple[Move, ...]) -> float:
        """Simulated seconds of the workload that is run."""
        return self._seconds(moves, moves_digest(moves))

    def order(self, found: Sequence[Candidate], base: Mapping[str, int]) -> list[Candidate]:
        """Best first: all by the coarse estimate, the first few by simulation, with a bonus for
        knobs that act where the time goes."""
        rough = sorted(found, key=lambda c: (self._estimate(c) - self._bonus(c, base), c.digest))
        few = sorted(
            rough[:SHORTLIST],
            key=lambda c: (self.ratio(c.moves, c.digest) - self._bonus(c, base), c.digest),
        )
        return [*few, *rough[SHORTLIST:]]

    def rough(self, candidate: Candidate) -> float:
        """The estimate's ratio to the untuned schedule's."""
        return self._estimate(candidate)

    def _bonus(self, candidate: Candidate, base: Mapping[str, int]) -> float:
        changed = [name for name, value in candidate.point.items() if base.get(name) != value]
        return BONUS * max((self.shares.get(name, 0.0) for name in changed), default=0.0)

    def _estimate(self, candidate: Candidate) -> float:
        return self._rough(candidate.moves, candidate.digest) / self._rough(self.untuned, "")

    def _rough(self, moves: tuple[Move, ...], digest: str) -> float:
        if digest not in self._estimates:
            setting = self.setting
            layout = apply_moves(setting.graph, moves)
            self._estimates[digest] = estimate(
                layout, setting.machine, setting.workload, self._costs
            )
        return self._estimates[digest]

    def _seconds(self, moves: tuple[Move, ...], digest: str) -> float:
        if digest not in self._simulated:
            layout = apply_moves(self.setting.graph, moves)
            simulator = Simulator(layout, self.setting.machine, self._costs)
            self._simulated[digest] = simulator.predict(self.sample).seconds
        return self._simulated[digest]
