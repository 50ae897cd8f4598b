"""Re-placement by the fewest copies of expert weights: how far a placement is from even loads, and
what the least is that must move."""

from dataclasses import dataclass

import numpy as np

from dovetail.ir.errors import InputError
from dovetail.ir.expert_placement import LayerPlacement, PlacementProblem
from dovetail.passes.policies.expert_layout import (
    Bools,
    Draft,
    Floats,
    Ints,
    Knobs,
    capacity_of,
    certificate,
    held_by,
    keep_in_place,
    layer_of,
    mixed_loads,
    padded,
    split_shares,
)
from dovetail.solvers.expert_copies import fewest_copies
from dovetail.solvers.expert_greedy_copies import greedy_copies, least
from dovetail.solvers.expert_split import split

MIN_MOVE_KNOBS: Knobs = {"balance": 0.98, "work": 20.0}
_WHOLE = 10
"""Up to this many devices the model has all of them; beyond, the heaviest and the lightest."""
_FREE = 4
_STEPS = 5


@dataclass(frozen=True, slots=True)
class _Moved:
    """Who holds what in a layer after how many copies, and a number that no answer is below."""

    held: Bools
    copies: int
    bound: int


def min_move(problem: PlacementProblem, knobs: Knobs) -> Draft:
    """The fewest copies from the current placement after which every layer's balance (mean over
    heaviest device) is at least ``balance``; with a limit on copies, the highest balance in steps
    down to the present one that the limit allows. Raises InputError without a current placement."""
    if problem.current is None:
        raise InputError("policy min_move needs a current placement to count copies from")
    target = float(knobs["balance"])
    if not 0 < target <= 1:
        raise InputError(f"balance is {target}, expected more than 0 and at most 1")
    loads, capacity = mixed_loads(problem), capacity_of(problem)
    now = [padded(layer) for layer in problem.current]
    held = [held_by(layer, problem.experts) for layer in now]
    moved, reached = _within_limit(problem, loads, held, capacity, target, float(knobs["work"]))
    layers, certificates, uneven = [], [], []
    for number, (slots, move) in enumerate(zip(now, moved, strict=True)):
        layer, worst = _layer(loads[number], slots, move.held, capacity)
        layers.append(layer)
        certificates.append(certificate("copies", number, move.copies, move.bound))
        mean = loads[number].sum() / problem.devices
        if worst > mean / target * (1 + 1e-4):
            uneven.append(f"layer {number}: {mean / worst:.3f}")
    notes = [f"{sum(m.copies for m in moved)} copies"]
    if reached < target:
        notes.append(f"the limit of {problem.max_copies} copies allows a balance of {reached:.3f}")
    elif uneven:
        notes.append(f"balance {target} not reached: {', '.join(uneven)}")
    return Draft(tuple(layers), tuple(certificates), tuple(notes))


def _within_limit(
    problem: PlacementProblem,
    loads: Floats,
    held: list[Bools],
    capacity: Ints,
    target: float,
    work: float,
) -> tuple[list[_Moved], float]:
    moved = [_fewest(w, h, capacity, target, work) for w, h in zip(loads, held, strict=True)]
    most = problem.max_copies
    if most is None or sum(m.copies for m in moved) <= most:
        return moved, target
    low, high = min(_balance(w, h) for w, h in zip(loads, held, strict=True)), target
    stay = [_Moved(h, 0, 0) for h in held]
    best, reached = stay, low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        tried = [_fewest(w, h, capacity, middle, work) for w, h in zip(loads, held, strict=True)]
        if sum(m.copies for m in tried) <= most:
            best, reached, low = tried, middle, middle
        else:
            high = middle
    return best, reached


def _balance(loads: Floats, held: Bools) -> float:
    worst = split(loads, held).objective
    return float(loads.sum() / held.shape[1] / worst) if worst > 0 else 1.0


def _fewest(loads: Floats, now: Bools, capacity: Ints, target: float, work: float) -> _Moved:
    limit = float(loads.sum()) / len(capacity) / target
    bound = least(loads, now, limit)
    if not bound:
        return _Moved(now, 0, 0)
    quick = greedy_copies(loads, now, capacity, limit)
    copies = int((quick & ~now).sum())
    fits = split(loads, quick).objective <= limit * (1 + 1e-9)
    if (fits and copies == bound) or work <= 0:
        return _Moved(quick, copies, bound)
    solved = fewest_copies(loads, now, capacity, limit, work, _free(loads, now))
    bound = max(bound, int(solved.bound or 0))
    if solved.status != "infeasible" and (not fits or solved.objective < copies):
        return _Moved(solved.value, int(solved.objective), min(bound, int(solved.objective)))
    return _Moved(quick, copies, min(bound, copies))


def _free(loads: Floats, now: Bools) -> Bools | None:
    devices = now.shape[1]
    if devices <= _WHOLE:
        return None
    order = np.argsort(loads @ split(loads, now).value.shares, kind="stable")
    free = np.zeros(devices, bool)
    free[order[:_FREE]] = free[order[-_FREE:]] = True
    return free


def _layer(loads: Floats, now: Ints, held: Bools, capacity: Ints) -> tuple[LayerPlacement, float]:
    slots = keep_in_place(now, held, capacity)
    solved = split(loads, held_by(slots, len(loads)))
    return layer_of(slots, split_shares(slots, solved.value.shares), capacity), solved.objective
