"""The gate: which plan a tuning exports, decided from the database's rows alone.

A schedule is exported as tuned only if, in runs made after the search for nothing else, it beat the
untuned one end to end by an interval that excludes 1.0, with outputs that were checked. Otherwise
the untuned plan is exported and says so. Since only rows decide, the same rows give the same
winner on every machine (`dovetail tune --replay`).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dovetail.ir.plan import Candidate, Evidence, Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.predict import predict, verify_layout
from dovetail.tuning.gate import DEFAULT, FEWEST, GATE
from dovetail.tuning.known import moves_of
from dovetail.tuning_db.facts import Key, Trial, Tuning
from dovetail.tuning_db.winners import (
    Interval,
    deciding_interval,
    gate_confidence,
    pooled,
    ranked,
    winner,
)

POLICY = "module_batch"
"""The policy that tuned knobs belong to."""


def decide(trials: Sequence[Trial]) -> tuple[Trial | None, str]:
    """The winner of the gate, or None for the untuned plan, and why."""
    gated = [trial for trial in trials if trial.note == GATE]
    found = winner(gated)
    if found is not None:
        interval = deciding_interval(found.ratios)
        return (
            found,
            f"takes {interval.median:.3f} of the untuned plan's time in {_pairs(interval)}",
        )
    timed = [t for t in trials if t.note != DEFAULT and t.state == "ok"]
    if not timed:
        return None, "no other schedule was timed"
    if not gated:
        return (
            None,
            f"none of {len(pooled(timed))} schedules timed was faster than the untuned plan",
        )
    best = ranked(gated)
    if not best:
        failed = pooled(gated)[0]
        return None, f"the best schedule of the search failed the gate: {failed.state}"
    interval = deciding_interval(best[0].ratios)
    between = "too few to say" if interval.samples < FEWEST else "which does not exclude 1"
    return None, (
        f"the best schedule took {interval.median:.3f} of the untuned plan's time in "
        f"{_pairs(interval)}, {between}"
    )


def evidence_of(
    chosen: Trial | None,
    reason: str,
    trials: Sequence[Trial],
    key: Key,
    tuning: Tuning,
    skew: float,
) -> Evidence:
    """What a plan says of how it was found."""
    timed = [t for t in pooled(trials) if t.state == "ok" and t.note != DEFAULT]
    defaults = [s for trial in trials for s in trial.default_samples]
    found = Evidence(
        outcome="untuned" if chosen is None else "tuned",
        reason=reason,
        untuned=key.protocol.default,
        sample=key.protocol.sample,
        sampler=tuning.sampler,
        seed=tuning.seed,
        trials=len(timed),
        seconds=round(tuning.spent_seconds, 3),
        environment={**key.silicon, **key.software},
        untuned_seconds=statistics.median(defaults) if defaults else 0.0,
        load_skew=skew,
    )
    if chosen is None:
        return found
    interval = deciding_interval(chosen.ratios)
    return replace(
        found,
        ratio=interval.median,
        low=interval.low,
        high=interval.high,
        pairs=interval.samples,
        max_error=chosen.max_error,
    )


def plan_of(untuned: Plan, graph: TaskGraph, chosen: Trial | None, evidence: Evidence) -> Plan:
    """The plan to export; raises DovetailError if the winner is not legal here."""
    if chosen is None:
        return replace(untuned, tuning=evidence)
    moves = moves_of(chosen)
    layout = apply_moves(graph, moves)
    verify_layout(layout, untuned.machine, untuned.budget, untuned.workload)
    prediction = predict(layout, untuned.machine, untuned.workload)
    knobs = {name: int(value) for name, value in chosen.knobs.items()}
    return replace(
        untuned,
        policy=POLICY,
        knobs=knobs,
        moves=moves,
        prediction=prediction,
        candidates=(Candidate(POLICY, knobs, prediction.seconds), *untuned.candidates),
        tuning=evidence,
    )


def untuned_moves(trials: Sequence[Trial]) -> Trial | None:
    """The default among the rows."""
    return next((trial for trial in trials if trial.note == DEFAULT), None)


def summary(plan: Plan) -> str:
    """What to tell of a tuned plan, or of one that stayed as it was."""
    found = plan.tuning
    assert found is not None
    lines = [f"{found.outcome}: {found.reason}"]
    if found.outcome == "tuned":
        lines.append(
            f"  {found.ratio:.3f} of the untuned time, {gate_confidence(found.pairs):.1%} interval "
            f"{found.low:.3f} to {found.high:.3f} ({found.pairs} pairs)"
        )
        if found.max_error is not None:
            lines.append(f"  outputs checked: logits differ by {found.max_error:.1e} of their size")
    if found.sample != plan.workload:
        part, whole = found.sample, plan.workload
        lines.append(
            f"  timed on {part.prompts} of {whole.prompts} prompts with {part.new_tokens} of "
            f"{whole.new_tokens} new tokens"
        )
    return "\n".join(lines)


def changed_knobs(chosen: Mapping[str, int], base: Mapping[str, int]) -> str:
    """The knobs in which two points differ."""
    return ", ".join(
        f"{name} {base.get(name)} -> {value}"
        for name, value in chosen.items()
        if base.get(name) != value
    )


def _pairs(interval: Interval) -> str:
    return f"{interval.samples} pair{'s' if interval.samples != 1 else ''}"
