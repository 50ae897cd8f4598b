"""Latent attention as one operator: `body -> body`.

Multi-head latent attention keeps a compressed latent for each token, from which keys and values of
every head are expanded (DeepSeek-V2, arXiv 2405.04434, section 2.1.2):

    expanded = linear(latents, weight); k, v = split(heads(expanded))
    attention(q, cat(k, rotary), v)         ->      attention(q, latents, rotary, latent=weight)

The one operator leaves the runtime free to expand (many queries a sequence) or to absorb the
expansion into query and result (one query), so that decode reads nothing but the latents.
"""

from dataclasses import replace

from dovetail.ir.task_graph import Body, Op, Ref, Task, Weight

_ATTENTION, _LINEAR = "dovetail.attention", "aten.linear.default"
_RESHAPES = ("view", "_unsafe_view", "reshape", "transpose", "permute")


def with_latent_attention(body: Body) -> Body:
    """The body with the operators between the KV store and the attention taken into it, where they
    are those of latent attention; else the body itself."""
    stored = next((t.writes for t in body.tasks if t.kv is not None), ())
    tasks = tuple(_rewritten(body, task, stored) for task in body.tasks)
    if tasks == body.tasks:
        return body
    made = {name for task in tasks for op in task.ops for name in op.outs}
    values = {
        n: v for n, v in body.values.items() if n in made or n in body.inputs or _read(n, tasks)
    }
    return replace(body, tasks=tasks, values=values)


def _read(name: str, tasks: tuple[Task, ...]) -> bool:
    return any(name in task.reads for task in tasks)


def _rewritten(body: Body, task: Task, stored: tuple[str, ...]) -> Task:
    found = next((op for op in task.ops if op.target == _ATTENTION), None)
    if found is None or len(stored) != 2:
        return task
    makers = {name: op for op in task.ops for name in op.outs}
    taken = _expansion(body, task, found, makers, stored)
    if taken is None:
        return task
    weight, inner = taken
    used = [op for op in task.ops if op not in inner and set(op.uses()) & _outs(inner)]
    if used != [found]:
        return task
    q, _, _, *rest = found.args
    latents, rotary = (Ref(name) for name in stored)
    kwargs = {**found.kwargs, "latent": Ref(weight.fqn)}
    made = Op(_ATTENTION, (q, latents, rotary, *rest), found.outs, kwargs)
    ops = tuple(made if op is found else op for op in task.ops if op not in inner)
    return replace(task, ops=ops)


def _outs(ops: list[Op]) -> set[str]:
    return {name for op in ops for name in op.outs}


def _expansion(
    body: Body, task: Task, attention: Op, makers: dict[str, Op], stored: tuple[str, ...]
) -> tuple[Weight, list[Op]] | None:
    """The weight that expands the latents and all operators from them to the attention, or None if
    the keys and values are made in any other way."""
    _, k, v, sinks, *_ = attention.args
    if not (isinstance(k, Ref) and isinstance(v, Ref)) or sinks is not None:
        return None
    joined, cut = makers.get(k.name), makers.get(v.name)
    if joined is None or cut is None or not joined.target.startswith("aten.cat"):
        return None
    parts = joined.args[0]
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    own, shared = parts
    if not (isinstance(own, Ref) and isinstance(shared, Ref)):
        return None
    halves = cut.target.startswith("aten.split_with_sizes") and cut.outs == (own.name, v.name)
    spread = makers.get(shared.name)
    if not halves or spread is None or not spread.target.startswith("aten.expand"):
        return None
    inner, source = [joined, cut, spread], cut.args[0]
    while isinstance(source, Ref) and (op := makers.get(source.name)) is not None:
        inner.append(op)
        if op.target == _LINEAR:
            break
        if op.target.split(".")[1] not in _RESHAPES:
            return None
        source = op.args[0]
    linear = inner[-1]
    if linear.target != _LINEAR or len(linear.args) != 2:
        return None
    if (linear.args[0], spread.args[0]) != tuple(Ref(name) for name in stored):
        return None
    weight = next((w for w in task.weights if linear.args[1] == Ref(w.fqn)), None)
    return (weight, inner) if weight is not None and _sizes_agree(body, attention, weight) else None


def _sizes_agree(body: Body, attention: Op, weight: Weight) -> bool:
    """Whether heads, widths and the weight's rows are those of one expansion of all heads."""
    q, k, v = (body.values[arg.name].shape for arg in attention.args[:3] if isinstance(arg, Ref))
    whole = [shape[1] * (k[3] + v[3]) for shape in (q, k, v)]
    rotary = whole[0] - weight.shape[0]
    return whole[0] == whole[1] == whole[2] and bool(rotary > 0) and bool(rotary % q[1] == 0)
