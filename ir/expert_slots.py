"""Slots of experts as plain data: what they must satisfy, and what is counted on them."""

import math
from collections.abc import Sequence

from dovetail.ir.errors import InputError

Matrix = tuple[tuple[float, ...], ...]
Slots = tuple[tuple[int, ...], ...]
"""The expert in every slot of every device, for one layer."""


def count_copies(before: Slots, after: Slots) -> int:
    """Expert weights that must be copied to go from one layer's placement to another: what a
    device holds after and did not hold before (slots within a device are renamed for nothing)."""
    return sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))


def balance(loads: Sequence[float]) -> float:
    """Mean over max of the devices' loads: 1 is even, 1/devices is all on one (1 if no load)."""
    return math.fsum(loads) / len(loads) / max(loads) if max(loads) > 0 else 1.0


def slots_that_fit(memory: int, expert_bytes: int, layers: int) -> int:
    """Slots per layer that a device of ``memory`` bytes holds for every one of ``layers``."""
    return memory // (expert_bytes * layers)


def contiguous(experts: int, slots: Sequence[int]) -> Slots:
    """The placement without a plan: experts in order, and again from the first in what is left."""
    numbers = iter(range(sum(slots)))
    return tuple(tuple(next(numbers) % experts for _ in range(count)) for count in slots)


def require(fine: bool, message: str) -> None:
    """Raise InputError with ``message`` unless ``fine``."""
    if not fine:
        raise InputError(message)


def check_counts(matrix: Matrix, rows: int, columns: int, what: str) -> None:
    """Refuse a matrix of another shape, or with an entry that is not a finite count >= 0."""
    found = sorted({len(row) for row in matrix})
    require(
        len(matrix) == rows and found == [columns],
        f"{what}: found {len(matrix)} rows of {found} numbers, expected {rows} of {columns}",
    )
    for number, row in enumerate(matrix):
        total = sum(row)
        if math.isfinite(total) and min(row) >= 0:
            continue
        bad = [i for i, x in enumerate(row) if not (math.isfinite(x) and x >= 0)]
        found_there = f"column {bad[0]} is {row[bad[0]]}" if bad else f"the sum is {total}"
        raise InputError(f"{what}: row {number}, {found_there}, expected finite counts >= 0")


def check_slots(layer: Slots, experts: int, where: str) -> None:
    """Refuse slots that hold a strange expert, or leave one without a device."""
    held = {e for row in layer for e in row}
    strange = sorted(e for e in held if not 0 <= e < experts)
    require(not strange, f"{where}: expert {strange[:1]} is not one of {experts} experts")
    missing = sorted(set(range(experts)) - held)
    require(not missing, f"{where}: no device holds expert {missing[:1]}")


def check_shares(layer: Slots, shares: Matrix, experts: int, where: str) -> None:
    """Refuse shares that are not one per slot, in [0, 1], and 1 in sum for every expert."""
    shape, found = [len(row) for row in layer], [len(row) for row in shares]
    require(shape == found, f"{where}: shares have shape {found}, slots have {shape}")
    sums = [0.0] * experts
    for row, parts in zip(layer, shares, strict=True):
        for expert, share in zip(row, parts, strict=True):
            require(
                0 <= share <= 1 + 1e-9,
                f"{where}: share {share} of expert {expert}, expected 0 to 1",
            )
            sums[expert] += share
    for expert, total in enumerate(sums):
        require(
            abs(total - 1) <= 1e-6, f"{where}: shares of expert {expert} sum to {total}, expected 1"
        )
