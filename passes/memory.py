"""Memory: `layout -> bytes of the ram tier, by what they hold`.

Weights and buffers are counted as the runtime allocates them, whole blocks included; activations
by walking each segment's operators and keeping the most that is alive at once.
"""

import functools
import math
from collections.abc import Iterable, Sequence

from dovetail.ir.expr import Expr, evaluate
from dovetail.ir.placement import (
    beside_rows,
    dense_weights,
    embed_weights,
    expert_bytes,
    experts_of,
    head_weights,
    weights_bytes,
)
from dovetail.ir.task_graph import ITEMSIZE, Body, Op, Ref, Task, TaskGraph, Value
from dovetail.passes.apply_moves import Layout
from dovetail.passes.cost import is_view

KERNEL_BYTES = 768 << 10
"""Generated code and tables that oneDNN keeps per shape of a 16-bit GEMM (see ir.gemm_tiles)."""
KERNEL_FIXED = 256 << 10
"""What oneDNN keeps beside that, whatever the shapes."""
COPY_BYTES = 4 << 20
"""What attention converts to float32 at one time, unless a key head of one row needs more."""
MODULE_COPIES = 4
"""How often a whole module may hold the results of its matrices at one time."""
RESERVE_FIXED = 1280 << 10
"""Bytes kept back for the allocator, Python objects, and library code first touched in a run."""
RESERVE_SHARE = 0.05
"""Share of all else kept back for fragmentation."""


def ring_bytes(layout: Layout) -> dict[str, int]:
    """Bytes of one buffer of every ring that the layout streams through."""
    graph, sizes = layout.graph, {}
    layers = range(len(graph.layers))
    dense = [
        weights_bytes(dense_weights(graph.body(i))) for i in layers if not layout.dense_resident[i]
    ]
    if dense:
        sizes["dense"] = max(dense)
    experts = [e for i in layers if layout.chunks(i) and (e := experts_of(graph, i))]
    if experts:
        sizes["experts"] = layout.chunk * max(expert_bytes(e) for e in experts)
    if not layout.head_resident:
        sizes["head"] = weights_bytes(head_weights(graph))
    return sizes


def resident_bytes(layout: Layout) -> int:
    """Bytes of all units that stay in ram."""
    graph, total = layout.graph, 0
    embed = embed_weights(graph) if layout.embed_resident else beside_rows(graph)
    total += weights_bytes(embed)
    if layout.head_resident:
        total += weights_bytes(head_weights(graph))
    for layer in range(len(graph.layers)):
        if layout.dense_resident[layer]:
            total += weights_bytes(dense_weights(graph.body(layer)))
        if experts := experts_of(graph, layer):
            total += layout.experts_resident[layer] * expert_bytes(experts)
    return total


def ram_bytes(layout: Layout) -> dict[str, int]:
    """Peak bytes of the ram tier: resident weights, rings, KV store, token buffers, activations
    and the reserve."""
    rings = {name: size * layout.prefetch[name].slots for name, size in ring_bytes(layout).items()}
    parts = {
        "resident": resident_bytes(layout),
        "rings": sum(rings.values()),
        "kv": layout.dispatch.kv_tokens * layout.graph.kv_bytes_per_token
        + layout.dispatch.seqs * layout.graph.state_bytes_per_seq,
        "tokens": token_buffer_bytes(layout),
        "activations": activation_bytes(layout),
        "kernels": kernel_bytes(layout.graph, layout.buckets),
    }
    parts["reserve"] = RESERVE_FIXED + int(RESERVE_SHARE * sum(parts.values()))
    return parts


def kernel_bytes(graph: TaskGraph, buckets: Sequence[int]) -> int:
    """What the GEMM library keeps: generated code for every weight shape and tile size."""
    if ITEMSIZE[graph.dtype] != 2:
        return 0
    bodies = (graph.prologue, *graph.bodies, graph.epilogue)
    weights = {w.shape for b in bodies for t in b.tasks for w in t.weights if len(w.shape) == 2}
    experts = {
        t.shape
        for b in bodies
        if b.experts and b.experts.experts
        for t in b.experts.experts.tensors
    }
    return KERNEL_FIXED + len(weights | experts) * len(buckets) * KERNEL_BYTES


def step_tokens(layout: Layout) -> int:
    """Most new tokens of a step: one per sequence in decode, beside the prompts admitted."""
    return layout.dispatch.step_tokens


