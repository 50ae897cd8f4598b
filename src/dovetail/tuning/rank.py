"""Ranking: what the cost model says of candidates before any of them runs.

It is corrected as the tuning goes on: by the seconds of each class of work in schedules that ran
(``correct``), and by what is left of measured against predicted ratios (``residuals``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from dovetail.ir.moves import Move
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.estimate import estimate
from dovetail.passes.policies.common import Setting
from dovetail.passes.simulate import Simulator, workload_steps
from dovetail.tuning.residuals import Residuals
from dovetail.tuning.space import moves_digest

SHORTLIST = 4
"""So many of the best by the estimate are simulated."""


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
    residuals: Residuals
    _costs: Costs = field(init=False)
    _estimates: dict[str, float] = field(default_factory=dict)
    _simulated: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._costs = Costs(self.setting.machine)

    def correct(self, factors: Mapping[str, float]) -> None:
        """Predict with these factors by class of work from now on."""
        self.setting = replace(
            self.setting, machine=replace(self.setting.machine, corrections=dict(factors))
        )
        self._costs = Costs(self.setting.machine)
        self._estimates.clear()
        self._simulated.clear()

    def ratio(self, moves: tuple[Move, ...], digest: str = "") -> float:
        """Simulated seconds over the untuned schedule's."""
        return self._steps(moves, digest)[-1] / self._steps(self.untuned, "")[-1]

    def seconds(self, moves: tuple[Move, ...]) -> float:
        """Simulated seconds of the workload that is run."""
        return self._steps(moves, moves_digest(moves))[-1]

    def done(self, moves: tuple[Move, ...], digest: str = "") -> tuple[float, ...]:
        """The share of the work that is done after each step, set-up left out."""
        setup, *ends = self._steps(moves, digest)
        return tuple((end - setup) / (ends[-1] - setup) for end in ends)

    def order(self, found: Sequence[Candidate]) -> list[Candidate]:
        """First the one that may be best: all by the coarse estimate, the first few by simulation,
        each at the lower end of what the residuals leave open."""
        rough = sorted(found, key=lambda c: (self.hoped(c), c.digest))
        few = sorted(rough[:SHORTLIST], key=lambda c: (self.expected(c), c.digest))
        return [*few, *rough[SHORTLIST:]]

    def rough(self, candidate: Candidate) -> float:
        """The estimate's ratio to the untuned schedule's."""
        return self._rough(candidate.moves, candidate.digest) / self._rough(self.untuned, "")

    def hoped(self, candidate: Candidate) -> float:
        """The lowest ratio to be hoped for by estimate and residuals."""
        return self.rough(candidate) * self._hope(candidate)

    def expected(self, candidate: Candidate) -> float:
        """The same by simulation."""
        return self.ratio(candidate.moves, candidate.digest) * self._hope(candidate)

    def _hope(self, candidate: Candidate) -> float:
        mean, spread = self.residuals.expect(candidate.point)
        return math.exp(mean - spread)

    def _rough(self, moves: tuple[Move, ...], digest: str) -> float:
        if digest not in self._estimates:
            setting = self.setting
            layout = apply_moves(setting.graph, moves)
            self._estimates[digest] = estimate(
                layout, setting.machine, setting.workload, self._costs
            )
        return self._estimates[digest]

    def _steps(self, moves: tuple[Move, ...], digest: str) -> tuple[float, ...]:
        """Seconds at the end of set-up and of every step."""
        if digest not in self._simulated:
            layout = apply_moves(self.setting.graph, moves)
            simulator = Simulator(layout, self.setting.machine, self._costs)
            setup = simulator.predict_steps(()).seconds
            steps = (simulator.step_seconds(s)[0] for s in workload_steps(layout, self.sample))
            self._simulated[digest] = tuple(accumulate(steps, initial=setup))
        return self._simulated[digest]
