"""Placement for a set of load scenarios: the worst of them decides, not their mean."""

import numpy as np

from dovetail.ir.errors import InputError
from dovetail.ir.expert_placement import PlacementProblem
from dovetail.passes.policies.expert_layout import (
    OPEN,
    Draft,
    Floats,
    Knobs,
    capacity_of,
    certificate,
    even_shares,
    fill_open,
    held_by,
    layer_of,
    scenario_loads,
    split_shares,
)
from dovetail.solvers.expert_robust import relative, robust_split
from dovetail.solvers.expert_search import SlotSearch

ROBUST_KNOBS: Knobs = {"split": "weighted", "rounds": 60, "seed": 0}


def robust(problem: PlacementProblem, knobs: Knobs) -> Draft:
    """Lowest worst ratio of heaviest to mean device over all scenarios, one placement and one set
    of shares for all. ``split`` is "weighted" (a linear program over the placement found) or
    "even"; ``rounds`` restarts the search."""
    if knobs["split"] not in ("weighted", "even"):
        raise InputError(f"split is {knobs['split']!r}, expected 'weighted' or 'even'")
    capacity = capacity_of(problem)
    ratio = relative(scenario_loads(problem).transpose(1, 0, 2), problem.devices)
    bound = scenario_bound(ratio, problem)
    search = SlotSearch(ratio, capacity)
    search.run(bound, int(knobs["rounds"]), int(knobs["seed"]))
    layers, certificates = [], []
    for number, slots in enumerate(search.slots):
        worth = ratio[number].max(0)
        found = np.where(slots == problem.experts, OPEN, slots)
        experts = fill_open(found, worth, capacity)
        shares, value = even_shares(found, problem.experts), float(search.worst()[number])
        if knobs["split"] == "weighted":
            solved = robust_split(ratio[number], held_by(experts, problem.experts))
            shares, value = split_shares(experts, solved.value.shares), solved.objective
        layers.append(layer_of(experts, shares, capacity))
        certificates.append(certificate("worst_ratio", number, value, bound[number]))
    return Draft(tuple(layers), tuple(certificates))


def scenario_bound(ratio: Floats, problem: PlacementProblem) -> Floats:
    """Per layer, a ratio that no placement is below: 1 where anything is loaded, or the largest
    expert over the most devices that can hold it (``ratio[layer, scenario, expert]``)."""
    most = min(problem.devices, sum(problem.slots) - problem.experts + 1)
    loaded = (ratio.sum((1, 2)) > 0).astype(float)
    return np.asarray(np.maximum(loaded, ratio.max((1, 2)) / most))