def token_buffer_bytes(layout: Layout) -> int:
    """Buffers that gather all groups' tokens for the experts: inputs, routing, and one float32
    accumulator per worker."""
    specs = [e for i in range(len(layout.graph.layers)) if (e := experts_of(layout.graph, i))]
    if not specs:
        return 0
    hidden = max(e.hidden for e in specs)
    top_k = max(e.top_k for e in specs)
    item = ITEMSIZE[layout.graph.dtype]
    per_token = hidden * item + top_k * (8 + 4 + 24) + hidden * max(4, item) * layout.workers
    return step_tokens(layout) * per_token


def activation_bytes(layout: Layout) -> int:
    """Values that live between segments, for all tokens of a step, and the temporaries of one
    segment on every worker."""
    graph = layout.graph
    tokens = step_tokens(layout)
    held = max(_held_bytes(graph, body) for body in graph.bodies) * tokens
    held += _shared_bytes(graph) * tokens
    temporaries = max(_segment_bytes(layout, body) for body in (graph.prologue, *graph.bodies))
    most = max(temporaries, _expert_temporaries(layout), _head_bytes(layout))
    return held + layout.workers * (most + _decode_copies(layout))


def _held_bytes(graph: TaskGraph, body: Body) -> int:
    """Bytes per token of what crosses from one task to another around the experts."""
    names = set(body.outputs)
    if body.experts:
        at = body.tasks.index(body.experts)
        before = {name for task in body.tasks[:at] for name in task.writes} | set(body.inputs[:1])
        names |= {n for task in body.tasks[at:] for n in task.reads if n in before}
    return _per_token(body, names) + 2 * graph.hidden * ITEMSIZE[graph.dtype]


def _shared_bytes(graph: TaskGraph) -> int:
    return _per_token(graph.prologue, graph.shared) + 16


def _per_token(body: Body, names: Iterable[str]) -> int:
    values = (body.values[name] for name in names if name in body.values)
    return sum(math.ceil(_value_bytes(v.shape, v.dtype, 1, 64, 0) / 64) for v in values)


