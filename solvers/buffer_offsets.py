"""Offsets in one pool for buffers that live for a while (dynamic storage allocation).

    minimise    max_b offset_b + size_b
    subject to  offset_b a multiple of align_b, and no byte in two buffers alive at once

A buffer lives from ``start`` up to, not at, ``end``. With a ``period`` time is a circle: a step
that repeats, where what one round leaves the next one reads. The problem is NP-hard (Garey and
Johnson 1979, SR2). No peak is below the most bytes alive at one time, and greedy placement often
meets that bound: buffers in some order, each at the lowest offset or in the tightest gap that is
free of those placed before (best fit by size as in Pisarchyk and Lee 2020), and what made the peak
moved to the front of the order, a few times. What is left open, up to ``EXACT`` buffers, CP-SAT
takes up with the greedy answer as hint, one NoOverlap2D over time and bytes.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dovetail.solvers.solved import Solved

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Above this many buffers the greedy answer stands.
EXACT = 150
_ROUNDS = 60
_FAR = 2**62


@dataclass(frozen=True, slots=True)
class Buffer:
    """``size`` bytes, alive in [start, end), at an offset that is a multiple of ``align``."""

    name: str
    size: int
    start: int
    end: int
    align: int = 1


def solve(
    buffers: Sequence[Buffer],
    capacity: int | None = None,
    *,
    period: int | None = None,
    work: float = 2.0,
) -> Solved[Mapping[str, int]]:
    """Offsets by name whose peak, the objective, is the least; ``work`` in deterministic seconds.

    Infeasible, with no offsets, if it is proved that no peak is within ``capacity``; the bound then
    says how much is needed. Raises ValueError for malformed buffers, and RuntimeError if that work
    found neither offsets within ``capacity`` nor a proof that there are none.
    """
    begin = time.perf_counter()
    _refuse_malformed(buffers, period)
    pool = _Pool(buffers, period)
    least = pool.least_peak()
    offsets = pool.greedy(least)
    is_open = pool.peak(offsets) > least and not _below(capacity, least)
    if is_open and len(buffers) <= EXACT and work > 0:
        offsets, least = _exact(pool, offsets, least, work)
    peak = pool.peak(offsets)
    seconds = time.perf_counter() - begin
    if _below(capacity, least):
        return Solved({}, math.inf, float(least), "infeasible", seconds)
    if _below(capacity, peak):
        raise RuntimeError(
            f"buffers of a peak of {peak} bytes at best, {least} at least, in {capacity}: allow "
            "more work or more bytes"
        )
    named = {b.name: int(offset) for b, offset in zip(buffers, offsets, strict=True)}
    faults = check(buffers, named, capacity, period)
    assert not faults, faults
    status: Literal["optimal", "feasible"] = "optimal" if peak == least else "feasible"
    return Solved(named, float(peak), float(least), status, seconds)


def check(
    buffers: Sequence[Buffer],
    offsets: Mapping[str, int],
    capacity: int | None = None,
    period: int | None = None,
) -> list[str]:
    """What is wrong with ``offsets``, in words; empty when every rule is kept.

    Looks at the pool at each time at which a buffer comes alive: what overlaps at all overlaps
    when the later of the two comes.
    """
    known = {b.name for b in buffers}
    wrong = [f"{name} has no offset" for name in sorted(known - offsets.keys())]
    wrong += [f"{name} is no buffer" for name in sorted(offsets.keys() - known)]
    placed = [b for b in buffers if b.name in offsets]
    for b in placed:
        offset = offsets[b.name]
        if offset < 0 or offset % b.align:
            wrong.append(f"{b.name} is at {offset}, no multiple of {b.align} from 0 on")
        if capacity is not None and offset + b.size > capacity:
            wrong.append(f"{b.name} ends at {offset + b.size}, over the capacity of {capacity}")
    shared = {}
    for now in sorted({b.start for b in placed}):
        alive = [b for b in placed if _alive(b, now, period)]
        alive.sort(key=lambda b: offsets[b.name])
        top = alive[0]
        for b in alive[1:]:
            if offsets[b.name] < offsets[top.name] + top.size:
                shared[top.name, b.name] = f"{top.name} and {b.name} share bytes at time {now}"
            if offsets[b.name] + b.size > offsets[top.name] + top.size:
                top = b
    return wrong + list(shared.values())


def _alive(b: Buffer, now: int, period: int | None) -> bool:
    return b.start <= now < b.end if period is None else (now - b.start) % period < b.end - b.start


def _below(capacity: int | None, peak: int) -> bool:
    return capacity is not None and capacity < peak


def _refuse_malformed(buffers: Sequence[Buffer], period: int | None) -> None:
    if period is not None and period < 1:
        raise ValueError(f"period {period}: it must be at least 1, or None for time that ends")
    names = set()
    for b in buffers:
        if b.size < 1 or b.align < 1 or b.end <= b.start:
            raise ValueError(f"{b}: size and align must be at least 1, and end after start")
        if period is not None and b.end - b.start > period:
            raise ValueError(
                f"{b} outlives the period {period}: it would overwrite itself; give each of its "
                "copies as a buffer of its own"
            )
        if b.name in names:
            raise ValueError(f"two buffers are named {b.name}: names must differ")
        names.add(b.name)


class _Pool:
    """Buffers as arrays, and which of them are alive together."""

    def __init__(self, buffers: Sequence[Buffer], period: int | None) -> None:
        self.lives = [_lives(b, period) for b in buffers]
        self.size: Ints = np.array([b.size for b in buffers], dtype=np.int64)
        self.align: Ints = np.array([b.align for b in buffers], dtype=np.int64)
        self._length: Ints = np.array([b.end - b.start for b in buffers], dtype=np.int64)
        self._pieces = [self._piece(which) for which in range(2)]
        self._together: Bools = np.zeros((len(buffers), len(buffers)), dtype=bool)
        for start, end in self._pieces:
            for other_start, other_end in self._pieces:
                self._together |= (start[:, None] < other_end) & (other_start < end[:, None])

    def peak(self, offsets: Ints) -> int:
        """Bytes up to the highest end."""
        return int((offsets + self.size).max(initial=0))

    def least_peak(self) -> int:
        """Most bytes alive at one time, with what alignment adds below the topmost of them."""
        if not len(self.size):
            return 0
        step = math.gcd(*self.align.tolist())
        padded = -(-self.size // step) * step
        now = np.unique(np.concatenate([start for start, _ in self._pieces]))[:, None]
        alive = np.zeros((len(now), len(self.size)), dtype=bool)
        for start, end in self._pieces:
            alive |= (start <= now) & (now < end)
        top = np.where(alive, padded - self.size, 0).max(axis=1)
        return int((alive @ padded - top).max())

    def greedy(self, least: int) -> Ints:
        """The offsets of lowest peak over orders and ways to choose a gap; stops at ``least``."""
        keys = (self.size, self.size * self._length, self._length, -self._pieces[0][0])
        best, best_try = np.zeros(0, dtype=np.int64), None
        for key in keys:
            order = np.lexsort((-self.size, -key))
            for tightest in (False, True):
                offsets = self._place(order, tightest)
                if best_try is None or self.peak(offsets) < self.peak(best):
                    best, best_try = offsets, (order, tightest)
        return best if best_try is None else self._promote(best, *best_try, least)

    def _promote(self, best: Ints, order: Ints, tightest: bool, least: int) -> Ints:
        """Place again with what made the peak at the front, some times; the lowest of all."""
        offsets = best
        for _ in range(_ROUNDS):
            if self.peak(best) == least:
                break
            highest = (offsets + self.size == self.peak(offsets))[order]
            order = np.concatenate([order[highest], order[~highest]])
            offsets = self._place(order, tightest)
            best = min(best, offsets, key=self.peak)
        return best

    def _place(self, order: Ints, tightest: bool) -> Ints:
        """Each buffer in the lowest gap that it fits, or in the tightest."""
        offsets, placed = np.zeros(len(order), dtype=np.int64), np.zeros(len(order), dtype=bool)
        for b in order.tolist():
            near = np.flatnonzero(self._together[b] & placed)
            near = near[np.argsort(offsets[near], kind="stable")]
            ends = np.maximum.accumulate(offsets[near] + self.size[near])
            low = np.concatenate([[0], ends])
            low = -(-low // self.align[b]) * self.align[b]
            gap = np.concatenate([offsets[near], [_FAR]]) - low
            fits = np.flatnonzero(gap >= self.size[b])
            offsets[b] = low[fits[np.argmin(gap[fits])] if tightest else fits[0]]
            placed[b] = True
        return offsets

    def _piece(self, which: int) -> tuple[Ints, Ints]:
        """Starts and ends of each life's first or second piece; what has none never lives."""
        pieces = [life[which] if which < len(life) else (_FAR, -_FAR) for life in self.lives]
        pairs = np.array(pieces, dtype=np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]


