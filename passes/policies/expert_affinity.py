"""Placement by integer program on who talks to whom: experts of consecutive layers that tokens
visit one after the other share a device, within a limit on its load.

ExFlow (2024) is transitions with no limit on load; MoETuner (2025) transitions and load; the
grouping of Speculative MoE (2025) places groups of tokens together with the experts they choose.
"""

import numpy as np

from dovetail.ir.errors import InputError
from dovetail.ir.expert_placement import PlacementProblem
from dovetail.passes.policies.expert_layout import (
    OPEN,
    Draft,
    Floats,
    Ints,
    Knobs,
    capacity_of,
    certificate,
    even_shares,
    fill_open,
    layer_of,
    mixed_loads,
    node_of,
)
from dovetail.solvers.expert_affinity import AffinityProblem, Block, Edge
from dovetail.solvers.expert_affinity_solve import solve
from dovetail.solvers.expert_search import SlotSearch

ILP_KNOBS: Knobs = {"load_slack": 0.1, "starts": 8, "work": 10.0, "seed": 0}
"""``load_slack``: how far a device's load may be above the mean (negative: no limit, as ExFlow)."""
_GROUP_ROOM = 1.25


def expert_placement_ilp(problem: PlacementProblem, knobs: Knobs) -> Draft:
    """Least cost of tokens that change device between layers (or leave their group's device), with
    every device's load at most ``1 + load_slack`` times the mean, or what a search finds without
    affinity if that is more. Each expert has one home; slots left over are spares."""
    if problem.transitions is None and problem.token_groups is None:
        raise InputError("policy expert_placement_ilp needs transitions or token groups")
    affinity, first = affinity_problem(problem, float(knobs["load_slack"]), int(knobs["seed"]))
    solved = solve(affinity, int(knobs["starts"]), float(knobs["work"]), int(knobs["seed"]))
    loads, capacity = mixed_loads(problem), capacity_of(problem)
    layers = []
    for number, homes in enumerate(solved.value[first:]):
        slots = _slots(homes, capacity)
        shares = even_shares(slots, problem.experts)
        layers.append(layer_of(fill_open(slots, loads[number], capacity), shares, capacity))
    flow = sum(float(e.flow.sum()) for e in affinity.edges)
    stay = 1 - _crossing(affinity, solved.value) / max(flow, 1e-300)
    notes = [f"{stay:.1%} of token transitions stay on their device"]
    if solved.status == "infeasible":
        notes.append("a device is over the load limit: allow more load_slack")
    groups = tuple(int(d) for d in solved.value[0]) if first else ()
    total = certificate("crossing_cost", None, solved.objective, solved.bound or 0.0)
    return Draft(tuple(layers), (total,), tuple(notes), groups)


def affinity_problem(
    problem: PlacementProblem, load_slack: float, seed: int = 0
) -> tuple[AffinityProblem, int]:
    """Blocks (token groups first, if any) and edges of a placement problem, and the number of the
    first layer's block."""
    loads, capacity = mixed_loads(problem), capacity_of(problem)
    limits = _limits(loads, capacity, load_slack, seed)
    blocks, edges, first = [], [], 0
    if problem.token_groups is not None:
        choices = [np.array(matrix, float) for matrix in problem.token_groups]
        blocks.append(_group_block(sum(c.sum(1) for c in choices), problem.devices, load_slack))
        first = 1
        edges += [Edge(0, first + n, c) for n, c in enumerate(choices)]
    blocks += [Block(w, capacity, float(limit)) for w, limit in zip(loads, limits, strict=True)]
    if problem.transitions is not None:
        edges += [
            Edge(first + n, first + n + 1, np.array(matrix, float))
            for n, matrix in enumerate(problem.transitions)
        ]
    return AffinityProblem(tuple(blocks), tuple(edges), link_costs(problem)), first


def link_costs(problem: PlacementProblem) -> Floats:
    """Cost of a token from device to device: 0, ``node_cost`` in a node, ``link_cost`` beyond."""
    node = node_of(problem)
    cost = np.where(node[:, None] == node[None, :], problem.node_cost, problem.link_cost)
    np.fill_diagonal(cost, 0.0)
    return cost


def _limits(loads: Floats, capacity: Ints, load_slack: float, seed: int) -> Floats:
    if load_slack < 0:
        return np.full(len(loads), np.inf)
    mean = np.maximum(loads.sum(1) / len(capacity), 1e-300)
    search = SlotSearch((loads / mean[:, None])[:, None], capacity, replicas=loads.shape[1])
    search.run(np.ones(len(loads)), 5, seed)
    return np.asarray(np.maximum(1 + load_slack, 1.02 * search.worst()) * mean)


def _group_block(weight: Floats, devices: int, load_slack: float) -> Block:
    most = int(np.ceil(len(weight) / devices * _GROUP_ROOM))
    mean = float(weight.sum()) / devices
    limit = np.inf if load_slack < 0 else max((1 + load_slack) * mean, float(weight.max()))
    return Block(weight, np.full(devices, most), limit)


def _slots(homes: Ints, capacity: Ints) -> Ints:
    slots = np.full((len(capacity), int(capacity.max())), OPEN)
    for device in range(len(capacity)):
        mine = np.flatnonzero(homes == device)
        slots[device, : len(mine)] = mine
    return slots


def _crossing(affinity: AffinityProblem, x: tuple[Ints, ...]) -> float:
    return sum(
        float(e.flow[x[e.first][:, None] != x[e.second][None, :]].sum()) for e in affinity.edges
    )