def _group_shapes(layout: Layout) -> list[tuple[int, int, int]]:
    """Corner cases of a group's (seqs, q_len, past)."""
    dispatch, context = layout.dispatch, layout.graph.context
    rows = min(layout.rows, dispatch.seqs)
    longest = dispatch.prompt_tokens
    tokens = max(longest, min(layout.attn_tokens, dispatch.prefill_tokens))
    before = dispatch.longest - longest
    decode = max(1, min(dispatch.kv_tokens // max(1, rows), context) - 1)
    shapes = [(max(1, min(rows, tokens // longest)), longest, before), (rows, 1, decode)]
    many = min(rows, tokens)
    shapes.append((many, max(1, tokens // many), before))
    return shapes


def _segment_bytes(layout: Layout, body: Body) -> int:
    tasks = [task for task in body.tasks if task.experts is None]
    return max(live_bytes(body, tuple(tasks), shape) for shape in _group_shapes(layout))


def _head_bytes(layout: Layout) -> int:
    rows = min(layout.head_rows, layout.dispatch.seqs)
    body = layout.graph.epilogue
    logits = rows * layout.graph.vocab * 4
    return live_bytes(body, body.tasks, (rows, 1, 0)) + logits


def _expert_temporaries(layout: Layout) -> int:
    item, most = ITEMSIZE[layout.graph.dtype], 0
    for body in dict.fromkeys(layout.graph.layers):
        if experts := experts_of(layout.graph, layout.graph.layers.index(body)):
            rows = min(layout.expert_rows, step_tokens(layout) * experts.top_k)
            width = 2 * experts.hidden + 5 * experts.intermediate
            most = max(most, rows * (width * item + 4 * experts.hidden))
    return most


def live_bytes(body: Body, tasks: tuple[Task, ...], shape: tuple[int, int, int]) -> int:
    """Most bytes alive at once while ``tasks`` run one group of ``(seqs, q_len, past)``."""
    return _live_bytes(_Key(body), tuple(t.name for t in tasks), shape)


class _Key:
    """A body, hashed by identity so that results can be remembered."""

    def __init__(self, body: Body) -> None:
        self.body = body

    def __hash__(self) -> int:
        return id(self.body)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.body is self.body


@functools.lru_cache(maxsize=4096)
def _live_bytes(key: _Key, names: tuple[str, ...], shape: tuple[int, int, int]) -> int:
    body = key.body
    ops = [op for task in body.tasks if task.name in names for op in task.ops]
    owner = _owners(ops)
    last: dict[str, int] = {}
    for index, op in enumerate(ops):
        for name in op.uses():
            last[owner.get(name, name)] = index
    alive: dict[str, int] = {}
    peak = 0
    for index, op in enumerate(ops):
        for name in op.outs:
            if owner.get(name, name) == name and name in body.values:
                value = body.values[name]
                alive[name] = int(_value_bytes(value.shape, value.dtype, *shape))
        scratch = _scratch_bytes(op, body, shape)
        peak = max(peak, sum(alive.values()) + scratch)
        for name in [n for n in alive if last.get(n, -1) <= index and n not in body.outputs]:
            del alive[name]
    return peak


def _owners(ops: Iterable[Op]) -> dict[str, str]:
    """The value whose memory each value shares: its own, or that of what it is a view of. The KV
    store's values are in its own pool and own nothing."""
    owner: dict[str, str] = {}
    for op in ops:
        if is_view(op) and isinstance(op.args[0], Ref):
            for name in op.outs:
                owner[name] = owner.get(op.args[0].name, op.args[0].name)
        elif op.target == "dovetail.kv_update":
            for name, arg in zip(op.outs, op.args, strict=True):
                assert isinstance(arg, Ref)
                owner[name] = owner.get(arg.name, arg.name)
    return owner


def _scratch_bytes(op: Op, body: Body, shape: tuple[int, int, int]) -> int:
    """What an attention kernel needs beside its output: a mask or a tile of scores, and float32
    copies of what it reads in another type or width."""
    seqs, q_len, past = shape
    if op.target == "dovetail.module":
        return _module_bytes(op, body, q_len, past)
    if op.target != "dovetail.attention":
        return 0
    q, k, v = (body.values[arg.name] for arg in op.args[:3] if isinstance(arg, Ref))
    heads, kv_heads = (int(evaluate(x.shape[1], seqs=1, q_len=1, past=0)) for x in (q, k))
    tile = min(q_len, 256) * (past + q_len) * 4
    fixed = seqs * (past + q_len) + (heads * tile * 2 if op.args[3] is not None else tile)
    if q_len == 1 or not _converted(k, v):
        return fixed
    one = _copy_bytes(k, v) * (heads // kv_heads * q_len + past + q_len)
    return fixed + min(seqs * kv_heads * one, max(COPY_BYTES, one))


def _module_bytes(op: Op, body: Body, q_len: int, past: int) -> int:
    """What a module that runs whole on one sequence may hold at once, as a rule of thumb: its
    matrices' results a few times over in float32, and scores of every key."""
    names = {arg.name for arg in op.args[1] if isinstance(arg, Ref)} if len(op.args) > 1 else set()  # type: ignore[union-attr]
    weights = {w.fqn: w for task in body.tasks for w in task.weights if w.fqn in names}
    width = sum(w.shape[0] for w in weights.values() if len(w.shape) == 2)
    return q_len * 4 * (MODULE_COPIES * width + 4 * (past + q_len))


def _converted(k: Value, v: Value) -> bool:
    """Whether attention computes on copies of keys and values."""
    return k.dtype != "float32" or k.shape[3] != v.shape[3]


def _copy_bytes(k: Value, v: Value) -> int:
    """Bytes of a converted key and value of one head and token."""
    width = max(int(evaluate(x.shape[3], seqs=1, q_len=1, past=0)) for x in (k, v))
    return 2 * width * 4


def _decode_copies(layout: Layout) -> int:
    """What a worker keeps of keys and values that it converted for decoding."""
    dispatch, most = layout.dispatch, 0
    tokens = min(dispatch.kv_tokens, layout.rows * layout.graph.context)
    for body in layout.graph.bodies:
        for op in (op for task in body.tasks for op in task.ops):
            if op.target == "dovetail.attention":
                k, v = (body.values[arg.name] for arg in op.args[1:3] if isinstance(arg, Ref))
                heads = int(evaluate(k.shape[1], seqs=1, q_len=1, past=0))
                if _converted(k, v):
                    most = max(most, min(COPY_BYTES, tokens * heads * _copy_bytes(k, v)))
    return most


def _value_bytes(shape: tuple[Expr, ...], dtype: str, seqs: int, q_len: int, past: int) -> float:
    size = 1.0
    for dim in shape:
        size *= evaluate(dim, seqs=seqs, q_len=q_len, past=past)
    return size * ITEMSIZE[dtype]
