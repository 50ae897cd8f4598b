"""The search of `dovetail tune`: propose, rank, time in turn with the default, store, repeat.

Every trial is in the database before the next one begins. Rows that are there already, of an
earlier call or of another tuner at work on the same file, are taken as if just timed.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from dovetail.ir import codec
from dovetail.ir.moves import Move
from dovetail.tuning.clock import Clock, Tick
from dovetail.tuning.measure import Measurer, Pairs
from dovetail.tuning.rank import Candidate, Ranker
from dovetail.tuning.samplers import Sampler, rebuild
from dovetail.tuning.space import Space, moves_digest
from dovetail.tuning_db.facts import Key, Stop, Trial
from dovetail.tuning_db.trials import Trials
from dovetail.tuning_db.winners import pooled

BATCH = 12
"""Points that are ranked to time one."""
RULED_OUT = 1.3
"""A candidate predicted to take this many times the best predicted of those timed is not timed."""
WORTH = 1.08
"""A second pair is for candidates within this factor of the best so far."""
PATIENCE = 30
"""Timed candidates without a better one after which the search has converged."""
GATE_SHARE, GATE_PAIRS, MOST_PAIRS = 0.3, 8, 20
"""The share of the budget kept for the gate, the pairs it aims for and the most it takes. Six are
the fewest that can show anything with 95 % confidence."""
FINALISTS = 3
DEFAULT, SEARCH, CONFIRM, GATE = "default", "", "confirm", "gate"
"""What a trial's note says of why it was made, if nothing else is to be said."""


