"""What expert placement policies share: a problem as arrays, and slots as an answer's layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dovetail.ir.expert_placement import (
    LayerPlacement,
    Objective,
    PlacementCertificate,
    PlacementProblem,
)
from dovetail.ir.expert_slots import Slots

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
OPEN = -1
_PROVED = 1e-6


Knobs = Mapping[str, bool | int | float | str]


@dataclass(frozen=True, slots=True)
class Draft:
    """A policy's answer before it is an ExpertPlacement."""

    layers: tuple[LayerPlacement, ...]
    certificates: tuple[PlacementCertificate, ...]
    notes: tuple[str, ...] = ()
    group_devices: tuple[int, ...] = ()


def scenario_loads(problem: PlacementProblem) -> Floats:
    """Loads as an array ``[scenario, layer, expert]``."""
    return np.array(problem.loads, float)


def mixed_loads(problem: PlacementProblem) -> Floats:
    """One load for all scenarios, ``[layer, expert]``: their mean, each with the same weight, in
    units of the mean scenario's total."""
    loads = scenario_loads(problem)
    if len(loads) == 1:
        return np.asarray(loads[0])
    totals = loads.sum(2, keepdims=True)
    return np.asarray((loads / np.maximum(totals, 1e-300)).mean(0) * totals.mean(0))


def capacity_of(problem: PlacementProblem) -> Ints:
    """Slots of every device."""
    return np.array(problem.slots, np.int64)


def node_of(problem: PlacementProblem) -> Ints:
    """The node of every device."""
    return np.arange(problem.devices) // (problem.devices // problem.nodes)


def certificate(
    objective: Objective, layer: int | None, value: float, bound: float
) -> PlacementCertificate:
    """A certificate that is ``optimal`` where the value is at its bound, up to a millionth."""
    low = min(value, bound)
    proved = value - low <= _PROVED * abs(value)
    status: Literal["optimal", "feasible"] = "optimal" if proved else "feasible"
    return PlacementCertificate(objective, layer, float(value), float(low), status)


def fill_open(experts: Ints, worth: Floats, capacity: Ints) -> Ints:
    """``experts[device, slot]`` with OPEN slots given to experts of the most ``worth[expert]``
    per replica that the device does not hold: spares, which serve nothing yet."""
    slots, each = experts.copy(), worth.astype(float).copy()
    exists = np.arange(slots.shape[1]) < capacity[:, None]
    for device, slot in np.argwhere((slots == OPEN) & exists):
        rank = each.copy()
        rank[slots[device][slots[device] >= 0]] = -1.0
        chosen = int(rank.argmax())
        slots[device, slot] = chosen
        each[chosen] /= 2
    return slots


def layer_of(experts: Ints, shares: Floats, capacity: Ints) -> LayerPlacement:
    """Arrays ``[device, slot]``, padded to the largest device, as a layer."""
    return LayerPlacement(
        tuple(tuple(row[:n]) for row, n in zip(experts.tolist(), capacity.tolist(), strict=True)),
        tuple(tuple(row[:n]) for row, n in zip(shares.tolist(), capacity.tolist(), strict=True)),
    )


def shares_by_amount(experts: Ints, amount: Floats, loads: Floats) -> Floats:
    """Shares ``[..., device, slot]`` from the tokens that every slot serves; experts without load
    are served by their first slot."""
    layers = len(loads)
    row = np.arange(layers)[:, None]
    flat, part = experts.reshape(layers, -1), amount.reshape(layers, -1)
    held = np.where(flat == OPEN, 0, flat)
    total = np.zeros_like(loads)
    np.add.at(total, (row, held), part)
    share = part / np.maximum(total[row, held], 1e-300)
    for layer, expert in np.argwhere(total <= 0):
        share[layer, np.flatnonzero(flat[layer] == expert)[0]] = 1.0
    return share.reshape(amount.shape)


def even_shares(experts: Ints, count: int) -> Floats:
    """The same share for every slot of an expert (``[device, slot]``, OPEN slots get 0)."""
    replicas = np.bincount(experts[experts >= 0], minlength=count)
    return np.asarray(np.where(experts >= 0, 1.0 / np.maximum(replicas[experts], 1), 0.0))


def held_by(experts: Ints, count: int) -> Bools:
    """``[expert, device]``: who holds what, of ``experts[device, slot]``."""
    held = np.zeros((count, len(experts)), bool)
    device, slot = np.nonzero(experts >= 0)
    held[experts[device, slot], device] = True
    return held


def split_shares(experts: Ints, by_device: Floats) -> Floats:
    """Shares ``[device, slot]`` of shares ``[expert, device]``; of two slots of an expert on one
    device the first serves."""
    shares = np.zeros(experts.shape)
    for device, row in enumerate(experts):
        found, first = np.unique(row, return_index=True)
        real = found >= 0
        shares[device, first[real]] = by_device[found[real], device]
    return shares


def padded(slots: Slots) -> Ints:
    """Slots of one layer as an array ``[device, slot]``, padded with OPEN."""
    width = max(len(row) for row in slots)
    return np.array([list(row) + [OPEN] * (width - len(row)) for row in slots], np.int64)


def keep_in_place(now: Ints, held: Bools, capacity: Ints) -> Ints:
    """Slots that hold ``held[expert, device]``, where what stays keeps its slot and what is no
    longer needed stays as a spare while there is room."""
    slots = now.copy()
    for device, wanted in enumerate(held.T):
        new = [e for e in np.flatnonzero(wanted) if e not in now[device]]
        row = slots[device, : capacity[device]]
        seen: set[int] = set()
        droppable = []
        for slot, expert in enumerate(row.tolist()):
            if expert == OPEN or not wanted[expert] or expert in seen:
                droppable.append(slot)
            seen.add(expert)
        for expert, slot in zip(new, droppable, strict=False):
            slots[device, slot] = expert
    return slots
