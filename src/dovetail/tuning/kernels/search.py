"""The search for a rung's kernels: propose, rank, compile, check, time in turn with the default.

The default is the cost model's choice. Every trial is in the database before the next one begins,
and rows that are there already are taken as if just timed: nothing is timed twice.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from dovetail.ir import codec
from dovetail.ir.kernel_layer import LayerKernels
from dovetail.kernels.bench import Bench, KernelFailure
from dovetail.tuning.clock import Clock
from dovetail.tuning.gate import CONFIRM, DEFAULT, GATE, SEARCH, finalists
from dovetail.tuning.kernels.attempts import Attempts
from dovetail.tuning.kernels.duel import Duel
from dovetail.tuning.kernels.rows import PART, Ledger, kernels_of, ratios, timed
from dovetail.tuning.kernels.space import KernelSpace
from dovetail.tuning.known import Known, point_of_trial, ratio_of, told_of
from dovetail.tuning.residuals import Residuals
from dovetail.tuning.samplers import Sampler, rebuild
from dovetail.tuning_db.facts import Stop, Trial
from dovetail.tuning_db.winners import pooled

BATCH = 8
PAIRS = 3
"""Pairs of a candidate's first look, and of the second that one gets which is the best so far."""
HOPELESS = 1.2
"""After one pair, what takes this many times the best so far gets no more."""
RULED_OUT = 1.05
"""A candidate that takes this many times the best so far, at the best that prediction and residuals
leave to be hoped for, is not compiled."""
DOUBT = 0.12
"""How far off, as a logarithm, the cost model may be in what one step of a knob does."""
PATIENCE = 50
"""Timed candidates without a better one after which the search has converged."""
GATE_SHARE = 0.2
"""The share of a rung's seconds that is kept for the gate."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Kernels to be timed, the point that gave them, their digest and predicted seconds."""

    point: dict[str, int]
    kernels: LayerKernels
    digest: str
    predicted: float


