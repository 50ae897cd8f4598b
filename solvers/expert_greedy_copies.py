"""Few copies of experts, fast: one copy or exchange at a time, the one that helps most.

    w[e] loads,  D the tight devices of the best shares (expert_split.py)

While D exceeds the limit, one of the heaviest experts that only D holds is copied to a light
device outside, over a replica that is not the last of its expert, or in exchange for an expert
that goes the other way. Shares are best after every step. No proof comes with it but ``least``.
"""

import numpy as np
import numpy.typing as npt

from dovetail.solvers.expert_split import split, tight_bound

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_EXPERTS = 4
_DEVICES = 4


def greedy_copies(
    loads: Floats, now: Bools, capacity: Ints, limit: float, most: int | None = None
) -> Bools:
    """Who holds what (``[expert, device]``) after at most ``most`` copies; the caller looks whether
    the limit is kept."""
    held = now.copy()
    solved = split(loads, held)
    while solved.objective > limit:
        steps = [
            (split(loads, after).objective, int((after & ~now).sum()), i, after)
            for i, after in enumerate(_steps(loads, held, capacity, solved.value.shares, limit))
        ]
        allowed = [s for s in steps if most is None or s[1] <= most]
        if not allowed or min(allowed)[0] >= solved.objective * (1 - 1e-9):
            return held
        held = min(allowed, key=lambda s: s[:3])[3]
        solved = split(loads, held)
    return held


def least(loads: Floats, now: Bools, limit: float) -> int:
    """A number of copies that any answer needs: tight devices must give away what exceeds the
    limit, and a copy takes away one expert at most."""
    solved = split(loads, now)
    tight = solved.value.tight
    if not tight or solved.objective <= limit * (1 + 1e-9):
        return 0
    excess = (tight_bound(loads, now, tight) - limit) * len(tight)
    outside = [g for g in range(now.shape[1]) if g not in tight]
    own = np.sort(loads[~now[:, outside].any(1)])[::-1].cumsum()
    return int(np.searchsorted(own, excess * (1 - 1e-9))) + 1


def _steps(loads: Floats, held: Bools, capacity: Ints, shares: Floats, limit: float) -> list[Bools]:
    served = loads[:, None] * shares
    load = served.sum(0)
    over = load > limit
    if over.all():
        return []
    heaviest = int(load.argmax())
    mine = np.flatnonzero(held[:, heaviest] & ~held[:, ~over].any(1))
    mine = mine[np.argsort(-loads[mine], kind="stable")]
    light = np.argsort(load, kind="stable")[:_DEVICES]
    light = light[~over[light]]
    found = []
    for expert in _spread(mine, _EXPERTS):
        for device in light:
            found += _copies_to(held, served, capacity, int(expert), heaviest, int(device))
    return found


def _spread(items: Ints, count: int) -> Ints:
    """The first and some of the rest, evenly."""
    if len(items) <= count:
        return items
    return np.asarray(items[np.linspace(0, len(items) - 1, count).astype(int)])


def _copies_to(
    held: Bools, served: Floats, capacity: Ints, expert: int, source: int, device: int
) -> list[Bools]:
    found = []
    after = held.copy()
    after[expert, device] = True
    if after[:, device].sum() <= capacity[device]:
        return [after]
    replicated = np.flatnonzero(held[:, device] & (held.sum(1) > 1))
    if len(replicated):
        copied = after.copy()
        copied[replicated[served[replicated, device].argmin()], device] = False
        found.append(copied)
    single = np.flatnonzero(held[:, device] & (held.sum(1) == 1))
    if len(single):
        lightest = single[served[single, device].argmin()]
        swapped = after.copy()
        swapped[expert, source] = swapped[lightest, device] = False
        swapped[lightest, source] = True
        found.append(swapped)
    return found
