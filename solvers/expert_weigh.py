"""Which device holds which expert, for weighted shares and few slots to spare: random steps, each
judged by the best shares there are (expert_split.py).

    minimise  max_g load[g], then sum_g load[g]**2     load: under the best shares

The second term leads over plateaus of the first: it falls while some devices are still too heavy.
"""

import numpy as np
import numpy.typing as npt

from dovetail.solvers.expert_split import split

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_SWAPS = 0.6
_SAME = 1e-9


def improve(
    loads: Floats, held: Bools, capacity: Ints, steps: int, enough: float, seed: int = 0
) -> Bools:
    """Who holds what (``[expert, device]``) after at most ``steps`` swaps and replacements of
    single experts, never worse than ``held``; stops at a heaviest device of ``enough``."""
    rng = np.random.default_rng(seed)
    slots = [
        [*np.flatnonzero(column).tolist(), *[None] * (int(room) - int(column.sum()))]
        for column, room in zip(held.T, capacity, strict=True)
    ]
    best, value = held, _judge(loads, held)
    for _ in range(steps):
        if value[0] <= enough * (1 + _SAME) or len(capacity) < 2:
            break
        g, h = rng.choice(len(capacity), 2, replace=False)
        k, q = rng.integers(capacity[g]), rng.integers(capacity[h])
        old = slots[g][k], slots[h][q]
        swap = rng.random() < _SWAPS
        slots[g][k], slots[h][q] = old[1], old[0] if swap else old[1]
        found = _held(slots, len(loads))
        if found.any(1).all() and not _worse(now := _judge(loads, found), value):
            best, value = found, now
        else:
            slots[g][k], slots[h][q] = old
    return best


def _held(slots: list[list[int | None]], experts: int) -> Bools:
    held = np.zeros((experts, len(slots)), bool)
    for device, row in enumerate(slots):
        held[[e for e in row if e is not None], device] = True
    return held


def _judge(loads: Floats, held: Bools) -> tuple[float, float]:
    load = loads @ split(loads, held).value.shares
    return float(load.max()), float((load**2).sum())


def _worse(new: tuple[float, float], old: tuple[float, float]) -> bool:
    if abs(new[0] - old[0]) > _SAME * old[0]:
        return new[0] > old[0]
    return new[1] > old[1] * (1 + _SAME)
