"""The plan: what `dovetail` decided, why, and what it expects. JSON, and nothing in it is run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dovetail.ir import codec
from dovetail.ir.kernel_layer import KernelLadder, KernelReference
from dovetail.ir.machine import Machine
from dovetail.ir.moves import Move
from dovetail.ir.record_file import fields, load_record, write_whole
from dovetail.ir.workload import Workload

VERSION = 1


@dataclass(frozen=True, slots=True)
class Bound:
    """A time that no schedule can beat on this machine model, and the resource that sets it."""

    seconds: float
    resource: str
    parts: Mapping[str, float]
    """Seconds that each resource alone would need."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the cost model expects of a schedule over the whole workload. ``bytes`` is the peak of
    the ram tier by what it holds; ``classes`` the busy seconds by task class over all engines."""

    seconds: float
    setup_seconds: float
    steps: int
    tokens: int
    disk_bytes: int
    bytes: Mapping[str, int]
    classes: Mapping[str, float]
    tiers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Peak bytes of the other tiers (hbm), by what they hold."""
    link_bytes: Mapping[str, int] = field(default_factory=dict)
    """Bytes that every link (h2d, d2h) moves over the whole workload."""

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of the ram tier."""
        return sum(self.bytes.values())

    @property
    def peaks(self) -> dict[str, int]:
        """Predicted peak of every tier that the budget limits."""
        others = {name: sum(parts.values()) for name, parts in self.tiers.items()}
        return {"ram": self.peak_bytes} | others

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, set-up included."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a solver proved: the ``objective`` that was reached and a ``bound`` that none beats;
    ``work`` is the deterministic work that it took, about seconds of one core (0: not counted)."""

    name: str
    objective: float
    bound: float
    status: Literal["optimal", "feasible"]
    work: float = field(default=0.0, metadata=codec.LATER)
    unit: Literal["", "bytes"] = field(default="", metadata=codec.LATER)
    """What objective and bound count; seconds where nothing is said."""

    @property
    def gap(self) -> float:
        """The share of the objective that may still be saved."""
        return 1 - self.bound / self.objective if self.objective else 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule that was considered: its policy and knobs, and what it was expected to take.
    ``refused`` says why it could not be used at all."""

    policy: str
    knobs: Mapping[str, int | bool]
    seconds: float | None
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What `dovetail tune` found of a plan. ``outcome`` is ``tuned`` where the schedule beat the
    untuned one, ``untuned`` where none did and the plan is the untuned one, ``simulated`` where
    nothing was run. ``ratio`` is its time over the untuned plan's, the typical one of ``pairs``
    runs of ``sample`` in turn, between ``low`` and ``high`` with the confidence that
    ``tuning_db.winners`` asks for."""

    outcome: Literal["tuned", "untuned", "simulated"]
    reason: str
    untuned: str
    """Digest of the untuned plan's moves."""
    sample: Workload
    sampler: str
    seed: int
    trials: int
    seconds: float
    environment: Mapping[str, str]
    ratio: float = 1.0
    low: float = 1.0
    high: float = 1.0
    pairs: int = 0
    untuned_seconds: float = 0.0
    max_error: float | None = None
    """Largest error of its outputs against the untuned plan's, as a share of their size."""
    load_skew: float = 0.0
    """Tokens of the busiest expert over the mean, in the layer where it is largest; 0: unknown."""


@dataclass(frozen=True, slots=True)
class Plan:
    """An exported plan. ``graph`` is the digest of the task graph that the moves apply to and
    ``checkpoint`` that of the weights' layout (empty when planned from a config alone)."""

    version: int
    model: Mapping[str, str | int]
    graph: str
    checkpoint: str
    machine: Machine
    budget: Mapping[str, int]
    workload: Workload
    policy: str
    knobs: Mapping[str, int | bool]
    moves: tuple[Move, ...]
    prediction: Prediction
    bound: Bound
    candidates: tuple[Candidate, ...]
    certificates: tuple[Certificate, ...] = ()
    offsets: Mapping[str, int] = field(default_factory=dict, metadata=codec.LATER)
    """Bytes from the start of its tier's buffers at which each buffer of a GPU plan lies, by tier,
    kind, number and layer of the steady state."""
    tuning: Evidence | None = field(default=None, metadata=codec.LATER)
    kernels: tuple[KernelReference, ...] = field(default=(), metadata=codec.LATER)
    """GPU kernels that the plan's executor runs, with their sources beside the plan."""
    ladders: tuple[KernelLadder, ...] = field(default=(), metadata=codec.LATER)
    """Which of the kernels run which experts, for how many tokens."""
    no_kernels: str = field(default="", metadata=codec.LATER)
    """Why experts of a GPU plan have no kernels: they run as torch's products."""

    def digest(self) -> str:
        """Hex sha256 over all fields: same inputs, same plan, same digest."""
        return codec.digest(self)


def save_plan(plan: Plan, path: Path) -> None:
    """Write the plan; a crash leaves either the old file or the new one."""
    write_whole(json.dumps(fields(plan), indent=1) + "\n", path)


def load_plan(path: Path) -> Plan:
    """Read a plan; raises PlanError on a file that is missing, malformed or altered."""
    return load_record(path, Plan, VERSION, "plan", "dovetail plan make")