class Search:
    """One tuning at work; ``show`` is called after every stored trial."""

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
        self._known: dict[str, Trial] = {}
        self._rows: list[Trial] = []
        self._place = 0
        self._over: set[str] = set()
        self.timed = self.ruled_out = 0
        self._since_best = 0
        self._predicted_best = 1.0
        self.answers: list[Pairs] = []

    @property
    def best(self) -> float:
        """The lowest median ratio so far, 1 for the default's."""
        return min((r for t in self._known.values() if (r := _ratio(t)) is not None), default=1.0)

    def resume(self) -> int:
        """Take over the rows that are there; returns how many."""
        self._learn()
        told = [(t.knobs, _told(t)) for t in pooled(self._rows) if t.note != DEFAULT]
        rebuild(self._sampler, self._space, told)
        return len(self._rows)

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
                    ordered = self._ranker.order(candidates, self._space.base)
                    for later in ordered[1:]:
                        self._sampler.tell_later(later.point, self._ranker.rough(later))
                    self._time(ordered[0])
        return "budget"

    def gate(self) -> None:
        """Time the best few again, in fresh pairs, until the budget is spent: they decide."""
        rows = self._trials.of(self.key)
        ran = [t for t in pooled(rows) if t.state == "ok" and t.note != DEFAULT and t.ratios]
        ran = [t for t in ran if statistics.median(t.ratios) < 1.0]
        ran.sort(key=lambda t: (statistics.median(t.ratios), t.digest))
        finalists = ran[:FINALISTS]
        while len(finalists) > 1 and self._has_time(GATE_PAIRS + 2 * len(finalists)):
            again = sorted((self._again(t, 2, CONFIRM), t.digest, t) for t in finalists)
            finalists = [trial for _, _, trial in again[: (len(again) + 1) // 2]]
        for trial in finalists[:1]:
            fits = int(self.clock.left / max(self._pair_seconds(), 1e-9))
            self._again(trial, max(GATE_PAIRS, min(MOST_PAIRS, fits)), GATE)

    def _proposed(self) -> list[Candidate] | None:
        """New candidates of the sampler that fit; None if it has no more points."""
        points = self._sampler.propose(BATCH)
        if not points:
            return None
        self._learn()
        found = {c.digest: c for p in points if (c := self._candidate(p)) is not None}
        kept = []
        for candidate in found.values():
            rough = self._ranker.rough(candidate)
            if rough > RULED_OUT * self._predicted_best:
                self.ruled_out += 1
                self._sampler.tell_skipped(candidate.point, rough)
            else:
                kept.append(candidate)
        return kept

    def _candidate(self, point: dict[str, int]) -> Candidate | None:
        """The point's candidate, or None if it does not fit or was timed: the sampler is told."""
        built = self._space.build(point)
        if not built.moves:
            self._store_over(point, built.over, built.why)
            self._sampler.tell_over(point, built.over)
            return None
        digest = moves_digest(built.moves)
        known = self._known.get(digest)
        if known is not None:
            ratio = _told(known)
            if ratio == math.inf:
                self._sampler.tell_over(point, 1.0)
            else:
                self._sampler.tell(point, ratio)
            return None
        return Candidate(point, built.moves, digest)

    def _store_over(self, point: dict[str, int], over: float, why: str) -> None:
        name = codec.digest(point)
        if name not in self._over:
            self._over.add(name)
            self._add(Trial(self._number, {"point": point}, point, "invalid", note=why))

    def _time(self, candidate: Candidate) -> None:
        best = self.best
        pairs = self._measurer.pairs(candidate.moves, 2, worth=best * WORTH)
        trial = self._store(candidate, pairs, SEARCH)
        ratio = _ratio(trial)
        if trial.state == "throttled":
            self._sampler.tell_later(candidate.point, self._ranker.rough(candidate))
            return
        if ratio is not None and ratio < best:
            # A lucky sample would steer all that follows: the best is looked at twice.
            more = self._measurer.pairs(candidate.moves, 2, worth=best * WORTH)
            self._store(candidate, more, CONFIRM)
        told = _told(self._known[candidate.digest])
        if told == math.inf:
            self._sampler.tell_over(candidate.point, 1.0)
        else:
            self._sampler.tell(candidate.point, told)
        self.timed += 1
        self._since_best = 0 if self.best < best else self._since_best + 1
        self._predicted_best = min(self._predicted_best, self._ranker.rough(candidate))

    def _again(self, trial: Trial, pairs: int, why: str) -> float:
        """More pairs of a trial's candidate; their median ratio, infinite if it failed."""
        moves = moves_of(trial)
        # A median of many pairs stands a disturbed one, and the gate is not held twice.
        found = self._measurer.pairs(moves, pairs, disturbed=math.inf, left=lambda: self.clock.left)
        candidate = Candidate({k: int(v) for k, v in trial.knobs.items()}, moves, trial.digest)
        stored = self._store(candidate, found, why)
        return statistics.median(stored.ratios) if stored.state == "ok" else math.inf

    def _store(self, candidate: Candidate, pairs: Pairs, why: str) -> Trial:
        if pairs.answer is not None:
            self.answers.append(pairs)
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
        self._learn()
        if trial.state != "invalid":
            self._show(self._tick(trial))

    def store_default(self, samples: Sequence[float]) -> None:
        """Store the default, trial 0 of every key."""
        moves = [codec.encode(move) for move in self._ranker.untuned]
        seconds = self._ranker.seconds(self._ranker.untuned)
        base = dict(self._space.base)
        known = any(trial.note == DEFAULT for trial in self._known.values())
        if not known:
            timed = tuple(samples)
            self._add(
                Trial(
                    self._number, {"moves": moves}, base, "ok", timed, timed, seconds, 0.0, DEFAULT
                )
            )

    def _tick(self, trial: Trial) -> Tick:
        ratio = _ratio(trial)
        changed = {k: v for k, v in trial.knobs.items() if self._space.base.get(k) != v}
        knobs = ", ".join(f"{name} {value}" for name, value in changed.items()) or "as planned"
        took = trial.state if ratio is None else f"{ratio:.3f} of the untuned time"
        phase: Literal["search", "gate"] = "gate" if trial.note == GATE else "search"
        text = f"{took} ({knobs})"
        number = trial.number
        return Tick(number, self.timed, self.ruled_out, self.best, self.clock.spent, text, phase)

    def _learn(self) -> None:
        """Read the rows that are new: another tuner may be at work on the same file."""
        for place, trial in self._trials.since(self.key, self._place):
            self._place = place
            self._rows.append(trial)
            if "moves" not in trial.parameters:
                self._over.add(codec.digest(trial.knobs))
            elif trial.state != "throttled":
                name = codec.digest(trial.parameters["moves"])
                same = [self._known[name]] if name in self._known else []
                (self._known[name],) = pooled([*same, trial])

    def _pair_seconds(self) -> float:
        return 2.2 * min(self._measurer.typical, self.clock.budget)

    def _nothing_to_gate(self) -> float:
        return 0.0 if self.best >= 1.0 else math.inf

    def _has_time(self, pairs: int) -> bool:
        return self.clock.left > pairs * self._pair_seconds()

    def _reserve(self) -> float:
        """Seconds that the gate will need; while nothing is faster, no more than the fewest."""
        if self.best >= 1.0:
            return min((GATE_PAIRS - 1) * self._pair_seconds(), 0.5 * self.clock.budget)
        gate = (GATE_PAIRS + 3 * FINALISTS) * self._pair_seconds()
        return min(max(GATE_SHARE * self.clock.budget, gate), 0.6 * self.clock.budget)


def moves_of(trial: Trial) -> tuple[Move, ...]:
    """The moves that a trial timed."""
    return codec.decode(trial.parameters["moves"], tuple[Move, ...])


def _ratio(trial: Trial) -> float | None:
    if trial.state != "ok" or not trial.ratios:
        return None
    return statistics.median(trial.ratios)


def _told(trial: Trial) -> float:
    """What a sampler is told of a trial: its ratio, infinite for one that failed."""
    ratio = _ratio(trial)
    return math.inf if ratio is None else ratio
