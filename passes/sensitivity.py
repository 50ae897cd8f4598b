"""Sensitivity: `graph, plan -> what a little more of every resource would give`.

Each figure is checked by solving again with that resource changed and all else kept, among the
policies that the plan was chosen from; without a GPU, those that were far behind are left out, and
the others search from where they were best. More of a resource never makes a plan worse, because
the plan's own schedule stays possible; the search, which proves nothing, is held to that.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dovetail.ir.errors import BudgetError
from dovetail.ir.machine import Accelerator, Curve, Machine
from dovetail.ir.moves import Move
from dovetail.ir.plan import Candidate, Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.passes.engine_use import EngineUse, engine_use
from dovetail.passes.predict import predict

GIB = 1 << 30
SMALL_BUDGET = 4 * GIB
"""Below this many bytes one GiB more would be another machine: a quarter more is tried instead."""
MORE_BANDWIDTH = 1e9
"""Bytes/s by which a link is made faster."""
MORE_RATE = 0.25
"""Share by which products are made faster, and by which small budgets grow."""
NEAR = 1.25
"""Policies whose best schedule takes at most this many times as long as the plan search again."""
Knobs = Mapping[str, int | bool]
Note = Callable[[str], None]
Kind = Literal["tier", "link", "rate"]


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that a plan has a certain amount of: the budget of a tier in bytes, the best
    bandwidth of a link in bytes/s, the best rate of matrix products in FLOP/s. ``more`` is the
    amount that is added to see what it would give."""

    kind: Kind
    name: str
    amount: float
    more: float


