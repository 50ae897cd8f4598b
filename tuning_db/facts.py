"""The records of tuning: what is tuned, for what, how it is timed, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dovetail.ir import codec
from dovetail.ir.workload import Workload

State = Literal[
    "ok", "invalid", "compile_error", "timeout", "out_of_memory", "wrong_result", "throttled"
]
Stop = Literal["budget", "converged", "space", "interrupted", "failed"]
Parameters = Mapping[str, Any]
"""All that the code of a trial takes beside its task's signature, as JSON data."""
Knobs = Mapping[str, int | bool | str]
"""The point of the search space that gave the parameters."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is tuned: ``op`` is ``schedule``, or ``kernel`` for those of a layer's experts,
    ``signature`` all that its code depends on beside a trial's parameters."""

    op: str
    signature: Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a trial is timed. ``mode`` is ``whole`` (the workload from its first step to its last),
    ``simulated`` (the cost model's seconds), ``graphs`` (replays of kernels on a GPU) or
    ``interpreted`` (kernels tried with no GPU; seconds mean nothing); ``sample`` the workload that
    is run, often a part of the one that is tuned for; ``default`` names what candidates are
    compared with (the digest of its moves, or of its kernels); ``paired`` says that it runs beside
    every sample."""

    mode: Literal["whole", "simulated", "graphs", "interpreted"]
    sample: Workload
    default: str = ""
    paired: bool = True
    version: int = 1


@dataclass(frozen=True, slots=True)
class Key:
    """What trials must share to be compared. ``source`` says where the workload comes from."""

    task: Task
    workload: Workload
    protocol: Protocol
    silicon: Mapping[str, str]
    software: Mapping[str, str]
    source: str = ""


@dataclass(frozen=True, slots=True)
class Tuning:
    """One call of the tuner. ``stop`` is empty for one that was killed or is still at work;
    ``uid`` and ``created_at`` (ISO 8601, UTC) are the database's."""

    silicon: Mapping[str, str]
    software: Mapping[str, str]
    argv: str
    sampler: str
    seed: int
    budget_seconds: float
    spent_seconds: float = 0.0
    stop: Stop | Literal[""] = ""
    uid: str = ""
    created_at: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate and its samples, in seconds; sample i and default sample i were run in turn.

    ``max_error`` is the largest relative error of its outputs against the default's. ``number``
    counts the trials of one tuning; ``uid`` and ``created_at`` are the database's.
    """

    number: int
    parameters: Parameters
    knobs: Knobs
    state: State
    samples: tuple[float, ...] = ()
    default_samples: tuple[float, ...] = ()
    predicted_seconds: float | None = None
    max_error: float | None = None
    note: str = ""
    uid: str = ""
    created_at: str = ""

    @property
    def digest(self) -> str:
        """Names the candidate: digest of its parameters."""
        return codec.digest(self.parameters)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Each sample over the default's of its pair: below 1 is faster than the default."""
        pairs = zip(self.samples, self.default_samples, strict=False)
        return tuple(sample / default for sample, default in pairs)


@dataclass(frozen=True, slots=True)
class Correction:
    """By how much measured seconds exceed predicted ones: a factor for each class of work.

    ``graph`` is the digest of the model's task graph, ``evidence`` has, by class, the ratios that
    each factor is the median of.
    """

    silicon: Mapping[str, str]
    software: Mapping[str, str]
    graph: str
    factors: Mapping[str, float]
    evidence: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    uid: str = ""
    created_at: str = ""
