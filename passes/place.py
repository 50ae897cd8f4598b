"""Expert placement over devices.

``problem -> placement``: the expert in every slot of every device, the share of tokens that each
slot serves, and what was proved of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dovetail.ir.errors import InputError
from dovetail.ir.expert_placement import VERSION, ExpertPlacement, PlacementProblem
from dovetail.passes.policies.expert_affinity import ILP_KNOBS, expert_placement_ilp
from dovetail.passes.policies.expert_balance import BALANCE_KNOBS, balance, eplb
from dovetail.passes.policies.expert_latency import LATENCY_KNOBS, latency
from dovetail.passes.policies.expert_layout import Draft, Knobs
from dovetail.passes.policies.expert_moves import MIN_MOVE_KNOBS, min_move
from dovetail.passes.policies.expert_robust import ROBUST_KNOBS, robust


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """A named policy of expert placement, where it comes from, and its knobs with defaults."""

    name: str
    source: str
    knobs: Knobs
    draft: Callable[[PlacementProblem, Knobs], Draft]


PLACEMENT_POLICIES: dict[str, PlacementPolicy] = {
    policy.name: policy
    for policy in (
        PlacementPolicy("eplb", "DeepSeek EPLB (2025)", {}, eplb),
        PlacementPolicy(
            "balance",
            "alias method (Walker, 1974) on devices; local search; CP-SAT where small",
            BALANCE_KNOBS,
            balance,
        ),
        PlacementPolicy(
            "min_move",
            "fewest copies by CP-SAT with Hall cuts",
            MIN_MOVE_KNOBS,
            min_move,
        ),
        PlacementPolicy(
            "expert_placement_ilp",
            "ExFlow (2024), MoETuner (2025), grouping of Speculative MoE (2025)",
            ILP_KNOBS,
            expert_placement_ilp,
        ),
        PlacementPolicy("robust", "scenario max-min", ROBUST_KNOBS, robust),
        PlacementPolicy(
            "latency",
            "roofline of a step (METRO, 2025; CRAFT, 2026)",
            LATENCY_KNOBS,
            latency,
        ),
    )
}


def place(
    problem: PlacementProblem, policy: str = "auto", knobs: Knobs | None = None
) -> ExpertPlacement:
    """The placement of a named policy, or of the one that fits what the problem states.

    ``auto`` is ``min_move`` where there is a current placement, ``expert_placement_ilp`` where
    there are transitions or token groups, ``latency`` where there is a step model, ``robust``
    where there are several scenarios, and ``balance`` otherwise. Raises InputError for an unknown
    policy or knob, and where a policy lacks what it needs.
    """
    chosen = _choose(problem) if policy == "auto" else policy
    if chosen not in PLACEMENT_POLICIES:
        names = ", ".join(["auto", *PLACEMENT_POLICIES])
        raise InputError(f"unknown placement policy {policy!r}, expected one of {names}")
    entry = PLACEMENT_POLICIES[chosen]
    settings = _settings(entry, knobs or {})
    draft = entry.draft(problem, settings)
    return ExpertPlacement(
        version=VERSION,
        problem=problem.digest(),
        policy=chosen,
        knobs=settings,
        experts=problem.experts,
        nodes=problem.nodes,
        layers=draft.layers,
        certificates=draft.certificates,
        group_devices=draft.group_devices,
        notes=draft.notes,
    )


def _choose(problem: PlacementProblem) -> str:
    if problem.current is not None:
        return "min_move"
    if problem.transitions is not None or problem.token_groups is not None:
        return "expert_placement_ilp"
    if problem.step is not None:
        return "latency"
    return "robust" if len(problem.loads) > 1 else "balance"


def _settings(policy: PlacementPolicy, given: Knobs) -> Mapping[str, bool | int | float | str]:
    for name, value in given.items():
        if name not in policy.knobs:
            known = ", ".join(policy.knobs) or "none"
            raise InputError(f"policy {policy.name} has no knob {name!r}; its knobs: {known}")
        default = policy.knobs[name]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise InputError(
                f"knob {name} of policy {policy.name} is {value!r}, expected "
                f"{'a number' if isinstance(default, float) else type(default).__name__}"
            )
    return {**policy.knobs, **given}
