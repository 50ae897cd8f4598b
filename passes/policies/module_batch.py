"""``module_batch``: a batch size of its own for every module (MoE-Gen, arXiv 2503.09716).

Attention runs over small groups of sequences, routed experts once over the tokens of all groups, so
that each expert's weights are read once per layer and step however many sequences are in flight.
What memory is left keeps weights in ram: dense layers first, then the head, then the same number of
experts in every layer, so that the disk has equal work under each.
"""

from collections.abc import Iterator
from itertools import pairwise

from dovetail.ir.moves import Dispatch, Move, Overlap, Place, Reorder, Split
from dovetail.ir.placement import (
    dense_weights,
    expert_bytes,
    experts_of,
    head_weights,
    weights_bytes,
)
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.memory import ram_bytes
from dovetail.passes.policies.common import (
    Knobs,
    Ladders,
    Policy,
    Setting,
    base_moves,
    max_experts,
    powers,
    prefetch_moves,
)

LOAD_BYTES = 64 << 20
"""Largest streamed load worth trying; the disk is at its full rate long before."""


def starts(setting: Setting) -> Iterator[Knobs]:
    """For every number of sequences in flight, doubling: a lean schedule, a rich one, and one with
    equal batches, which is where the search meets model-based batching."""
    for seqs in powers(1, setting.workload.prompts):
        yield {**_lean(setting), "seqs": seqs}
        yield {**_rich(setting), "seqs": seqs}
        yield {**_lean(setting), **equal_batches(setting, seqs)}
    yield leanest(setting)


def _lean(setting: Setting) -> Knobs:
    longest = setting.workload.longest
    return {
        "rows": 4,
        "attn_tokens": longest,
        "prefill_tokens": longest,
        "chunk": 1,
        "slots": 2,
        "expert_rows": 128,
        "head_rows": 16,
        "workers": setting.machine.workers,
        "refill": True,
        "embed": False,
    }


