"""Live bytes: `tasks of a body, a group's shape -> most bytes alive at once while they run`.

Walks the operators in order, with what each keeps beside its results.
"""

import functools
from collections.abc import Iterable

from dovetail.ir.expr import Expr, evaluate
from dovetail.ir.task_graph import ITEMSIZE, Body, Op, Ref, Task, Value
from dovetail.passes.op_cost import is_view

COPY_BYTES = 4 << 20
"""What attention converts to float32 at one time, unless a key head of one row needs more."""
MODULE_COPIES = 4
"""How often a whole module may hold the results of its matrices at one time."""


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
                alive[name] = int(value_bytes(value.shape, value.dtype, *shape))
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
    if "latent" in op.kwargs:
        return _latent_bytes(body.values[op.outs[0]], q, k, v, shape)
    heads, kv_heads = (int(evaluate(x.shape[1], seqs=1, q_len=1, past=0)) for x in (q, k))
    tile = min(q_len, 256) * (past + q_len) * 4
    fixed = seqs * (past + q_len) + (heads * tile * 2 if op.args[3] is not None else tile)
    if q_len == 1 or not converted(k, v):
        return fixed
    one = copy_bytes(k, v) * (heads // kv_heads * q_len + past + q_len)
    return fixed + min(seqs * kv_heads * one, max(COPY_BYTES, one))


def _latent_bytes(out: Value, q: Value, k: Value, v: Value, shape: tuple[int, int, int]) -> int:
    """Of attention over latents: the latents gathered from the KV store; for prompts what they are
    expanded to, with float32 copies; in decode latents and rotary keys side by side, and queries
    and results as wide as these."""
    seqs, q_len, past = shape
    one = {"seqs": 1, "q_len": 1, "past": 0}
    heads, width, inner, shared, value = (
        int(evaluate(x, **one))
        for x in (q.shape[1], q.shape[3], k.shape[3], v.shape[3], out.shape[3])
    )
    length, item = past + q_len, ITEMSIZE[out.dtype]
    stored = seqs * length * (inner + shared) * item
    tile = min(q_len, 256) * length * 4
    if q_len == 1:
        wide = seqs * heads * (3 * (inner + shared) * max(item, 4) + (inner + value) * item)
        return 2 * stored + wide + seqs * length + tile
    expanded = seqs * length * heads * (2 * width - shared + value) * item
    copies = 2 * width * 4 * (q_len + length)
    return (
        stored
        + expanded
        + seqs * length
        + tile
        + min(seqs * heads * copies, max(COPY_BYTES, copies))
    )


def _module_bytes(op: Op, body: Body, q_len: int, past: int) -> int:
    """What a module that runs whole on one sequence may hold at once, as a rule of thumb: its
    matrices' results a few times over in float32, and scores of every key."""
    names = {arg.name for arg in op.args[1] if isinstance(arg, Ref)} if len(op.args) > 1 else set()  # type: ignore[union-attr]
    weights = {w.fqn: w for task in body.tasks for w in task.weights if w.fqn in names}
    width = sum(w.shape[0] for w in weights.values() if len(w.shape) == 2)
    return q_len * 4 * (MODULE_COPIES * width + 4 * (past + q_len))


def converted(k: Value, v: Value) -> bool:
    """Whether attention computes on copies of keys and values."""
    return k.dtype != "float32" or k.shape[3] != v.shape[3]


def copy_bytes(k: Value, v: Value) -> int:
    """Bytes of a converted key and value of one head and token."""
    width = max(int(evaluate(x.shape[3], seqs=1, q_len=1, past=0)) for x in (k, v))
    return 2 * width * 4


def value_bytes(shape: tuple[Expr, ...], dtype: str, seqs: int, q_len: int, past: int) -> float:
    """Bytes of a value of one group."""
    size = 1.0
    for dim in shape:
        size *= evaluate(dim, seqs=seqs, q_len=q_len, past=past)
    return size * ITEMSIZE[dtype]
