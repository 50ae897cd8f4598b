"""Tier placement: the problem, what a placement says, and its independent checker."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Block = tuple[int, ...]
"""Items, as indices, that share a tier."""


@dataclass(frozen=True, slots=True)
class Item:
    """What lies in exactly one tier: a tensor, an expert.

    ``size`` is in bytes; ``value`` is, per scenario, the expected uses in one step.
    """

    name: str
    size: int
    value: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TierProblem:
    """Items, and tiers from the cheapest to the dearest.

    ``capacities`` are in bytes, the last may be None (unlimited); ``costs`` are the seconds a byte
    takes from a tier to where it is used, never falling; a group is a set of indices of items that
    share a tier.
    """

    items: tuple[Item, ...]
    capacities: tuple[int | None, ...]
    costs: tuple[float, ...]
    groups: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the items are and what proves it.

    ``tiers`` is the tier of each item (None: there is no placement), ``why`` the proof in words or
    the capacity that binds, ``shares`` the p of the scenarios under which ``divided_bound`` is
    highest, and ``prices`` what one more byte of each tier saves by that bound, in seconds.
    """

    tiers: tuple[int, ...] | None
    why: str
    shares: tuple[float, ...] = ()
    prices: tuple[float, ...] = ()


def step_seconds(problem: TierProblem, tiers: Sequence[int]) -> tuple[float, ...]:
    """Seconds in which each scenario's step brings its items: Σ value · size · cost."""
    weight = np.array([[v * item.size for v in item.value] for item in problem.items])
    cost = np.array([problem.costs[tier] for tier in tiers])
    return tuple(math.fsum(column) for column in (weight * cost[:, None]).T)


def check(problem: TierProblem, tiers: Sequence[int]) -> list[str]:
    """What is wrong with a placement, in words; empty when every rule is kept."""
    if len(tiers) != len(problem.items):
        return [f"{len(tiers)} tiers for {len(problem.items)} items: give one for each"]
    used = [0] * len(problem.capacities)
    wrong = []
    for item, tier in zip(problem.items, tiers, strict=True):
        if not 0 <= tier < len(used):
            wrong.append(f"{item.name} is in tier {tier}, and the tiers are 0 to {len(used) - 1}")
        else:
            used[tier] += item.size
    for k, (held, capacity) in enumerate(zip(used, problem.capacities, strict=True)):
        if capacity is not None and held > capacity:
            wrong.append(f"tier {k} holds {held} bytes, {held - capacity} over its {capacity}")
    for group in problem.groups:
        where = {tiers[i] for i in group}
        if len(where) > 1:
            names = ", ".join(problem.items[i].name for i in group)
            wrong.append(f"the group {names} is divided among tiers {sorted(where)}")
    return wrong


def refuse_malformed(problem: TierProblem) -> None:
    items, capacities, costs = problem.items, problem.capacities, problem.costs
    if not capacities or len(capacities) != len(costs):
        raise ValueError(f"{len(capacities)} capacities and {len(costs)} costs: one each per tier")
    if None in capacities[:-1] or any(c is not None and c < 0 for c in capacities):
        raise ValueError(f"capacities {capacities}: only the last may be None, none negative")
    if not all(math.isfinite(c) and c >= 0 for c in costs) or list(costs) != sorted(costs):
        raise ValueError(f"costs {costs}: they must be finite, not negative and never falling")
    for item in items:
        if item.size < 1 or not item.value or len(item.value) != len(items[0].value):
            raise ValueError(f"{item}: size must be at least 1, and one value given per scenario")
        if not all(math.isfinite(v) and v >= 0 for v in item.value):
            raise ValueError(f"{item}: values must be finite and not negative")
    for group in problem.groups:
        if not all(0 <= i < len(items) for i in group):
            raise ValueError(f"group {group}: members must be indices from 0 to {len(items) - 1}")
