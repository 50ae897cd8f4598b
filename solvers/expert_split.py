"""Who serves which share of an expert's tokens, for replicas that are where they are: exact.

    minimise  max_g  sum_e f[e,g]      with  sum_g f[e,g] = w[e],  f[e,g] > 0 only where e is held

By Hall's condition the optimum is the largest of (load of experts held only inside D) / |D| over
sets D of devices, and the set that attains it is the proof. It is found with maximum flows
(Newton's method on the ratio; the cuts are nested: Gallo, Grigoriadis, Tarjan, 1989). What lies
outside D is then solved the same way, so that loads are even lexicographically.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ortools.graph.python import max_flow

from dovetail.solvers.solved import Solved

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_UNITS = 1 << 40


@dataclass(frozen=True, slots=True)
class Split:
    """``shares[expert, device]``, rows summing to 1, and the ``tight`` devices: experts that only
    they hold keep them at the objective, whatever the shares."""

    shares: Floats
    tight: tuple[int, ...]


def split(loads: Floats, held: Bools) -> Solved[Split]:
    """The most even shares for ``loads[expert]`` where ``held[expert, device]``.

    Always optimal, up to loads rounded to 2**-40 of their sum. Raises ValueError where no device
    holds an expert.
    """
    begin = time.perf_counter()
    if not held.any(1).all():
        raise ValueError(f"no device holds expert {int(np.flatnonzero(~held.any(1))[0])}")
    shares = held / held.sum(1, keepdims=True)
    units = _integers(loads)
    experts, devices = np.flatnonzero(units), np.arange(held.shape[1])
    tight: tuple[int, ...] = ()
    while len(experts):
        part, inside = _tightest(units, held, experts, devices)
        shares[part] = _shares_inside(units, held, part, inside)
        tight = tight or tuple(int(d) for d in inside)
        experts, devices = np.setdiff1d(experts, part), np.setdiff1d(devices, inside)
    worst = float((loads @ shares).max())
    bound = tight_bound(loads, held, tight) if tight else 0.0
    return Solved(Split(shares, tight), worst, bound, "optimal", time.perf_counter() - begin)


def tight_bound(loads: Floats, held: Bools, tight: tuple[int, ...]) -> float:
    """Mean load of ``tight`` devices by the experts that no other device holds: no shares can
    make all of them lighter."""
    outside = np.ones(held.shape[1], bool)
    outside[list(tight)] = False
    return float(loads[~held[:, outside].any(1)].sum() / len(tight))


def check(loads: Floats, held: Bools, solved: Solved[Split]) -> list[str]:
    """What is wrong with an answer of ``split``; empty if it is optimal."""
    shares, problems = solved.value.shares, []
    if (shares < -1e-12).any() or (np.abs(shares.sum(1) - 1) > 1e-9).any():
        problems.append("shares of an expert are negative or do not sum to 1")
    if (shares[~held] != 0).any():
        problems.append("a device serves an expert that it does not hold")
    worst, scale = float((loads @ shares).max()), float(loads.sum()) or 1.0
    if abs(worst - solved.objective) > 1e-9 * scale:
        problems.append(f"the heaviest device has {worst}, not {solved.objective}")
    proved = tight_bound(loads, held, solved.value.tight) if solved.value.tight else 0.0
    if worst - proved > 1e-9 * scale:
        problems.append(f"the tight devices prove only {proved} of {worst}")
    return problems


def _integers(loads: Floats) -> Ints:
    total = float(loads.sum())
    return (
        np.rint(loads / total * _UNITS).astype(np.int64)
        if total > 0
        else np.zeros(len(loads), np.int64)
    )


def _tightest(units: Ints, held: Bools, experts: Ints, devices: Ints) -> tuple[Ints, Ints]:
    """Experts and devices of the largest ratio of load to devices."""
    while True:
        devices = devices[held[np.ix_(experts, devices)].any(0)]
        flow, _ = _flow(units, held, experts, devices)
        wanted = int(units[experts].sum()) * len(devices)
        if flow.optimal_flow() == wanted:
            return experts, devices
        cut = set(flow.get_source_side_min_cut())
        experts = experts[[i + 1 in cut for i in range(len(experts))]]


def _flow(
    units: Ints, held: Bools, experts: Ints, devices: Ints
) -> tuple[max_flow.SimpleMaxFlow, Ints]:
    """Source 0, experts, devices, sink; every device may carry the mean. Capacities are times the
    number of devices, so that the mean is an integer."""
    n, m = len(experts), len(devices)
    e, d = np.nonzero(held[np.ix_(experts, devices)])
    supply = units[experts] * m
    total = int(units[experts].sum())
    tail = np.concatenate([np.zeros(n, np.int64), e + 1, np.arange(m) + n + 1])
    head = np.concatenate([np.arange(n) + 1, d + n + 1, np.full(m, n + m + 1)])
    room = np.concatenate([supply, supply[e], np.full(m, total)])
    flow = max_flow.SimpleMaxFlow()
    arcs = flow.add_arcs_with_capacity(tail, head, room)
    status = flow.solve(0, n + m + 1)
    assert status == flow.OPTIMAL, status
    return flow, np.asarray(arcs[n : n + len(e)])


def _shares_inside(units: Ints, held: Bools, experts: Ints, devices: Ints) -> Floats:
    flow, arcs = _flow(units, held, experts, devices)
    e, d = np.nonzero(held[np.ix_(experts, devices)])
    shares = np.zeros((len(experts), held.shape[1]))
    shares[e, devices[d]] = flow.flows(arcs) / (units[experts][e] * len(devices))
    return shares
