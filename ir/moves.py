"""Moves: the small frozen records that turn a task graph into a schedule.

A schedule is the list of its moves; replaying the list gives the schedule back, and the diff of two
lists is the diff of two plans. Weights are placed by **unit**: ``embed`` (the embedding table),
``dense`` (all of a layer that is not a routed expert), ``experts`` and ``head``.
"""

from dataclasses import dataclass
from typing import Literal

UnitKind = Literal["embed", "dense", "experts", "head"]
Axis = Literal["seqs", "tokens", "experts"]
Tier = Literal["disk", "ram"]


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Admit at most ``seqs`` sequences and ``prefill_tokens`` prompt tokens a step into a KV store
    of ``kv_tokens``, prompts of up to ``longest`` tokens; with ``refill`` a finished sequence's row
    is given to the next prompt at once (continuous batching), otherwise a wave is finished first
    (static batching)."""

    seqs: int
    kv_tokens: int
    prefill_tokens: int
    longest: int
    refill: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Keep a unit in a tier: ``ram`` holds it for the whole run, ``disk`` reads it in every step.

    ``layers`` is empty for embed and head. For experts, ``count`` of each layer's experts (the
    first ones) are in ``tier`` and the others on disk.
    """

    unit: UnitKind
    tier: Tier
    layers: tuple[int, ...] = ()
    count: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """Run the tasks of a role in pieces of at most ``size`` along ``axis``."""

    role: str
    axis: Axis
    size: int


@dataclass(frozen=True, slots=True)
class Accumulate:
    """Run the tasks of a role once over what all groups of the step bring along ``axis``."""

    role: str
    axis: Axis


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Stream a unit from disk through ``slots`` recycled buffers, read in blocks of ``block``
    bytes: the reader runs ahead of compute by up to ``slots`` loads."""

    unit: UnitKind
    slots: int
    block: int


@dataclass(frozen=True, slots=True)
class Reorder:
    """Run a layer's resident experts while its first streamed ones are still being read."""

    role: Literal["experts"]
    order: Literal["resident_first"]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Run ``workers`` compute engines of ``threads`` threads each beside the disk engine."""

    workers: int
    threads: int


@dataclass(frozen=True, slots=True)
class Fuse:
    """Emit these consecutive tasks of a body as one segment, run without a switch in between."""

    body: str
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Pad the rows of 16-bit matrix products to tiles of these ascending ``sizes``."""

    sizes: tuple[int, ...]


Move = Dispatch | Place | Split | Accumulate | Prefetch | Reorder | Overlap | Fuse | Bucket
