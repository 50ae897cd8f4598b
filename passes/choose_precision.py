"""Choose among the formats that experts may be in: `graph, …, formats allowed -> plan`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dovetail.ir.codec import digest
from dovetail.ir.errors import BudgetError, InputError
from dovetail.ir.machine import Machine
from dovetail.ir.moves import FORMATS, ExpertFormat, Precision, precision_of
from dovetail.ir.plan import Candidate, Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import format_duration
from dovetail.ir.workload import Workload
from dovetail.passes.choose import choose
from dovetail.passes.expert_precision import with_precision
from dovetail.passes.policies.common import Knobs


def choose_precision(
    graph: TaskGraph,
    machine: Machine,
    budget: Mapping[str, int],
    workload: Workload,
    policy: str = "auto",
    knobs: Knobs | None = None,
    checkpoint: str = "",
    *,
    allow: Sequence[ExpertFormat] = (),
    runs: bool = False,
) -> Plan:
    """The best plan (``choose``) with experts as they are or in one of the formats that ``allow``
    lists; its bound is the least of all formats'. Raises as ``choose`` does, of the model as it is,
    and InputError for a format that the model or the target cannot have."""
    check_allowed(allow)
    if allow and "hbm" in budget:
        raise InputError(
            f"{', '.join(allow)} experts are allowed, but run on the processor only: leave the "
            "permission out, or plan for a budget of ram alone"
        )
    plans: list[Plan] = []
    refused: BudgetError | None = None
    try:
        plans.append(choose(graph, machine, budget, workload, policy, knobs, checkpoint, runs=runs))
    except BudgetError as error:
        refused = error
    for form in allow:
        made = with_precision(graph, form)
        try:
            plan = choose(made, machine, budget, workload, policy, knobs, checkpoint, runs=runs)
        except BudgetError:
            continue
        moves = (Precision("experts", form), *plan.moves)
        plans.append(replace(plan, graph=digest(graph), moves=moves))
    if not plans:
        assert refused is not None
        raise refused
    best = min(plans, key=lambda plan: plan.prediction.seconds)
    least = min((plan.bound for plan in plans), key=lambda bound: bound.seconds)
    others = tuple(_as_candidate(plan) for plan in plans if plan is not best)
    return replace(best, bound=least, candidates=(*best.candidates, *others))


def check_allowed(allow: Sequence[str]) -> None:
    """Raises InputError for a format that is not known, or named twice."""
    for form in allow:
        if form not in FORMATS or allow.count(form) > 1:
            raise InputError(
                f"allow {' '.join(map(str, allow))}: expected {' or '.join(FORMATS)}, each once at "
                "most"
            )


def _as_candidate(plan: Plan) -> Candidate:
    form = precision_of(plan.moves)
    seconds = format_duration(plan.prediction.seconds)
    why = f"with experts {f'in {form}' if form else 'as they are'}: predicted to take {seconds}"
    return Candidate(plan.policy, plan.knobs, None, why)