class KernelSearch:
    """The search of one rung. ``make`` gives the device's bench, which is asked for only if there
    is something to time; ``show`` is called after every trial that ran.

    ``run`` and ``gate`` raise KernelFailure where the default fails or the GPU is lost.
    """

    def __init__(
        self,
        space: KernelSpace,
        sampler: Sampler,
        make: Callable[[], Bench],
        ledger: Ledger,
        clock: Clock,
        show: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        self._space, self._sampler, self._ledger = space, sampler, ledger
        self._clock, self._show = clock, show
        self._duel = Duel(space.chosen, make, Attempts(ledger.trials.database.path))
        self._known = Known(ledger.trials, ledger.key, PART)
        self._residuals = Residuals(space, {}, DOUBT)
        self._default_predicted = space.seconds(space.base)
        self._since_best = 0

    @property
    def rows(self) -> list[Trial]:
        """All trials of the rung so far."""
        return self._known.rows

    def resume(self) -> int:
        """Take over the rows that are there; returns how many."""
        self._known.read()
        rows = self._known.rows
        told = [(t.knobs, told_of(t)) for t in pooled(rows) if t.note != DEFAULT]
        rebuild(self._sampler, self._space, told)
        self._hold_against_model()
        best, self._since_best = 1.0, 0
        for trial in rows:
            if trial.note == SEARCH and trial.state != "throttled":
                ratio = told_of(trial)
                self._since_best = 0 if ratio < best else self._since_best + 1
                best = min(best, ratio)
        return len(rows)

    def run(self) -> Stop:
        """Search until the gate's share of the seconds is left, or nothing better turns up, or
        nothing new is proposed."""
        while self._clock.left > GATE_SHARE * self._clock.budget:
            if self._since_best >= PATIENCE:
                return "converged"
            candidates = self._proposed()
            if candidates is None:
                return "space"
            if candidates:
                first, *others = sorted(candidates, key=lambda c: (self._hoped(c), c.digest))
                for later in others:
                    self._sampler.tell_later(later.point, self._predicted(later))
                self._time(first)
        return "budget"

    def gate(self) -> None:
        """Time the best few in fresh pairs, which alone decide; the first one whatever the time."""
        for number, trial in enumerate(finalists(self._known.rows)):
            if any(row.note == GATE and row.digest == trial.digest for row in self._known.rows):
                continue
            if number and self._clock.left <= 0:
                return
            self._gate_one(trial)

    def _gate_one(self, trial: Trial) -> None:
        try:
            pairs, error = self._duel.decide(kernels_of(trial))
        except KernelFailure as failure:
            self._store_failure(trial, point_of_trial(trial), failure)
            return
        self._add(timed(replace(trial, state="ok", max_error=error), GATE, pairs))

    def _proposed(self) -> list[Candidate] | None:
        """New candidates of the sampler that are worth compiling; None if it has no more points."""
        points = self._sampler.propose(BATCH)
        if not points:
            return None
        self._known.read()
        found = {c.digest: c for p in points if (c := self._candidate(p)) is not None}
        kept = []
        for candidate in found.values():
            if self._hoped(candidate) > RULED_OUT * self._known.best:
                self._sampler.tell_skipped(candidate.point, self._predicted(candidate))
            else:
                kept.append(candidate)
        return kept

    def _candidate(self, point: dict[str, int]) -> Candidate | None:
        """The point's candidate, or None if it cannot be or was timed: the sampler is told."""
        full = self._space.complete(point)
        built = self._space.build(full)
        if built.kernels is None:
            self._refuse(full, built.why)
            return None
        digest = codec.digest(built.kernels)
        known = self._known.by_digest.get(digest)
        if known is not None:
            self._tell(full, known)
            return None
        return Candidate(full, built.kernels, digest, self._space.seconds(full))

    def _refuse(self, point: dict[str, int], why: str) -> None:
        """Arithmetic forbids the point: a constraint for the sampler, never compiled."""
        name = codec.digest(point)
        if name not in self._known.over:
            self._known.over.add(name)
            self._add(Trial(0, {"point": point}, point, "invalid", note=why))
        self._sampler.tell_over(point, 1.0)

    def _time(self, candidate: Candidate) -> None:
        best = self._known.best
        encoded = {PART: codec.encode(candidate.kernels)}
        trial = Trial(0, encoded, candidate.point, "ok", predicted_seconds=candidate.predicted)
        self._time_default()
        try:
            loaded = self._duel.load(candidate.kernels)
        except KernelFailure as failure:
            self._store_failure(trial, candidate.point, failure)
            self._since_best += 1
            return
        trial = replace(trial, max_error=loaded.error)
        first = self._duel.pairs(loaded, 1)
        if first and ratios(first)[0] > HOPELESS * best:
            self._add(timed(replace(trial, state="timeout"), SEARCH, first))
        else:
            self._add(timed(trial, SEARCH, first + self._duel.pairs(loaded, PAIRS - 1)))
            ratio = ratio_of(self._known.rows[-1])
            if ratio is not None and ratio < best:
                # A lucky sample would steer all that follows: the best is looked at twice.
                self._add(timed(trial, CONFIRM, self._duel.pairs(loaded, PAIRS)))
        known = self._known.by_digest.get(candidate.digest)
        if known is None:
            self._sampler.tell_later(candidate.point, self._predicted(candidate))
            return
        self._tell(candidate.point, known)
        self._since_best = 0 if self._known.best < best else self._since_best + 1
        self._hold_against_model()

    def _tell(self, point: dict[str, int], trial: Trial) -> None:
        if trial.state == "timeout":
            self._sampler.tell(point, statistics.median(trial.ratios))
        elif (ratio := told_of(trial)) == math.inf:
            self._sampler.tell_over(point, 1.0)
        else:
            self._sampler.tell(point, ratio)

    def _store_failure(self, trial: Trial, point: dict[str, int], failure: KernelFailure) -> None:
        state, why = failure.state, str(failure)
        self._add(
            replace(
                trial,
                state=state,
                samples=(),
                default_samples=(),
                max_error=failure.error,
                note=why,
            )
        )
        self._sampler.tell_over(point, 1.0)
        if failure.lost:
            raise failure

    def _add(self, trial: Trial) -> None:
        stored = self._ledger.add(trial)
        self._known.read()
        if stored.state != "invalid":
            self._show(stored)

    def _time_default(self) -> None:
        """The default's row is the first of every rung."""
        default = self._duel.default
        if self._known.default is None:
            took = tuple(default.seconds() for _ in range(PAIRS))
            encoded = {PART: codec.encode(self._space.chosen)}
            base, predicted = dict(self._space.base), self._default_predicted
            self._add(Trial(0, encoded, base, "ok", took, took, predicted, 0.0, DEFAULT))

    def _predicted(self, candidate: Candidate) -> float:
        return candidate.predicted / self._default_predicted

    def _hoped(self, candidate: Candidate) -> float:
        """The lowest ratio to be hoped for by prediction and residuals."""
        mean, spread = self._residuals.expect(candidate.point)
        return self._predicted(candidate) * math.exp(mean - spread)

    def _hold_against_model(self) -> None:
        """Let measured ratios correct the predictions of what is still to be ranked."""
        seen = []
        for trial in self._known.by_digest.values():
            point = self._space.complete(point_of_trial(trial))
            usable = trial.ratios and trial.predicted_seconds and self._space.holds(point)
            if usable and trial.state in ("ok", "timeout") and trial.note != DEFAULT:
                predicted = (trial.predicted_seconds or 1.0) / self._default_predicted
                seen.append((point, statistics.median(trial.ratios) / predicted))
        self._residuals.learn(seen)
