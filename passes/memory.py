"""Memory: `layout -> bytes of the ram tier, by what they hold`.

Weights and buffers are counted as the runtime allocates them, whole blocks included; activations
by walking each segment's operators and keeping the most that is alive at once.
"""

import math
from collections.abc import Iterable, Sequence

from dovetail.ir.expr import evaluate
from dovetail.ir.placement import (
    beside_rows,
    dense_weights,
    embed_weights,
    expert_bytes,
    experts_of,
    head_weights,
    weights_bytes,
)
from dovetail.ir.task_graph import ITEMSIZE, Body, Experts, Ref, TaskGraph
from dovetail.passes.apply_moves import Layout
from dovetail.passes.live_bytes import (
    COPY_BYTES,
    converted,
    copy_bytes,
    live_bytes,
    value_bytes,
)

KERNEL_BYTES = 768 << 10
"""Generated code and tables that oneDNN keeps per shape of a 16-bit GEMM (see ir.gemm_tiles)."""
KERNEL_FIXED = 256 << 10
"""What oneDNN keeps beside that, whatever the shapes."""
RESERVE_FIXED = 1280 << 10
"""Bytes kept back for the allocator, Python objects, and library code first touched in a run."""
RESERVE_SHARE = 0.05
"""Share of all else kept back for fragmentation."""


def ring_bytes(layout: Layout) -> dict[str, int]:
    """Bytes of one buffer of every ring that the layout streams through."""
    graph, sizes = layout.graph, {}
    there = zip(graph.layers, layout.dense_resident, strict=True)
    streamed = dict.fromkeys(body for body, resident in there if not resident)
    if streamed:
        dense = (weights_bytes(dense_weights(graph.bodies[body])) for body in streamed)
        sizes["dense"] = max(dense)
    first = {body: layer for layer, body in reversed(list(enumerate(graph.layers)))}
    some = dict.fromkeys(b for i, b in enumerate(graph.layers) if layout.chunks(i))
    experts = [e for body in some if (e := experts_of(graph, first[body]))]
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
    dense = [weights_bytes(dense_weights(body)) for body in graph.bodies]
    specs = [body.experts.experts if body.experts else None for body in graph.bodies]
    experts = [expert_bytes(spec) if spec else 0 for spec in specs]
    for layer, body in enumerate(graph.layers):
        total += layout.dense_resident[layer] * dense[body]
        total += layout.experts_resident[layer] * experts[body]
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
        if t.parameters
    }
    # Absorbed latent attention has two products of its own, into the query and into the result.
    absorbed = sum(
        any("latent" in op.kwargs for t in b.tasks for op in t.ops) for b in graph.bodies
    )
    shapes = len(weights | experts) + 2 * min(1, absorbed)
    return KERNEL_FIXED + shapes * len(buckets) * KERNEL_BYTES


def step_tokens(layout: Layout) -> int:
    """Most new tokens of a step: one per sequence in decode, beside the prompts admitted."""
    return layout.dispatch.step_tokens


def token_buffer_bytes(layout: Layout) -> int:
    """Buffers that gather all groups' tokens for the experts: inputs, routing, and one float32
    accumulator per worker."""
    tasks = (body.experts for body in layout.graph.bodies)
    specs = [task.experts for task in tasks if task and task.experts]
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
    return sum(math.ceil(value_bytes(v.shape, v.dtype, 1, 64, 0) / 64) for v in values)


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
            needed = rows * (width * item + 4 * experts.hidden)
            most = max(most, needed + _quantised_temporaries(experts, rows, item))
    return most


def _quantised_temporaries(experts: Experts, rows: int, item: int) -> int:
    """Rows in int8 and, on the way there, float32, and sums in int32 and float32; or an int4 matrix
    in the model's type."""
    matrices = [tensor for tensor in experts.tensors if tensor.parameters]
    match experts.precision:
        case "int8":
            return max(rows * (5 * t.shape[0] + 8 * t.shape[1]) for t in matrices)
        case "int4":
            return max(t.parameters * (item + 1) for t in matrices)
    return 0


def _decode_copies(layout: Layout) -> int:
    """What a worker keeps of keys and values that it converted for decoding."""
    dispatch, most = layout.dispatch, 0
    tokens = min(dispatch.kv_tokens, layout.rows * layout.graph.context)
    for body in layout.graph.bodies:
        for op in (op for task in body.tasks for op in task.ops):
            if op.target == "dovetail.attention":
                k, v = (body.values[arg.name] for arg in op.args[1:3] if isinstance(arg, Ref))
                heads = int(evaluate(k.shape[1], seqs=1, q_len=1, past=0))
                if converted(k, v) and ("latent" not in op.kwargs or k.dtype != "float32"):
                    most = max(most, min(COPY_BYTES, tokens * heads * copy_bytes(k, v)))
    return most