@dataclass(frozen=True, slots=True)
class Effect:
    """The best schedule with ``amount`` of a resource; ``seconds`` is None where nothing fits."""

    resource: Resource
    amount: float
    seconds: float | None
    policy: str = ""
    knobs: Knobs | None = None


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What was found by solving again. ``base`` is the plan's own problem, unchanged; ``effects``
    has one more unit of every resource, what gives most first."""

    base: Effect
    effects: tuple[Effect, ...]
    engines: tuple[EngineUse, ...]

    @property
    def busiest(self) -> EngineUse:
        """The engine that binds this schedule."""
        return max(self.engines, key=lambda engine: engine.busy)

    def gain(self, effect: Effect) -> float:
        """Seconds that an effect saves."""
        assert effect.seconds is not None and self.base.seconds is not None
        return self.base.seconds - effect.seconds


def sensitivity(graph: TaskGraph, plan: Plan, note: Note) -> Sensitivity:
    """Solve again for the plan's own resources and for a unit more of each; ``note`` is told what
    is being solved."""
    found = resources(graph, plan)
    base = _base(graph, plan, found[0], note)
    effects = [_more(graph, plan, each, base, note) for each in found]
    effects.sort(key=lambda effect: (effect.seconds or 0.0, effect.resource.name))
    return Sensitivity(base, tuple(effects), engine_use(graph, plan))


def _base(graph: TaskGraph, plan: Plan, resource: Resource, note: Note) -> Effect:
    """The plan itself where it is what a search finds today, else what that does find."""
    kept = _seconds(graph, plan.moves, plan.machine, plan.workload)
    tried = [c.seconds for c in plan.candidates if c.seconds is not None]
    if len(tried) > 1 and min(tried) == plan.prediction.seconds == kept:
        return Effect(resource, resource.amount, kept, plan.policy, plan.knobs)
    note("solving again, unchanged")
    return _effect(graph, plan, resource, resource.amount)


def _more(graph: TaskGraph, plan: Plan, resource: Resource, base: Effect, note: Note) -> Effect:
    note(f"solving again with more of the {resource.kind} {resource.name}")
    found = _effect(graph, plan, resource, resource.amount + resource.more)
    return _at_most(found, base)


def _at_most(found: Effect, less: Effect) -> Effect:
    """``found``, or what was found with less of the resource if that is faster."""
    if less.seconds is None or (found.seconds is not None and found.seconds <= less.seconds):
        return found
    return replace(less, resource=found.resource, amount=found.amount)


def resources(graph: TaskGraph, plan: Plan) -> tuple[Resource, ...]:
    """The resources that a plan uses: the tiers of its budget, the links and the processors."""
    machine, gpu = plan.machine, plan.machine.accelerator
    found = [
        Resource("tier", tier, size, GIB if size >= SMALL_BUDGET else int(size * MORE_RATE))
        for tier, size in plan.budget.items()
    ]
    links = {"disk": machine.disk.peak}
    rates = {"cpu": machine.gemm}
    if gpu is not None and "hbm" in plan.budget:
        links |= {"h2d": gpu.h2d.peak, "d2h": gpu.d2h.peak, "peer": gpu.peer_bandwidth}
        rates["gpu"] = gpu.gemm
    found += [Resource("link", name, rate, MORE_BANDWIDTH) for name, rate in links.items() if rate]
    for name, curves in rates.items():
        if graph.dtype in curves:
            peak = curves[graph.dtype].peak
            found.append(Resource("rate", name, peak, peak * MORE_RATE))
    return tuple(found)


def curve(
    graph: TaskGraph,
    plan: Plan,
    base: Effect,
    resource: Resource,
    factors: Iterable[float],
    note: Note,
) -> tuple[Effect, ...]:
    """The best schedule with each of these multiples of a resource, least first; ``base`` is that
    of once as much, and stays what it is where less was found to be faster."""
    points: list[Effect] = []
    best = Effect(resource, 0, None)
    for factor in sorted({*factors, 1.0}):
        if factor == 1:
            point = replace(base, resource=resource, amount=resource.amount)
        else:
            note(f"solving again with {factor:g} times the {resource.kind} {resource.name}")
            point = _at_most(_effect(graph, plan, resource, resource.amount * factor), best)
        points.append(point)
        best = _at_most(point, best)
    return tuple(points)


def policy_of(plan: Plan) -> str:
    """What to ask `choose` for to search among the policies that the plan was chosen from."""
    names = {candidate.policy for candidate in plan.candidates}
    return plan.policy if names <= {plan.policy} else "auto"


def _effect(graph: TaskGraph, plan: Plan, resource: Resource, amount: float) -> Effect:
    machine, budget = with_amount(plan, resource, amount)
    found: list[Effect] = []
    try:
        best = choose(graph, machine, budget, plan.workload, policy_of(plan), near=_near(plan))
        found.append(Effect(resource, amount, best.prediction.seconds, best.policy, best.knobs))
    except BudgetError:
        pass
    if amount >= resource.amount:
        kept = _seconds(graph, plan.moves, machine, plan.workload)
        found.append(Effect(resource, amount, kept, plan.policy, plan.knobs))
    if not found:
        return Effect(resource, amount, None)
    return min(found, key=lambda effect: effect.seconds or 0.0)


def _near(plan: Plan) -> list[Candidate]:
    """The best candidate of each policy that is not far behind, and the plan's own knobs: where
    searches for a problem that is hardly different begin. All policies, where none was timed."""
    best: dict[str, Candidate] = {}
    for candidate in plan.candidates:
        known = best.get(candidate.policy)
        if candidate.seconds and (known is None or candidate.seconds < (known.seconds or 0.0)):
            best[candidate.policy] = candidate
    most = NEAR * plan.prediction.seconds
    near = [c for c in best.values() if c.seconds is not None and c.seconds <= most]
    return (
        [Candidate(plan.policy, dict(plan.knobs), plan.prediction.seconds), *near] if near else []
    )


def _seconds(
    graph: TaskGraph, moves: tuple[Move, ...], machine: Machine, workload: Workload
) -> float:
    return predict(apply_moves(graph, moves), machine, workload).seconds


def with_amount(plan: Plan, resource: Resource, amount: float) -> tuple[Machine, dict[str, int]]:
    """The plan's machine and budget with another amount of one resource."""
    machine, budget, name = plan.machine, dict(plan.budget), resource.name
    factor = amount / resource.amount
    if resource.kind == "tier":
        budget[name] = int(amount)
        if budget[name] > machine.tiers.get(name, budget[name]):
            machine = replace(machine, tiers={**machine.tiers, name: budget[name]})
        return machine, budget
    if resource.kind == "link" and name == "disk":
        return replace(machine, disk=_scaled(machine.disk, factor)), budget
    if resource.kind == "rate" and name == "cpu":
        return replace(machine, gemm=_all_scaled(machine.gemm, factor)), budget
    assert machine.accelerator is not None, resource
    gpu = _accelerator(machine.accelerator, name, factor)
    return replace(machine, accelerator=gpu), budget


def _accelerator(gpu: Accelerator, name: str, factor: float) -> Accelerator:
    if name == "gpu":
        return replace(gpu, gemm=_all_scaled(gpu.gemm, factor))
    if name == "h2d":
        return replace(gpu, h2d=_scaled(gpu.h2d, factor))
    if name == "d2h":
        return replace(gpu, d2h=_scaled(gpu.d2h, factor))
    return replace(gpu, peer_bandwidth=gpu.peer_bandwidth * factor)


def _scaled(curve: Curve, factor: float) -> Curve:
    return Curve(curve.x, tuple(y * factor for y in curve.y))


def _all_scaled(curves: Mapping[str, Curve], factor: float) -> dict[str, Curve]:
    return {name: _scaled(each, factor) for name, each in curves.items()}