def _rich(setting: Setting) -> Knobs:
    longest, chunks = setting.workload.longest, chunk_sizes(setting)
    return {
        "rows": 32,
        "attn_tokens": max(longest, 1024),
        "prefill_tokens": max(longest, 4096),
        "chunk": chunks[len(chunks) // 2],
        "slots": 3,
        "expert_rows": 1024,
        "head_rows": 64,
        "workers": setting.machine.workers,
        "refill": True,
        "embed": True,
    }


def ladders(setting: Setting) -> Ladders:
    """The values that each knob may take, in order."""
    longest, total = setting.workload.longest, _padded_tokens(setting)
    tokens = sorted(
        {longest, *(t for t in powers(256, 1 << 16) if longest < t), max(longest, total)}
    )
    return {
        "seqs": tuple(_between(powers(1, setting.workload.prompts))),
        "rows": (1, 2, 4, 8, 16, 32, 64, 128),
        "attn_tokens": tuple(t for t in tokens if t <= max(longest, 8192)),
        "prefill_tokens": tuple(t for t in tokens if t <= max(longest, total)),
        "chunk": tuple(chunk_sizes(setting)),
        "slots": (1, 2, 3, 4, 6),
        "expert_rows": (64, 128, 256, 512, 1024),
        "head_rows": (1, 4, 16, 64, 256),
        "embed": (False, True),
        "refill": (False, True),
    }


def _padded_tokens(setting: Setting) -> int:
    """Tokens of all prompts, padded within cohorts of 128: enough to admit everything at once."""
    lengths = setting.workload.each()
    return sum(lengths[i] * len(lengths[i : i + 128]) for i in range(0, len(lengths), 128))


def _between(values: list[int]) -> list[int]:
    """The values and three steps between neighbours."""
    steps = {a + (b - a) * k // 4 for a, b in pairwise(values) for k in range(4)}
    return sorted(steps | {values[-1]})


def chunk_sizes(setting: Setting) -> list[int]:
    """Experts per load: the divisors of every layer's number of experts up to ``LOAD_BYTES``."""
    specs = [e for i in setting.layers if (e := experts_of(setting.graph, i))]
    if not specs:
        return [1]
    one = max(e.nbytes for e in specs)
    counts = {e.count for e in specs}
    sizes = range(1, max(counts) + 1)
    fits = [n for n in sizes if all(c % n == 0 for c in counts) and n * one <= LOAD_BYTES]
    return fits or [1]


def leanest(setting: Setting) -> Knobs:
    """The least memory that runs: one sequence, one expert at a time, nothing kept."""
    longest = setting.workload.longest
    return {
        "seqs": 1,
        "rows": 1,
        "attn_tokens": longest,
        "prefill_tokens": longest,
        "chunk": 1,
        "slots": 1,
        "dense_slots": 1,
        "expert_rows": 64,
        "head_rows": 1,
        "workers": 1,
        "embed": False,
        "resident": 0,
    }


def equal_batches(setting: Setting, seqs: int) -> Knobs:
    """The knobs that make this policy model-based batching: every module sees the same static
    batch of ``seqs`` sequences, shared evenly by the workers."""
    workers = setting.machine.workers
    tokens = seqs * setting.workload.longest
    return {
        "seqs": seqs,
        "rows": -(-seqs // workers),
        "attn_tokens": -(-tokens // workers),
        "prefill_tokens": tokens,
        "workers": workers,
        "refill": False,
    }


def moves(setting: Setting, knobs: Knobs) -> tuple[Move, ...] | None:
    """The schedule of these knobs, or None if the budget is too small for it.

    ``seqs`` in flight; ``rows`` and ``attn_tokens`` of one attention group; ``prefill_tokens`` of
    one step, in pieces of ``chunk_tokens`` (0: whole prompts) or in ``layer_groups`` of layers;
    ``chunk`` experts per load and ``slots`` buffers, loaded by ``readers``; ``expert_rows``,
    ``head_rows`` of one GEMM; ``workers``; ``refill`` (continuous batching); ``embed`` (table in
    ram) and ``resident`` (at most this many bytes of other weights in ram; all that fits by
    default).
    """
    seqs, rows = int(knobs["seqs"]), int(knobs["rows"])
    fixed: list[Move] = [
        Dispatch(
            seqs,
            setting.kv_tokens(seqs, rows),
            int(knobs["prefill_tokens"]),
            setting.workload.longest,
            refill=bool(knobs.get("refill", True)),
            chunk_tokens=int(knobs.get("chunk_tokens", 0)),
            layer_groups=int(knobs.get("layer_groups", 0)),
        ),
        *base_moves(setting.graph, setting.budget),
        Split("attention", "seqs", rows),
        Split("attention", "tokens", int(knobs["attn_tokens"])),
        Split("experts", "experts", int(knobs["chunk"])),
        Split("experts", "tokens", int(knobs.get("expert_rows", 1024))),
        Split("head", "seqs", int(knobs.get("head_rows", 64))),
        *prefetch_moves(int(knobs["slots"]), int(knobs.get("dense_slots", 2))),
        Reorder("experts", "resident_first"),
        Overlap(int(knobs["workers"]), threads=1, readers=int(knobs.get("readers", 1))),
    ]
    if knobs.get("embed", True):
        fixed.append(Place("embed", "ram"))
    most = int(knobs.get("resident", setting.budget))
    return fill_ram(setting, fixed, int(knobs["chunk"]), most)


def fill_ram(setting: Setting, fixed: list[Move], chunk: int, most: int) -> tuple[Move, ...] | None:
    """``fixed`` with as many weights placed in ram as budget and ``most`` bytes allow: the whole
    model if it fits, else dense layers, head and experts in this order."""
    everything = [*fixed, Place("dense", "ram", setting.layers), Place("head", "ram")]
    everything += _place_experts(setting, 1 << 30, chunk)
    if most >= setting.budget and _spare(setting, everything) >= 0:
        return tuple(everything)
    moves = list(fixed)
    if _spare(setting, moves) < 0:
        return None
    left = most
    for move, size in _dense_choices(setting):
        if size <= left and _spare(setting, [*moves, move]) >= 0:
            moves.append(move)
            left -= size
    per_layer = _experts_that_fit(setting, moves, chunk, left)
    return (*moves, *_place_experts(setting, per_layer, chunk))


def _dense_choices(setting: Setting) -> Iterator[tuple[Move, int]]:
    graph = setting.graph
    sizes = [weights_bytes(dense_weights(graph.body(i))) for i in setting.layers]
    yield Place("dense", "ram", setting.layers), sum(sizes)
    yield Place("head", "ram"), weights_bytes(head_weights(graph))


def _experts_that_fit(setting: Setting, moves: list[Move], chunk: int, most: int) -> int:
    """Resident experts per layer: one number for all layers, found by bisection."""
    low, high = 0, max_experts(setting.graph) // chunk
    while low < high:
        middle = (low + high + 1) // 2
        tried = _place_experts(setting, middle * chunk, chunk)
        size = sum(m.count * len(m.layers) * _largest(setting) for m in tried)
        if size <= most and _spare(setting, [*moves, *tried]) >= 0:
            low = middle
        else:
            high = middle - 1
    return low * chunk


def _largest(setting: Setting) -> int:
    graph = setting.graph
    return max((expert_bytes(e) for i in setting.layers if (e := experts_of(graph, i))), default=0)


def _place_experts(setting: Setting, count: int, chunk: int) -> list[Place]:
    """``count`` experts of every layer in ram, or all where a layer has fewer."""
    found: dict[int, list[int]] = {}
    for layer in setting.layers:
        if experts := experts_of(setting.graph, layer):
            found.setdefault(min(count, experts.count), []).append(layer)
    return [Place("experts", "ram", tuple(layers), n) for n, layers in found.items() if n]


def _spare(setting: Setting, moves: list[Move]) -> int:
    return setting.budget - sum(ram_bytes(_layout(setting, moves)).values())


def _layout(setting: Setting, moves: list[Move]) -> Layout:
    return apply_moves(setting.graph, moves)


POLICY = Policy(
    name="module_batch",
    source="MoE-Gen (arXiv 2503.09716)",
    starts=starts,
    ladders=ladders,
    moves=moves,
)
