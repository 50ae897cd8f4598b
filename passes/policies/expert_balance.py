"""Even device loads: DeepSeek's EPLB as published, and ``balance``, which is even by weighted
replicas where there are enough slots, and searched for or proved where there are not."""

from collections.abc import Sequence

import numpy as np

from dovetail.ir.errors import InputError
from dovetail.ir.expert_placement import LayerPlacement, PlacementProblem
from dovetail.passes.policies.expert_layout import (
    OPEN,
    Bools,
    Draft,
    Floats,
    Ints,
    Knobs,
    capacity_of,
    certificate,
    even_shares,
    fill_open,
    held_by,
    layer_of,
    mixed_loads,
    node_of,
    shares_by_amount,
    split_shares,
)
from dovetail.solvers.expert_eplb import eplb as eplb_slots
from dovetail.solvers.expert_eplb import pack, replicate
from dovetail.solvers.expert_exact import exact_even, exact_weighted
from dovetail.solvers.expert_fill import fill
from dovetail.solvers.expert_search import SlotSearch
from dovetail.solvers.expert_split import split
from dovetail.solvers.expert_weigh import improve

BALANCE_KNOBS: Knobs = {"split": "weighted", "rounds": 0, "seed": 0, "work": 2.0}
_EVEN = 1e-6
_STEPS, _RESTARTS = 1000, 1.0
_SMALL = 200
"""Experts times devices up to which a layer that is not proved even goes to the exact model."""


def eplb(problem: PlacementProblem, knobs: Knobs) -> Draft:
    """DeepSeek's EPLB (2025): hierarchical where expert groups divide over the nodes, else global;
    replicas share evenly."""
    if len(set(problem.slots)) > 1:
        raise InputError(
            f"policy eplb needs the same slots on every device, found {problem.slots}; "
            "use policy balance"
        )
    loads, capacity = mixed_loads(problem), capacity_of(problem)
    total = int(capacity.sum())
    global_mode = problem.expert_groups % problem.nodes != 0
    if not global_mode and total % problem.nodes:
        raise InputError(f"{total} slots do not divide into {problem.nodes} nodes")
    slots = eplb_slots(loads, total, problem.expert_groups, problem.nodes, problem.devices)
    shaped = slots.reshape(problem.layers, problem.devices, -1)
    mode = "global" if global_mode or problem.nodes == 1 else "hierarchical"
    return _even_draft(loads, shaped, capacity, (f"EPLB in {mode} mode",))


def balance(problem: PlacementProblem, knobs: Knobs) -> Draft:
    """Even loads. ``split`` is "weighted" or "even" (for engines that can only share evenly),
    ``rounds`` of restarts of the search for the latter, ``work`` for proofs of small layers."""
    if knobs["split"] == "even":
        return _balance_even(problem, knobs)
    if knobs["split"] != "weighted":
        raise InputError(f"split is {knobs['split']!r}, expected 'weighted' or 'even'")
    return _balance_weighted(problem, knobs)


def _balance_weighted(problem: PlacementProblem, knobs: Knobs) -> Draft:
    loads, capacity = mixed_loads(problem), capacity_of(problem)
    homes = _home_nodes(problem, loads)
    filled = fill(loads, capacity, node_of(problem) if homes is not None else None, homes)
    bound = weighted_bound(loads, capacity)
    shares = shares_by_amount(filled.expert, filled.amount, loads)
    uneven = np.flatnonzero(filled.load.max(1) > bound * (1 + _EVEN))
    others = dict(zip(uneven.tolist(), _searched(loads[uneven], capacity, knobs), strict=True))
    layers, certificates = [], []
    for number in range(problem.layers):
        experts, part = filled.expert[number], shares[number]
        value, low = float(filled.load[number].max()), float(bound[number])
        if number in others:
            starts = (others[number], experts)
            held, low = _weighed(loads[number], starts, low, capacity, knobs)
            solved = split(loads[number], held)
            if solved.objective < value:
                experts, value = _slots_of(held, capacity), solved.objective
                part = split_shares(experts, solved.value.shares)
        if (experts == OPEN).any():
            experts = fill_open(experts, loads[number], capacity)
        layers.append(layer_of(experts, part, capacity))
        certificates.append(certificate("max_load", number, value, low))
    notes = () if homes is None else (_leaving(problem, layers, loads, homes),)
    return Draft(tuple(layers), tuple(certificates), notes)


