"""Placement for the time of a step, not for tokens: a replica that is hit reads its weights again,
so small batches want few replicas and large ones many (METRO, 2025, CRAFT, 2026)."""

import numpy as np

from dovetail.ir.errors import InputError
from dovetail.ir.expert_placement import LayerPlacement, PlacementProblem, StepModel
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
    shares_by_amount,
)
from dovetail.solvers.expert_fill import fill
from dovetail.solvers.expert_search import SlotSearch

LATENCY_KNOBS: Knobs = {"rounds": 0, "seed": 0}
_NEAR = 1e-3
_RISING = 3
"""More replicas are not tried after this many steps of the ladder that each cost more time."""


def slot_seconds(step: StepModel, tokens: Floats) -> Floats:
    """Expected seconds of slots that serve ``tokens`` on average: weights are read if any token
    comes (Poisson arrivals), and GEMMs take their time per token; the larger counts."""
    read = step.read_seconds * -np.expm1(-tokens)
    return np.maximum(read, step.token_seconds * tokens)


def step_tokens(loads: Floats, step: StepModel) -> Floats:
    """Tokens per expert of one step, for loads ``[..., expert]`` of any unit."""
    total = np.maximum(loads.sum(-1, keepdims=True), 1e-300)
    return np.asarray(loads / total * step.tokens * step.top_k)


def layer_seconds(layer: LayerPlacement, tokens: Floats, step: StepModel) -> float:
    """The slowest device of one layer, for ``tokens[expert]`` of a step."""
    return max(
        float(slot_seconds(step, tokens[list(row)] * np.array(shares)).sum())
        for row, shares in zip(layer.experts, layer.shares, strict=True)
    )


def seconds_bound(tokens: Floats, capacity: Ints, step: StepModel) -> Floats:
    """Per layer, seconds that no placement and no shares are below: splitting an expert never makes
    its slots cheaper in sum, and its largest part is at least its share of the devices."""
    devices, experts = len(capacity), tokens.shape[1]
    most = min(devices, int(capacity.sum()) - experts + 1)
    mean = slot_seconds(step, tokens).sum(1) / devices
    return np.asarray(np.maximum(mean, slot_seconds(step, tokens.max(1) / most)))


def latency(problem: PlacementProblem, knobs: Knobs) -> Draft:
    """Lowest expected time of the slowest device in a step of ``problem.step``. Every number of
    replicas in a ladder is searched, and weighted replicas of all slots are compared; slots that
    only cost time stay spare. Raises InputError without a step model."""
    step = problem.step
    if step is None:
        raise InputError("policy latency needs a step model: tokens, top_k and seconds")
    capacity, tokens = capacity_of(problem), step_tokens(mixed_loads(problem), step)
    bound = seconds_bound(tokens, capacity, step)
    filled = fill(tokens, capacity)
    slots, shares = filled.expert, shares_by_amount(filled.expert, filled.amount, tokens)
    best = _worst(slots, shares, tokens, step)
    spare, unit = int(capacity.sum()) - problem.experts, max(float(bound.max()), 1e-300)
    used = np.full(problem.layers, spare)
    before, rising = np.full(problem.layers, np.inf), np.zeros(problem.layers, int)
    for extra in _ladder(spare):
        left = np.flatnonzero((best > bound * (1 + _NEAR)) & (rising < _RISING))
        if not len(left):
            break
        search = SlotSearch(
            tokens[left][:, None],
            capacity,
            lambda t: slot_seconds(step, t) / unit,
            problem.experts + extra,
        )
        search.run(bound[left] / unit, int(knobs["rounds"]), int(knobs["seed"]))
        worst = search.worst() * unit
        rising[left] = np.where(worst > before[left], rising[left] + 1, 0)
        before[left] = worst
        for i in np.flatnonzero(worst < best[left]).tolist():
            number = int(left[i])
            slots[number] = np.where(search.slots[i] == problem.experts, OPEN, search.slots[i])
            shares[number] = even_shares(slots[number], problem.experts)
            best[number], used[number] = worst[i], extra
    layers, certificates = [], []
    for number, found in enumerate(slots):
        experts = fill_open(found, tokens[number], capacity)
        layers.append(layer_of(experts, shares[number], capacity))
        certificates.append(certificate("seconds", number, best[number], bound[number]))
    note = f"replicas in use: {used.min()} to {used.max()} of {spare}"
    return Draft(tuple(layers), tuple(certificates), (note,))


def _ladder(most: int) -> list[int]:
    steps = {0, 1, 2, 3, 4, 6, *(n for k in range(3, 12) for n in (1 << k, 3 << (k - 1)))}
    return sorted({n for n in steps if n < most} | {most})


def _worst(slots: Ints, shares: Floats, tokens: Floats, step: StepModel) -> Floats:
    layer = np.arange(len(slots))[:, None, None]
    served = tokens[layer, np.maximum(slots, 0)] * shares
    return np.asarray(slot_seconds(step, served).sum(2).max(1))
