"""What one row of each exchange of expert parallelism holds, in bytes: shared by the runtime, which
packs such rows, and by the model, which counts them.

    dispatch   x [hidden], the token's number, its next home, its experts there, their weights
    combine    the sum of a device's experts [hidden], the token's number
    move       what the rest of the layer needs of a token that changes its home, its number
    coherence  layer and place in the KV store, key and value
    token      which sequence, its next token
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from dovetail.ir.expr import evaluate
from dovetail.ir.placement import experts_of
from dovetail.ir.program import Segment
from dovetail.ir.task_graph import ITEMSIZE, KvSpec, TaskGraph, Value

NUMBER = 4
"""Bytes of the numbers that name tokens, homes, experts and places (int32)."""
TOKEN_ROW = NUMBER + 8
HEADER = 8
"""Bytes of a count in a header (int64)."""


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Row sizes of one layer with experts."""

    dispatch: int
    combine: int
    move: int


def sum_dtype(dtype: str) -> str:
    """The type in which outputs of experts are added up."""
    return "float64" if dtype == "float64" else "float32"


def expert_rows(graph: TaskGraph, segments: Sequence[Segment], layer: int) -> ExpertRows:
    """Row sizes of a layer with experts."""
    spec = experts_of(graph, layer)
    assert spec is not None
    total = ITEMSIZE[sum_dtype(graph.dtype)]
    return ExpertRows(
        dispatch=spec.hidden * ITEMSIZE[graph.dtype]
        + NUMBER * (2 + spec.top_k)
        + total * spec.top_k,
        combine=spec.hidden * total + NUMBER,
        move=sum(map(value_bytes, carried(graph, segments, layer).values())) + NUMBER,
    )


def kv_row(spec: KvSpec) -> int:
    """Bytes of a coherence row."""
    return spec.bytes_per_token + 2 * NUMBER


def carried(graph: TaskGraph, segments: Sequence[Segment], layer: int) -> dict[str, Value]:
    """The values of a token that are made before a layer's experts and read after them."""
    body = graph.body(layer)
    own = [segment for segment in segments if segment.body == body.name]
    at = next(i for i, segment in enumerate(own) if segment.over == "experts")
    made: set[str] = set(own[at].writes)
    names: dict[str, None] = {}
    for segment in own[at + 1 :]:
        names |= dict.fromkeys(n for n in segment.reads if n not in made and n not in graph.shared)
        made |= set(segment.writes)
    return {name: body.values[name] for name in names}


def value_shape(value: Value, tokens: int) -> tuple[int, ...]:
    """A value's shape for that many sequences of one token each."""
    return tuple(int(evaluate(dim, seqs=tokens, q_len=1, past=0)) for dim in value.shape)


def value_bytes(value: Value) -> int:
    """Bytes of a value for one token."""
    return prod(value_shape(value, 1)) * ITEMSIZE[value.dtype]
