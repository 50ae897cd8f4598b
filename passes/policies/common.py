"""What policies share: the setting they decide in, and the moves that most of them make."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dovetail.ir.batching import row_tokens
from dovetail.ir.gemm_tiles import LADDERS
from dovetail.ir.machine import Machine
from dovetail.ir.moves import Accumulate, Bucket, Fuse, Move, Place, Prefetch
from dovetail.ir.placement import experts_of
from dovetail.ir.task_graph import ITEMSIZE, Body, TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.memory import kernel_bytes

Knobs = Mapping[str, int | bool]
Ladders = Mapping[str, tuple[int | bool, ...]]
BLOCK = 8 << 20
"""Bytes of one disk read."""
KERNEL_SHARE = 1 / 48
"""Share of the budget that the GEMM library's generated code may take."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a policy decides for: ``budget`` is the ram tier's bytes."""

    graph: TaskGraph
    machine: Machine
    budget: int
    workload: Workload

    @property
    def layers(self) -> tuple[int, ...]:
        """All layer numbers."""
        return tuple(range(len(self.graph.layers)))

    def kv_tokens(self, seqs: int, rows: int) -> int:
        """KV tokens that the ``seqs`` longest prompts need in cohorts of ``rows``."""
        lengths = self.workload.each()[:seqs]
        new = self.workload.new_tokens
        starts = range(0, len(lengths), rows)
        return sum(row_tokens(lengths[i], new) * min(rows, len(lengths) - i) for i in starts)


@dataclass(frozen=True, slots=True)
class Policy:
    """A named policy. ``moves`` makes the schedule of some knobs, or None where the budget cannot
    hold it; a search begins at ``starts`` and changes each knob along its ladder of values."""

    name: str
    source: str
    starts: Callable[[Setting], Iterator[Knobs]]
    ladders: Callable[[Setting], Ladders]
    moves: Callable[[Setting, Knobs], tuple[Move, ...] | None]


def fuse_moves(graph: TaskGraph) -> list[Move]:
    """Run everything between two expert tasks as one segment."""
    moves: list[Move] = []
    for body in (graph.prologue, *graph.bodies, graph.epilogue):
        for names in _runs(body):
            if len(names) > 1:
                moves.append(Fuse(body.name, names))
    return moves


def _runs(body: Body) -> Iterator[tuple[str, ...]]:
    run: list[str] = []
    for task in body.tasks:
        if task.experts is None:
            run.append(task.name)
            continue
        yield tuple(run)
        run = []
    yield tuple(run)


def base_moves(graph: TaskGraph, budget: int) -> list[Move]:
    """Fused segments, experts over all groups' tokens at once, and tiles of 16-bit products."""
    return [*fuse_moves(graph), Accumulate("experts", "tokens"), *bucket_moves(graph, budget)]


def bucket_moves(graph: TaskGraph, budget: int) -> list[Move]:
    """The finest tiles whose generated code fits its share of the budget, else the coarsest."""
    if ITEMSIZE[graph.dtype] != 2:
        return []
    fits = [s for s in LADDERS if kernel_bytes(graph, s) <= budget * KERNEL_SHARE]
    return [Bucket((fits or LADDERS[-1:])[0])]


def place_all(setting: Setting) -> list[Move]:
    """Every weight in ram."""
    graph = setting.graph
    moves: list[Move] = [Place("embed", "ram"), Place("dense", "ram", setting.layers)]
    for count, layers in _by_expert_count(graph).items():
        moves.append(Place("experts", "ram", layers, count))
    return [*moves, Place("head", "ram")]


def _by_expert_count(graph: TaskGraph) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    for layer in range(len(graph.layers)):
        if experts := experts_of(graph, layer):
            found[experts.count] = (*found.get(experts.count, ()), layer)
    return found


def prefetch_moves(expert_slots: int, dense_slots: int) -> list[Move]:
    """Buffers for every kind of unit that may be streamed."""
    return [
        Prefetch("dense", dense_slots, BLOCK),
        Prefetch("experts", expert_slots, BLOCK),
        Prefetch("head", 1, BLOCK),
    ]


def max_experts(graph: TaskGraph) -> int:
    """Experts of the widest layer, 0 in a dense model."""
    layers = [graph.layers.index(body) for body in set(graph.layers)]
    return max((e.count for i in layers if (e := experts_of(graph, i))), default=0)


def powers(first: int, last: int) -> list[int]:
    """``first``, its doubles up to ``last``, and ``last``."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return [*values, last]
