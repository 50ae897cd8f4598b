"""The search of `dovetail tune`: propose, rank, time in turn with the default, store, repeat.

Every trial is in the database before the next one begins. Rows that are there already, of an
earlier call or of another tuner at work on the same file, are taken as if just timed.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from dovetail.ir import codec
from dovetail.tuning.clock import Clock, Tick
from dovetail.tuning.correct import Work, factors
from dovetail.tuning.gate import (
    CONFIRM,
    DEFAULT,
    FEWEST,
    GATE,
    MOST_PAIRS,
    SEARCH,
    decided,
    finalists,
    passed,
)
from dovetail.tuning.known import Known, moves_of, point_of_trial, ratio_of, told_of
from dovetail.tuning.measure import Measurer, Pairs, Terms
from dovetail.tuning.rank import Candidate, Ranker
from dovetail.tuning.samplers import Sampler, rebuild
from dovetail.tuning.space import Built, Space, moves_digest
from dovetail.tuning_db.facts import Key, Stop, Trial
from dovetail.tuning_db.trials import Trials
from dovetail.tuning_db.winners import pooled

BATCH = 8
"""Points that are ranked to time one."""
RULED_OUT = 1.15
"""A candidate that takes this many times the best so far, at the best that prediction and residuals
leave to be hoped for, is not timed."""
WORTH = 1.08
"""A second pair is for candidates within this factor of the best so far."""
STOPPED = 1.4
"""The ratio that one is taken to have that was stopped half-way."""
PATIENCE = 40
"""Timed candidates without a better one after which the search has converged."""
GRACE = 0.1
"""The share of the budget by which the gate may exceed it."""
GATE_SHARE, GATE_PAIRS, MOST_OF_BUDGET = 0.25, 12, 0.5
"""The share of the budget kept for the gate, the pairs it is kept for, and no more than this."""


class Search:
    """One tuning at work; ``show`` is called after every stored trial. ``work`` has the seconds by
    class of all schedules that ran."""

    def __init__(
        self,
        space: Space,
        sampler: Sampler,
        ranker: Ranker,
        measurer: Measurer,
        trials: Trials,
        tuning: str,
        key: Key,
        clock: Clock,
        show: Callable[[Tick], None],
    ) -> None:
        self._space, self._sampler, self._ranker = space, sampler, ranker
        self._measurer, self._trials, self._tuning = measurer, trials, tuning
        self.key, self.clock, self._show = key, clock, show
        self._number = 0
        self._known = Known(trials, key)
        self._built: dict[str, Built] = {}
        self.timed = self.ruled_out = 0
        self._since_best = 0
        self.work: list[Work] = []

    @property
    def best(self) -> float:
        """The lowest median ratio so far, 1 for the default's."""
        return self._known.best

    def resume(self) -> int:
        """Take over the rows that are there; returns how many."""
        self._known.read()
        told = [(t.knobs, told_of(t)) for t in pooled(self._known.rows) if t.note != DEFAULT]
        rebuild(self._sampler, self._space, told)
        self._hold_against_model()
        return len(self._known.rows)

    def seed(self, points: Sequence[dict[str, int]]) -> None:
        """Time these points first: what was best elsewhere."""
        for point in points:
            if self.clock.left > self._reserve():
                candidate = self._candidate(point)
                if candidate is not None:
                    self._time(candidate)

    def run(self) -> Stop:
        """Search until the gate's share of the budget is left, or all of it is spent where there is
        nothing for the gate, or nothing new is proposed."""
        for reserve in (self._reserve, self._nothing_to_gate):
            while self.clock.left > reserve():
                if self._since_best >= PATIENCE:
                    return "converged"
                candidates = self._proposed()
                if candidates is None:
                    return "space"
                if candidates:
                    first, *others = self._ranker.order(candidates)
                    for later in others:
                        self._sampler.tell_later(later.point, self._ranker.rough(later))
                    if self._ranker.expected(first) > RULED_OUT * self.best:
                        self._rule_out(first)
                    else:
                        self._time(first)
        return "budget"

    def gate(self) -> None:
        """Time the best few again, in fresh pairs, until one is faster beyond doubt or the budget
        is spent: these pairs decide."""
        left = finalists(self._known.rows)
        while len(left) > 1 and self._has_time(GATE_PAIRS + len(left)):
            again = sorted((self._again(t, 2, CONFIRM), t.digest, t) for t in left)
            left = [trial for _, _, trial in again[: (len(again) + 1) // 2]]
        # One that turns out to be no better leaves the rest of the time to the next.
        for number, trial in enumerate(finalists(self._known.rows)):
            if number and (passed(self._known.rows) or not self._has_time(FEWEST)):
                return
            fits = int(self.clock.left / max(self._pair_seconds(), 1e-9))
            self._again(trial, max(FEWEST, min(MOST_PAIRS, fits)), GATE)

    def _proposed(self) -> list[Candidate] | None:
        """New candidates of the sampler that fit; None if it has no more points."""
        points = self._sampler.propose(BATCH)
        if not points:
            return None
        self._known.read()
        found = {c.digest: c for p in points if (c := self._candidate(p)) is not None}
        kept = []
        for candidate in found.values():
            if self._ranker.hoped(candidate) > RULED_OUT * self.best:
                self._rule_out(candidate)
            else:
                kept.append(candidate)
        return kept

    def _rule_out(self, candidate: Candidate) -> None:
        self.ruled_out += 1
        self._sampler.tell_skipped(candidate.point, self._ranker.rough(candidate))

    def _candidate(self, point: dict[str, int]) -> Candidate | None:
        """The point's candidate, or None if it does not fit or was timed: the sampler is told."""
        name = codec.digest(point)
        if name not in self._built:
            self._built[name] = self._space.build(point)
        built = self._built[name]
        if not built.moves:
            self._store_over(point, built.over, built.why)
            self._sampler.tell_over(point, built.over)
            return None
        digest = moves_digest(built.moves)
        known = self._known.by_digest.get(digest)
        if known is not None:
            self._tell(point, known)
            return None
        return Candidate(point, built.moves, digest)

    def _tell(self, point: Mapping[str, int], trial: Trial) -> None:
        ratio = told_of(trial)
        if ratio == math.inf:
            self._sampler.tell_over(point, 1.0)
        else:
            self._sampler.tell(point, ratio)

    def _store_over(self, point: dict[str, int], over: float, why: str) -> None:
        name = codec.digest(point)
        if name not in self._known.over:
            self._known.over.add(name)
            self._add(Trial(self._number, {"point": point}, point, "invalid", note=why))

    def _time(self, candidate: Candidate) -> None:
        best = self.best
        done = self._ranker.done(candidate.moves, candidate.digest)
        terms = Terms(2, worth=best * WORTH, shared=True, done=done)
        trial = self._store(candidate, self._measurer.pairs(candidate.moves, terms), SEARCH)
        ratio = ratio_of(trial)
        if trial.state == "throttled":
            self._sampler.tell_later(candidate.point, self._ranker.rough(candidate))
            return
        if ratio is not None and ratio < best and self._has_time(2, beside=self._reserve()):
            # A lucky sample would steer all that follows: the best is looked at twice.
            more = self._measurer.pairs(candidate.moves, Terms(2, worth=best * WORTH))
            self._store(candidate, more, CONFIRM)
        self._tell(candidate.point, self._known.by_digest[candidate.digest])
        self.timed += 1
        self._since_best = 0 if self.best < best else self._since_best + 1
        self._hold_against_model()

    def correct(self, work: Work) -> None:
        """Predict from now on with what the default's measured seconds say of each class of work:
        once, before anything is stored, so that all predictions of a call are alike."""
        self.work.append(work)
        self._ranker.correct(factors([work])[0])
        self._measurer.default_done = self._ranker.done(self._ranker.untuned)

    def _hold_against_model(self) -> None:
        """Let measured ratios correct the predictions of what is still to be ranked."""
        default = self._known.default
        if default is None or not default.predicted_seconds:
            return
        seen = []
        for trial in self._known.by_digest.values():
            ratio = STOPPED if trial.state == "timeout" else ratio_of(trial)
            point = self._space.complete(point_of_trial(trial))
            if ratio is None or not trial.predicted_seconds or not self._space.holds(point):
                continue
            seen.append((point, ratio * default.predicted_seconds / trial.predicted_seconds))
        self._ranker.residuals.learn(seen)

    def _again(self, trial: Trial, pairs: int, why: str) -> float:
        """More pairs of a trial's candidate; their median ratio, infinite if it failed."""
        moves = moves_of(trial)
        # A median of many pairs stands a disturbed one, and the gate is not held twice.
        terms = Terms(pairs, disturbed=math.inf, left=lambda: self.clock.left)
        if why == GATE:
            # Long runs may take a little more than the budget rather than end undecided.
            grace = GRACE * self.clock.budget
            terms = replace(terms, enough=decided, left=lambda: self.clock.left + grace)
        found = self._measurer.pairs(moves, terms)
        candidate = Candidate(point_of_trial(trial), moves, moves_digest(moves))
        stored = self._store(candidate, found, why)
        return statistics.median(stored.ratios) if stored.state == "ok" else math.inf

    def _store(self, candidate: Candidate, pairs: Pairs, why: str) -> Trial:
        if pairs.answer is not None and pairs.answer.work:
            self.work.append(pairs.answer.work)
        trial = Trial(
            self._number,
            {"moves": [codec.encode(move) for move in candidate.moves]},
            candidate.point,
            pairs.state,
            tuple(pairs.samples),
            tuple(pairs.defaults),
            self._ranker.seconds(candidate.moves),
            pairs.error,
            pairs.note or why,
        )
        self._add(trial)
        return trial

    def _add(self, trial: Trial) -> None:
        self._trials.add(self._tuning, self.key, trial)
        self._number += 1
        self._known.read()
        if trial.state != "invalid":
            self._show(self._tick(trial))

    def store_default(self, samples: Sequence[float]) -> None:
        """Store the default, trial 0 of every key."""
        if self._known.default is not None:
            return
        moves = [codec.encode(move) for move in self._ranker.untuned]
        seconds = self._ranker.seconds(self._ranker.untuned)
        base, timed = dict(self._space.base), tuple(samples)
        self._add(
            Trial(self._number, {"moves": moves}, base, "ok", timed, timed, seconds, 0.0, DEFAULT)
        )

    def _tick(self, trial: Trial) -> Tick:
        ratio = ratio_of(trial)
        changed = {k: v for k, v in trial.knobs.items() if self._space.base.get(k) != v}
        knobs = ", ".join(f"{name} {value}" for name, value in changed.items()) or "as planned"
        took = trial.state if ratio is None else f"{ratio:.3f} of the untuned time"
        phase: Literal["search", "gate"] = "gate" if trial.note == GATE else "search"
        text = f"{took} ({knobs})"
        number = trial.number
        return Tick(number, self.timed, self.ruled_out, self.best, self.clock.spent, text, phase)

    def _pair_seconds(self) -> float:
        return 2 * min(self._measurer.wall, self.clock.budget)

    def _nothing_to_gate(self) -> float:
        return 0.0 if self.best >= 1.0 else math.inf

    def _has_time(self, pairs: int, beside: float = 0.0) -> bool:
        return self.clock.left > pairs * self._pair_seconds() + beside

    def _reserve(self) -> float:
        """Seconds that the gate will need; while nothing is faster, no more than the fewest."""
        pairs = GATE_PAIRS if self.best < 1.0 else FEWEST + 1
        share = GATE_SHARE if self.best < 1.0 else 0.0
        seconds = max(share * self.clock.budget, pairs * self._pair_seconds())
        return min(seconds, MOST_OF_BUDGET * self.clock.budget)