def weighted_bound(loads: Floats, capacity: Ints) -> Floats:
    """Per layer, a load that the heaviest device has under any placement and any shares: the mean,
    or the largest expert over as many devices as can hold it."""
    devices, experts = len(capacity), loads.shape[1]
    most = min(devices, int(capacity.sum()) - experts + 1)
    return np.asarray(np.maximum(loads.sum(1) / devices, loads.max(1) / most))


def even_bound(loads: Floats, capacity: Ints) -> Floats:
    """The same for replicas that share evenly: the mean, or the heaviest replica under the counts
    that make it lightest."""
    _, count = replicate(loads, int(capacity.sum()))
    return np.asarray(np.maximum(loads.sum(1) / len(capacity), (loads / count).max(1)))


def _searched(loads: Floats, capacity: Ints, knobs: Knobs) -> Ints:
    """Slots by the search with even shares, for layers that could not be filled evenly."""
    if not len(loads):
        return np.empty((0, 1, 1), np.int64)
    scale = loads.sum(1, keepdims=True) / len(capacity)
    bound = weighted_bound(loads, capacity) / scale[:, 0]
    return _search_even(loads / scale, bound, capacity, knobs)[0]


def _weighed(
    loads: Floats, starts: Sequence[Ints], bound: float, capacity: Ints, knobs: Knobs
) -> tuple[Bools, float]:
    """Who holds what for the best weighted shares, from the best of ``starts``; random walks and
    the exact model where the layer is small; and a bound."""
    candidates = [held_by(slots, len(loads)) for slots in starts]
    held = min(candidates, key=lambda h: split(loads, h).objective)
    if loads.size * len(capacity) > _SMALL:
        return held, bound
    work = float(knobs["work"])
    held = _improved(loads, held, capacity, bound, int(work * _RESTARTS), int(knobs["seed"]))
    if split(loads, held).objective > bound * (1 + _EVEN):
        exact = exact_weighted(loads, capacity, work / 4, held)
        bound, held = max(bound, exact.bound or bound), exact.value
    return held, bound


def _improved(
    loads: Floats, start: Bools, capacity: Ints, enough: float, restarts: int, seed: int
) -> Bools:
    """The best of several random walks from ``start``."""
    best, value = start, split(loads, start).objective
    for number in range(restarts):
        if value <= enough * (1 + _EVEN):
            break
        held = improve(loads, start, capacity, _STEPS, enough, seed + number)
        if (found := split(loads, held).objective) < value:
            best, value = held, found
    return best


def _slots_of(held: Bools, capacity: Ints) -> Ints:
    slots = np.full((len(capacity), int(capacity.max())), OPEN)
    for device, column in enumerate(held.T):
        mine = np.flatnonzero(column)
        slots[device, : len(mine)] = mine
    return slots


def _balance_even(problem: PlacementProblem, knobs: Knobs) -> Draft:
    loads, capacity = mixed_loads(problem), capacity_of(problem)
    scale = np.maximum(loads.sum(1, keepdims=True), 1e-300) / problem.devices
    bound = even_bound(loads, capacity)
    slots, worst = _search_even(loads / scale, bound / scale[:, 0], capacity, knobs)
    low = bound.copy()
    if problem.experts * problem.devices <= _SMALL:
        for number in np.flatnonzero(worst * scale[:, 0] > bound * (1 + _EVEN)):
            exact = exact_even(
                loads[number][None], capacity, float(knobs["work"]), _once(slots[number], loads)
            )
            if exact.objective <= worst[number] * (1 + _EVEN):
                slots[number] = _slots_of(exact.value, capacity)
                low[number] = max(low[number], (exact.bound or 1.0) * scale[number, 0])
    return _even_draft(loads, slots, capacity, (), low)


