"""Units of placement: which weights move together, and how many bytes they take.

`graph -> units`: every weight belongs to exactly one of ``embed``, ``dense[layer]``,
``experts[layer]`` (one entry per expert) and ``head``.
"""

from dovetail.ir.task_graph import Body, Experts, Ref, Role, TaskGraph, Weight

ALIGN = 4096
"""Direct reads start and end at multiples of this many bytes."""


def span_bytes(nbytes: int) -> int:
    """Buffer bytes that a direct read of ``nbytes`` needs at worst: whole blocks around it."""
    return (nbytes + 2 * ALIGN - 1) // ALIGN * ALIGN + ALIGN


def embed_weights(graph: TaskGraph) -> tuple[Weight, ...]:
    """The embedding table, which may be left on disk and read row by row."""
    return _unique(graph.prologue, Role.EMBED)


def beside_rows(graph: TaskGraph) -> tuple[Weight, ...]:
    """What the embedding needs besides the rows of its tables: small weights such as a norm's,
    which are in memory even where the tables are not."""
    ops = [op for task in graph.prologue.tasks for op in task.ops]
    looked_up = [op.args[0] for op in ops if op.target.startswith("aten.embedding")]
    tables = {table.name for table in looked_up if isinstance(table, Ref)}
    return tuple(weight for weight in embed_weights(graph) if weight.fqn not in tables)


def head_weights(graph: TaskGraph) -> tuple[Weight, ...]:
    """Final norm and output projection."""
    return _unique(graph.epilogue)


def dense_weights(body: Body) -> tuple[Weight, ...]:
    """All weights of a layer but its routed experts."""
    return _unique(body)


def experts_of(graph: TaskGraph, layer: int) -> Experts | None:
    """The routed experts of a layer, if it has any."""
    task = graph.body(layer).experts
    return task.experts if task else None


def expert_bytes(experts: Experts) -> int:
    """Buffer bytes of one expert."""
    return sum(span_bytes(t.nbytes) for t in experts.tensors)


def weights_bytes(weights: tuple[Weight, ...]) -> int:
    """Buffer bytes of these weights."""
    blocks = sum(3 * ALIGN * (len(w.pieces) - 1) for w in weights if w.pieces)
    return sum(span_bytes(w.nbytes) for w in weights) + blocks


def _unique(body: Body, role: Role | None = None) -> tuple[Weight, ...]:
    found = {
        weight.key: weight
        for task in body.tasks
        if role is None or task.role is role
        for weight in task.weights
    }
    return tuple(found.values())
