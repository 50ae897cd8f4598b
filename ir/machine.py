"""The machine: memory tiers with capacities, engines with measured rate curves."""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dovetail.ir.codec import LATER

LARGE_BLOCK = 32 << 20
"""Temporaries of at least this many bytes are given by the system each time, and go back to it."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate measured at some sizes; linear in log2(size) between them, flat outside."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.y):
            raise ValueError(f"a curve needs as many x as y, found {len(self.x)} and {len(self.y)}")
        if any(a >= b for a, b in zip(self.x, self.x[1:], strict=False)) or min(self.x) <= 0:
            raise ValueError(f"x of a curve must be positive and rising, found {self.x}")
        if not all(math.isfinite(v) and v > 0 for v in self.y):
            raise ValueError(f"rates of a curve must be positive and finite, found {self.y}")

    def at(self, size: float) -> float:
        """The rate at ``size``."""
        if size <= self.x[0]:
            return self.y[0]
        if size >= self.x[-1]:
            return self.y[-1]
        i = bisect.bisect_right(self.x, size)
        x0, x1, y0, y1 = self.x[i - 1], self.x[i], self.y[i - 1], self.y[i]
        share = math.log2(size / x0) / math.log2(x1 / x0)
        return y0 + (y1 - y0) * share

    @property
    def peak(self) -> float:
        """The best rate of the curve."""
        return max(self.y)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """GPUs of one kind as the cost model sees each of them. Rates are per second, sizes in bytes.

    ``gemm[dtype]`` is FLOP/s of ``rows x K @ K x N`` with large K and N, by rows, as if weights
    cost nothing to read; ``attention[dtype]`` is FLOP/s of prefill attention by query length.
    ``hbm_bandwidth`` is what reading weights and KV reaches; ``op_seconds`` the launch of a kernel.
    ``h2d`` and ``d2h`` are bytes/s between pinned host memory and one GPU by block;
    ``peer_bandwidth`` is bytes/s between two GPUs, one way (0: no link). The
    tier ``hbm`` holds one GPU's memory. ``arch`` is what compilers call the GPU's architecture
    (``sm_90``, ``gfx942``), "" where it is not said, ``processors`` its multiprocessors (0: as many
    as the usual part of the architecture has).
    """

    name: str
    count: int
    gemm: Mapping[str, Curve]
    attention: Mapping[str, Curve]
    hbm_bandwidth: float
    op_seconds: float
    h2d: Curve
    d2h: Curve
    peer_bandwidth: float = 0.0
    arch: str = field(default="", metadata=LATER)
    processors: int = field(default=0, metadata=LATER)


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as the cost model sees it. All rates are per second, all sizes in bytes.

    ``gemm[dtype]`` is the FLOP/s of one compute worker (one thread) of ``rows x K @ K x N`` with
    weights that are not in cache, by rows; ``int8`` and ``int4`` are those of 16-bit rows with
    experts in fewer bits. ``attention[dtype]`` is the FLOP/s of one worker in
    causal self-attention, by query length. ``kv_bandwidth[dtype]`` is the bytes/s at which one
    worker reads the KV store in decode attention, by KV bytes of one sequence and layer.
    ``memory_bandwidth`` is one worker's streaming copy (bytes read plus written). ``op_seconds`` is
    the fixed cost of one framework operator. ``disk`` is bytes/s by read block. ``slowdown`` maps
    ``"a|b"`` to the factor (0 to 1) that engine a's rate keeps while b runs: ``cpu|cpu`` with every
    worker busy, ``cpu|disk`` and ``disk|cpu``, ``cpu|cpu+disk``; ``op|op`` is for the fixed cost of
    operators when every worker runs them.
    """

    name: str
    tiers: Mapping[str, int]
    workers: int
    gemm: Mapping[str, Curve]
    attention: Mapping[str, Curve]
    kv_bandwidth: Mapping[str, Curve]
    memory_bandwidth: float
    op_seconds: float
    disk: Curve
    slowdown: Mapping[str, float]
    fresh_bandwidth: float = 0.0
    """Bytes/s at which one thread touches memory that the system has yet to give; 0: not known."""
    accelerator: Accelerator | None = None
    """GPUs beside the processor, if there are any; then ``tiers`` has ``hbm``."""
    process_bytes: int = 0
    """Memory that a run takes beside its pools: allocator slack, library code, Python objects."""
    silicon: Mapping[str, str] = field(default_factory=dict)
    """What the machine is (processor, cores, memory), for people and for staleness checks."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where a figure comes from, where it was not measured by ``dovetail calibrate``."""
    corrections: Mapping[str, float] = field(default_factory=dict, metadata=LATER)
    """By how much the measured seconds of a class of work exceed those of the curves, 1 or more, as
    `dovetail tune` found: ``run:experts``, ``run:groups``, ``run:seqs``, ``load:RING``, and
    ``step`` for what is left of a step when these are corrected."""

    def corrected(self, work: str) -> float:
        """The factor by which this class of work takes longer than the curves say."""
        return self.corrections.get(work, 1.0)

    def keeps(self, engine: str, other: str) -> float:
        """The share of its rate that ``engine`` keeps while ``other`` runs."""
        return self.slowdown.get(f"{engine}|{other}", 1.0)
