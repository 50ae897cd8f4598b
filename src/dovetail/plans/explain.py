"""`dovetail plan explain`: why the winner wins, what binds it, what more of a resource would give,
and which policy came second and why."""

from collections.abc import Mapping
from dataclasses import dataclass

from dovetail.ir import codec
from dovetail.ir.errors import DovetailError
from dovetail.ir.moves import Dispatch
from dovetail.ir.plan import Candidate, Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.passes.engine_use import EngineUse, engine_use
from dovetail.passes.expert_precision import settled
from dovetail.passes.memory import resident_bytes
from dovetail.passes.sensitivity import Knobs, Note, Sensitivity, sensitivity

SMALL = 0.02
"""Share of a difference below which a reason for it is not named."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What distinguishes one schedule from another. ``waiting`` is the time in which the busiest
    engine waits, so that set-up, its work and its waiting make up the predicted seconds."""

    seconds: float
    setup_seconds: float
    setup_bytes: int
    seqs: int
    steps: int
    step_bytes: Mapping[str, int]
    """Bytes that the disk and every link move in a step."""
    busiest: str
    work: float
    waiting: float

    @classmethod
    def of(cls, graph: TaskGraph, plan: Plan, engines: tuple[EngineUse, ...]) -> "Facts":
        """The facts of a plan, with what its engines do."""
        found, busiest = plan.prediction, max(engines, key=lambda engine: engine.busy)
        setup = _setup_bytes(graph, plan)
        moved = {"disk": found.disk_bytes - setup, **found.link_bytes}
        return cls(
            seconds=found.seconds,
            setup_seconds=found.setup_seconds,
            setup_bytes=setup,
            seqs=next(move.seqs for move in plan.moves if isinstance(move, Dispatch)),
            steps=found.steps,
            step_bytes={name: max(0, size) // found.steps for name, size in moved.items()},
            busiest=busiest.engine,
            work=busiest.busy,
            waiting=found.seconds - found.setup_seconds - busiest.busy,
        )

    @property
    def share(self) -> float:
        """Share of the steps' time in which the busiest engine works."""
        return self.work / (self.work + self.waiting)


def _setup_bytes(graph: TaskGraph, plan: Plan) -> int:
    layout = apply_moves(graph, plan.moves)
    if layout.device is None:
        return resident_bytes(layout)
    return round(plan.prediction.setup_seconds * plan.machine.disk.peak)


@dataclass(frozen=True, slots=True)
class Reason:
    """A part of the difference between the second and the first; positive seconds are lost."""

    kind: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Second:
    """The best schedule of another policy; ``same`` if it is the winner's under another name.
    ``reasons`` add up to what it is slower, what weighs most first; empty, with ``facts`` missing,
    if its schedule cannot be made again from its knobs."""

    policy: str
    knobs: Knobs
    seconds: float
    same: bool
    facts: Facts | None
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that is said of a plan. ``best`` has the fastest candidate of every policy, fastest
    first, and ``refused`` the policies that fit nothing."""

    plan: Plan
    sensitivity: Sensitivity
    facts: Facts
    second: Second | None
    best: tuple[Candidate, ...]
    refused: tuple[Candidate, ...]

    def as_dict(self) -> dict[str, object]:
        """As JSON data; of the plan only what identifies it, its prediction and its bound."""
        plan, data = self.plan, codec.encode(self)
        assert isinstance(data, dict)
        about = {
            "digest": plan.digest(),
            "policy": plan.policy,
            "knobs": codec.encode(plan.knobs),
            "prediction": codec.encode(plan.prediction),
            "bound": codec.encode(plan.bound),
        }
        binds = {"engine": self.sensitivity.busiest.engine, "bound": plan.bound.resource}
        return {**data, "plan": about, "binds": binds}


def explain(graph: TaskGraph, plan: Plan, note: Note) -> Explanation:
    """Explain a plan; solves it again a few times, of which ``note`` is told."""
    given, (graph, plan) = plan, settled(graph, plan)
    found = sensitivity(graph, plan, note)
    facts = Facts.of(graph, plan, found.engines)
    best = best_of_policies(plan)
    others = [candidate for candidate in best if candidate.policy != plan.policy]
    return Explanation(
        plan=given,
        sensitivity=found,
        facts=facts,
        second=_second(graph, plan, facts, others[0]) if others else None,
        best=best,
        refused=tuple(c for c in plan.candidates if c.seconds is None),
    )


def best_of_policies(plan: Plan) -> tuple[Candidate, ...]:
    """The fastest candidate of every policy that fits, fastest first; of the plan's policy the plan
    itself, which may have been improved since it was a candidate."""
    found = {plan.policy: Candidate(plan.policy, plan.knobs, plan.prediction.seconds)}
    for candidate in sorted(plan.candidates, key=lambda c: c.seconds or 0.0):
        if candidate.seconds is not None:
            found.setdefault(candidate.policy, candidate)
    return tuple(sorted(found.values(), key=lambda c: c.seconds or 0.0))


def _second(graph: TaskGraph, plan: Plan, first: Facts, candidate: Candidate) -> Second:
    assert candidate.seconds is not None
    policy, knobs = candidate.policy, candidate.knobs
    try:
        other = choose(graph, plan.machine, plan.budget, plan.workload, policy, knobs)
    except DovetailError:
        return Second(policy, knobs, candidate.seconds, False, None, ())
    if other.moves == plan.moves:
        return Second(policy, knobs, candidate.seconds, True, first, ())
    facts = Facts.of(graph, other, engine_use(graph, other))
    return Second(policy, knobs, facts.seconds, False, facts, reasons(first, facts))


def reasons(first: Facts, second: Facts) -> tuple[Reason, ...]:
    """Where the second loses time and where it saves some, what weighs most first."""
    gap = abs(second.seconds - first.seconds)
    found = [
        Reason("set-up", second.setup_seconds - first.setup_seconds),
        Reason("work", second.work - first.work),
        Reason("waiting", second.waiting - first.waiting),
    ]
    named = [reason for reason in found if abs(reason.seconds) > SMALL * gap]
    return tuple(sorted(named, key=lambda reason: -reason.seconds))