def _lives(b: Buffer, period: int | None) -> list[tuple[int, int]]:
    """The times at which a buffer is alive; in two pieces if it lives past the period's end."""
    if period is None:
        return [(b.start, b.end)]
    start = b.start % period
    end = start + b.end - b.start
    return [(start, end)] if end <= period else [(start, period), (0, end - period)]


def _exact(pool: _Pool, hint: Ints, least: int, work: float) -> tuple[Ints, int]:
    """Offsets of a peak no higher than ``hint``'s and the bound, raised where CP-SAT could."""
    # Here, because checking offsets must not load a solver.
    from ortools.sat.python import cp_model

    unit = math.gcd(*pool.size.tolist(), *pool.align.tolist())
    size, align = (pool.size // unit).tolist(), (pool.align // unit).tolist()
    high = pool.peak(hint) // unit
    model = cp_model.CpModel()
    peak = model.new_int_var(-(-least // unit), high, "peak")
    slots, lives, spans = [], [], []
    for b, pieces in enumerate(pool.lives):
        slot = model.new_int_var(0, (high - size[b]) // align[b], f"slot_{b}")
        model.add(slot * align[b] + size[b] <= peak)
        model.add_hint(slot, int(hint[b]) // unit // align[b])
        span = model.new_fixed_size_interval_var(slot * align[b], size[b], f"bytes_{b}")
        for start, end in pieces:
            lives.append(model.new_fixed_size_interval_var(start, end - start, f"life_{b}_{start}"))
            spans.append(span)
        slots.append(slot)
    model.add_no_overlap_2d(lives, spans)
    model.minimize(peak)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = work
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return hint, least
    found = np.array([solver.value(slot) * a * unit for slot, a in zip(slots, align, strict=True)])
    return found, max(least, math.ceil(solver.best_objective_bound - 1e-6) * unit)
