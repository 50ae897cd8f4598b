"""Moves: the small frozen records that turn a task graph into a schedule.

A schedule is the list of its moves; replaying the list gives the schedule back, and the diff of two
lists is the diff of two plans. Weights are placed by **unit**: ``embed`` (the embedding table),
``dense`` (all of a layer that is not a routed expert), ``experts`` and ``head``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from dovetail.ir import codec

UnitKind = Literal["embed", "dense", "experts", "head", "kv"]
Axis = Literal["seqs", "tokens", "experts"]
Tier = Literal["disk", "ram", "hbm"]
ExpertFormat = Literal["int8", "int4"]
FORMATS: tuple[ExpertFormat, ...] = ("int8", "int4")
"""Formats in fewer bits that experts may be converted to, where the user allows it."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Admit at most ``seqs`` sequences and ``prefill_tokens`` prompt tokens a step into a KV store
    of ``kv_tokens``, prompts of up to ``longest`` tokens; with ``refill`` a finished sequence's row
    is given to the next prompt at once (continuous batching), otherwise a wave is finished first
    (static batching). ``chunk_tokens`` cuts prompts into pieces of so many tokens, one a step,
    beside the sequences that decode (chunked prefill; 0: a prompt is never cut). ``layer_groups``
    cuts the layers instead: prompts admitted beside sequences that decode pass one group of layers
    a step (layered prefill; 0: all layers at once)."""

    seqs: int
    kv_tokens: int
    prefill_tokens: int
    longest: int
    refill: bool
    chunk_tokens: int = 0
    layer_groups: int = field(default=0, metadata=codec.LATER)

    @property
    def prompt_tokens(self) -> int:
        """Most tokens of one prompt in a step."""
        return min(self.longest, self.chunk_tokens or self.longest)

    @property
    def step_tokens(self) -> int:
        """Most new tokens of a step: one per sequence in decode, beside the prompts admitted."""
        return max(self.prefill_tokens, self.prompt_tokens) + self.seqs


@dataclass(frozen=True, slots=True)
class Place:
    """Keep a unit in a tier for the whole run; what is computed elsewhere is copied in every step.

    ``layers`` is empty for embed and head. For experts, ``count`` of each layer's experts (the
    first ones, after those in faster tiers) are in ``tier``, or the experts ``which`` of one layer;
    for ``kv``, the KV of ``count`` percent of the sequences. What no move places is on disk, KV in
    ram.
    """

    unit: UnitKind
    tier: Tier
    layers: tuple[int, ...] = ()
    count: int = 0
    which: tuple[int, ...] = field(default=(), metadata=codec.LATER)


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
    """``resident_first``: run a layer's resident experts while its first streamed ones are still
    being read. ``paged``: copy the next layer's weights in pages between the transfers of this
    layer's groups (CGOPipe of MoE-Lightning, arXiv 2411.11217). ``barrier``: all engines wait for
    each other after every group's attention and again after its experts, experts are copied beside
    the first group's attention and the next layer's other weights beside its experts (FlexGen's
    zig-zag block schedule, arXiv 2303.06865)."""

    role: Literal["experts"]
    order: Literal["resident_first", "paged", "barrier"]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Run ``workers`` compute engines of ``threads`` threads each beside ``readers`` disk engines,
    to which the loads of every ring are dealt in turn."""

    workers: int
    threads: int
    readers: int = 1


@dataclass(frozen=True, slots=True)
class Fuse:
    """Emit these consecutive tasks of a body as one segment, run without a switch in between."""

    body: str
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Run the loop over layers as a software pipeline: in steps of ``work`` (decode, prefill or
    mixed) and layers like ``layer``, the engine takes ``ops`` in this order, each ``ahead`` layers
    further on than those with 0."""

    work: Literal["decode", "prefill", "mixed"]
    layer: int
    engine: str
    ops: tuple[str, ...]
    ahead: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Assign:
    """Run ``percent`` of a role on an engine: ``all`` on the GPU; then of ``attention`` (in decode,
    by sequences), ``experts`` (of every layer) or ``linears`` (of every weight matrix that is
    copied to the GPU, by its columns) a share on the CPU.

    With ``by`` load the CPU's experts are chosen in every step, once routing is known: of those
    that hbm does not hold the ones with the fewest tokens, as many as make the layer shortest, at
    most ``percent`` of the layer's (HybriMoE, arXiv 2504.05897). Others with tokens are copied.
    """

    role: Literal["all", "attention", "experts", "linears"]
    engine: Literal["gpu", "cpu"]
    percent: int
    by: Literal["", "load"] = field(default="", metadata=codec.LATER)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Pad the rows of 16-bit matrix products to tiles of these ascending ``sizes``."""

    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pack:
    """Run experts in turn as one as long as they have no more than ``rows`` rows together: their
    products stay apart, all else is done at once. ``grouped`` products are one call too, where the
    matrices stand at equal distances in memory."""

    role: Literal["experts"]
    rows: int
    product: Literal["", "grouped"] = field(default="", metadata=codec.LATER)


@dataclass(frozen=True, slots=True)
class Precision:
    """Run the routed experts from a checkpoint that was converted to ``format``; it comes first,
    since it changes what there is to place. Results differ from the model's."""

    role: Literal["experts"]
    format: ExpertFormat


Move = (
    Precision
    | Dispatch
    | Place
    | Split
    | Accumulate
    | Prefetch
    | Reorder
    | Overlap
    | Fuse
    | Pipeline
    | Assign
    | Bucket
    | Pack
)


def precision_of(moves: Iterable[Move]) -> ExpertFormat | None:
    """The format that a schedule's experts are in, None for the model's own."""
    return next((move.format for move in moves if isinstance(move, Precision)), None)