def _search_even(ratio: Floats, bound: Floats, capacity: Ints, knobs: Knobs) -> tuple[Ints, Floats]:
    """Slots and worst ratio of every layer: the better of two starts, one of them EPLB's slots
    where every device has as many (so that no layer is worse than EPLB's)."""
    experts = ratio.shape[1]
    searches = [SlotSearch(ratio[:, None], capacity)]
    if len(set(capacity.tolist())) == 1:
        published = eplb_slots(ratio, int(capacity.sum()), 1, 1, len(capacity))
        searches.append(SlotSearch(ratio[:, None], capacity))
        searches[1].adopt(published.reshape(searches[0].slots.shape))
    for search in searches:
        search.run(bound, int(knobs["rounds"]), int(knobs["seed"]))
    worst = np.stack([search.worst() for search in searches])
    every = np.stack([search.slots for search in searches])
    best = worst.argmin(0)
    slots = every[best, np.arange(len(ratio))]
    return np.where(slots == experts, OPEN, slots), worst.min(0)


def _once(slots: Ints, loads: Floats) -> Bools | None:
    """Who holds what; None if a device holds an expert twice, which the exact model never does."""
    held = held_by(slots, loads.shape[1])
    return held if held.sum() == (slots != OPEN).sum() else None


def _even_draft(
    loads: Floats,
    slots: Ints,
    capacity: Ints,
    notes: tuple[str, ...],
    bound: Floats | None = None,
) -> Draft:
    bound = even_bound(loads, capacity) if bound is None else bound
    layers, certificates = [], []
    for number, experts in enumerate(slots):
        shares = even_shares(experts, loads.shape[1])
        weight = np.append(loads[number], 0.0)[experts] * shares
        layers.append(layer_of(fill_open(experts, loads[number], capacity), shares, capacity))
        certificates.append(certificate("max_load", number, weight.sum(1).max(), bound[number]))
    return Draft(tuple(layers), tuple(certificates), notes)


def _home_nodes(problem: PlacementProblem, loads: Floats) -> Ints | None:
    """The node of every expert ``[layer, expert]``, whole groups together, where there are groups
    and nodes."""
    if problem.nodes == 1 or problem.expert_groups == 1:
        return None
    if problem.expert_groups % problem.nodes:
        raise InputError(
            f"{problem.expert_groups} expert groups do not divide into {problem.nodes} nodes"
        )
    per_node = problem.devices // problem.nodes
    least = min(sum(problem.slots[i : i + per_node]) for i in range(0, problem.devices, per_node))
    if least * problem.nodes < problem.experts:
        raise InputError(
            f"a node has {least} slots, its {problem.experts // problem.nodes} experts do not fit"
        )
    grouped = loads.reshape(problem.layers, problem.expert_groups, -1).sum(2)
    node, _ = pack(grouped.astype(np.float32), problem.nodes)
    return np.repeat(node, problem.experts // problem.expert_groups, axis=1)


def _leaving(
    problem: PlacementProblem, layers: list[LayerPlacement], loads: Floats, homes: Ints
) -> str:
    """How much load replicas serve outside the node of their expert's group."""
    nodes, out = node_of(problem), 0.0
    own = np.stack([np.where(homes == n, loads, 0).sum(1) for n in range(problem.nodes)], 1)
    least = np.maximum(own - loads.sum(1, keepdims=True) / problem.nodes, 0).sum()
    for number, layer in enumerate(layers):
        for device, (row, shares) in enumerate(zip(layer.experts, layer.shares, strict=True)):
            for expert, share in zip(row, shares, strict=True):
                if nodes[device] != homes[number, expert]:
                    out += share * loads[number, expert]
    total = max(float(loads.sum()), 1e-300)
    return (
        f"{out / total:.1%} of the load is served outside the node of its expert group; "
        f"even loads need at least {least / total:.1%}"
    )
