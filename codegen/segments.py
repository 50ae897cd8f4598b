"""Emit segments: fused tasks as one Python function, an expert as another.

Values are deleted after their last use, so that a function holds no more memory than the planner
counted.
"""

import keyword
from collections.abc import Iterable

from dovetail.codegen.ops import Names, op_text
from dovetail.ir.expr import DIMS, Q_LEN, SEQS, evaluate
from dovetail.ir.program import Segment
from dovetail.ir.task_graph import (
    ITEMSIZE,
    SCALE,
    Arg,
    Body,
    Const,
    Experts,
    Op,
    Ref,
    Role,
    Size,
    Task,
    TaskGraph,
    Value,
)

_VIEW_NAMES = (
    "view", "transpose", "permute", "unsqueeze", "squeeze", "slice", "expand", "select", "split",
    "chunk", "alias", "t", "unbind", "split_with_sizes", "reshape", "narrow",
)  # fmt: skip


MODULE = "dovetail.module"
"""Operators that run a whole module of the model."""
_EXTERNAL = ("input_ids", "position_ids")
"""What every layer may read again."""
_TAKEN = frozenset(
    {"m", "g", "v", "w", "layer", "math", "torch", "F", "linear", "rounded", "aten", *DIMS}
    | {"Cache", "Carried", "Mask", "Part"}
)
"""Names that an emitted function uses for itself."""
_SMALL = 64
"""Values below this many bytes per token are not worth a ``del``."""


def local(name: str) -> str:
    """A value's name inside an emitted function."""
    return f"{name}_" if name in _TAKEN or keyword.iskeyword(name) else name


def emit_segment(graph: TaskGraph, body: Body, segment: Segment) -> list[str]:
    """A function ``(m, g, v, w, layer)`` that runs the segment's tasks on one group. The epilogue
    takes the hidden states of the sequences instead of a group's values and returns logits."""
    tasks = [task for task in body.tasks if task.name in segment.tasks]
    if segment.over == "seqs":
        return _emit_head(graph, body, segment, tasks)
    ops = [op for task in tasks for op in task.ops]
    dims = sorted(_dims_of(ops), key=list(DIMS).index)
    lines = [f"def {segment.name}(m, g, v, w, layer):"]
    lines += [f"    {name} = g.{name}" for name in dims]
    for name in segment.reads:
        lines.append(f"    {local(name)} = {_input_text(graph, body, name, segment)}")
    lines += _emit_tasks(graph, body, segment, tasks)
    experts = body.experts
    if experts is not None and set(experts.reads) & set(segment.writes):
        op = experts.ops[0]
        names = ", ".join(local(a.name) for a in op.args if isinstance(a, Ref))
        lines.append(f"    m.gather(g, layer, {names})")
    kept = [name for name in segment.writes if not _only_experts_read(body, name, segment)]
    for name in kept:
        lines.append(f'    v["{_carried(body, name)}"] = {local(name)}')
    return lines


def _emit_head(graph: TaskGraph, body: Body, segment: Segment, tasks: list[Task]) -> list[str]:
    name = local(segment.reads[0])
    ops = [op for task in tasks for op in task.ops]
    lines = [
        f"def {segment.name}(m, {name}, w):",
        f'    """{name} [seqs, 1, {graph.hidden}] -> logits [seqs, 1, {graph.vocab}]."""',
    ]
    dims = _dims_of(ops)
    values = {"seqs": f"{name}.shape[0]", "q_len": "1", "past": "0"}
    lines += [f"    {dim} = {values[dim]}" for dim in sorted(dims, key=list(DIMS).index)]
    lines += _emit_tasks(graph, body, segment, tasks)
    return [*lines, f"    return {local(segment.writes[0])}"]


def _emit_tasks(graph: TaskGraph, body: Body, segment: Segment, tasks: list[Task]) -> list[str]:
    weights = {w.fqn for task in tasks for w in task.weights}

    def spell(name: str) -> str:
        if name in weights:
            return f'w["{name}"]'
        return f'm.constants["{name}"]' if name in graph.constants else local(name)

    def axes(name: str) -> str:
        if name not in body.values:
            return f"Part({spell(name)}, -1, -1)"
        shape = body.values[name].shape
        places = [next((i for i, s in enumerate(shape) if s == dim), -1) for dim in (SEQS, Q_LEN)]
        return f"Part({spell(name)}, {places[0]}, {places[1]})"

    ops = [(task, op) for task in tasks for op in task.ops]
    dead = _deaths([op for _, op in ops], set(segment.writes), segment.reads, body)
    handles = _kv_handles([op for _, op in ops])
    lines: list[str] = []
    current = None
    for index, (task, op) in enumerate(ops):
        if task is not current:
            lines.append(f"    # {task.name}")
            current = task
        outs = ", ".join(local(name) for name in op.outs)
        call = _module(op, axes) if op.target == MODULE else _call(task, op, spell, handles)
        lines.append(f"    {outs} = {call}")
        if dead[index]:
            lines.append(f"    del {', '.join(local(name) for name in dead[index])}")
    return lines


def _call(task: Task, op: Op, spell: Names, handles: bool) -> str:
    if op.target == "dovetail.kv_update":
        args = ", ".join(spell(a.name) for a in op.args if isinstance(a, Ref))
        return f"g.kv.update(layer, {args}, materialise={not handles})"
    if op.target == "dovetail.attention":
        args = ", ".join(spell(a.name) if isinstance(a, Ref) else repr(a) for a in op.args)
        more = f", chunk={op.kwargs['chunk']}" if "chunk" in op.kwargs else ""
        latent = op.kwargs.get("latent")
        more += f", latent=(linear, {spell(latent.name)})" if isinstance(latent, Ref) else ""
        return f"m.attention({args}, g.kv{more})"
    if task.role is Role.EMBED and op.target.startswith("aten.embedding"):
        table, ids = (a.name for a in op.args if isinstance(a, Ref))
        return f'm.embedding(w, "{table}", {spell(ids)})'
    return op_text(op, spell)


def _module(op: Op, axes: Names) -> str:
    """A call of a module that runs whole; ``axes`` spells a tensor with the axes to cut it by."""

    def given(value: Arg) -> str:
        match value:
            case Ref(name):
                return axes(name)
            case Const("cache"):
                return "Cache()"
            case Const(text) if text.startswith("mask "):
                return f"Mask({', '.join(text.split()[1:])})"
            case Const(text) if text.startswith("carried "):
                return f"Carried({text.split()[1]})"
            case (Const("mapping"), *pairs):
                items = [f"{p[0]!r}: {given(p[1])}" for p in pairs if isinstance(p, tuple)]
                return f"{{{', '.join(items)}}}"
            case tuple():
                return f"({''.join(f'{given(item)}, ' for item in value)})"
        return repr(value)

    path, _, wanted = op.args
    call = ", ".join(f'"{name}": {given(value)}' for name, value in op.kwargs.items())
    return f'm.modules.run(g, layer, "{path}", w, {wanted!r}, {{{call}}})'


def _kv_handles(ops: list[Op]) -> bool:
    """Whether the KV store's tensors go straight into attention, so that they need no copy."""
    stored = {name for op in ops if op.target == "dovetail.kv_update" for name in op.outs}
    users = [op for op in ops if stored & set(op.uses())]
    return all(op.target == "dovetail.attention" and "latent" not in op.kwargs for op in users)


def _input_text(graph: TaskGraph, body: Body, name: str, segment: Segment) -> str:
    if body.experts is not None and name in body.experts.writes:
        return "m.scatter(g)"
    last = not any(
        name in task.reads
        for task in body.tasks[_last_index(body, segment) + 1 :]
        if task.experts is None
    )
    keep = body is graph.prologue or name in (*graph.shared, *_EXTERNAL) or not last
    return f'v["{name}"]' if keep else f'v.pop("{name}")'


def _last_index(body: Body, segment: Segment) -> int:
    return max(i for i, task in enumerate(body.tasks) if task.name in segment.tasks)


def _only_experts_read(body: Body, name: str, segment: Segment) -> bool:
    if name in body.outputs:
        return False
    readers = [t for t in body.tasks if name in t.reads and t.name not in segment.tasks]
    return bool(readers) and all(task.experts is not None for task in readers)


def _carried(body: Body, name: str) -> str:
    """The name under which the next body finds a value: outputs become the next inputs."""
    if name in body.outputs and body.outputs[0] == name:
        return "hidden"
    return name


def _deaths(ops: list[Op], kept: set[str], inputs: Iterable[str], body: Body) -> list[list[str]]:
    """For every operator, the names whose memory is no longer needed after it; small values and
    those that live to the end are left to the function's return."""
    root: dict[str, str] = {}
    for op in ops:
        shares = _is_view(op) and isinstance(op.args[0], Ref)
        for name in op.outs:
            first = op.args[0] if shares else None
            root[name] = root.get(first.name, first.name) if isinstance(first, Ref) else name
    last: dict[str, int] = {}
    members: dict[str, list[str]] = {}
    for name in inputs:
        members.setdefault(name, [name])
    for index, op in enumerate(ops):
        for name in (*op.uses(), *op.outs):
            last[root.get(name, name)] = index
        for name in op.outs:
            members.setdefault(root[name], []).append(name)
    alive = {root.get(name, name) for name in kept}
    dead: list[list[str]] = [[] for _ in ops]
    for name, index in last.items():
        large = name in body.values and _per_token(body.values[name]) >= _SMALL
        if name in members and name not in alive and index < len(ops) - 1 and large:
            dead[index] += members[name]
    return dead


def _per_token(value: Value) -> float:
    size = 1.0
    for dim in value.shape:
        size *= evaluate(dim, seqs=1, q_len=1, past=1)
    return size * ITEMSIZE[value.dtype]


def _is_view(op: Op) -> bool:
    parts = op.target.split(".")
    return op.target == "getitem" or (len(parts) > 1 and parts[1] in _VIEW_NAMES)


def _dims_of(ops: Iterable[Op]) -> set[str]:
    found: set[str] = set()

    def visit(arg: Arg) -> None:
        if isinstance(arg, Size):
            found.update(str(symbol) for symbol in arg.expr.free_symbols)
        elif isinstance(arg, tuple):
            for item in arg:
                visit(item)

    for op in ops:
        for arg in (*op.args, *op.kwargs.values()):
            visit(arg)
    return found


def emit_expert(body: Body, segment: Segment) -> list[str]:
    """A function ``(x, w)`` that runs one expert: ``x [rows, hidden] -> [rows, hidden]``."""
    task = body.experts
    assert task is not None and task.experts is not None
    experts = task.experts
    parts = {tensor.part for tensor in experts.tensors}
    lines = [
        f"def {segment.name}(x, w):",
        f'    """One of {experts.count} experts: x [rows, {experts.hidden}] -> the same."""',
    ]
    dims = _dims_of(experts.activation)
    if dims:
        lines.append("    seqs, q_len, past = x.shape[0], 1, 0")
    lines += _gate_up(experts, parts)
    for op in experts.activation:
        lines.append(f"    {', '.join(op.outs)} = {op_text(op, str)}")
    lines.append(f"    return {_linear(experts, parts, 'a', 'down')}")
    return lines


def rounds_rows(experts: Experts) -> bool:
    """Whether an expert's rows are rounded once for two products."""
    return experts.precision == "int8" and any(t.part == "gate" for t in experts.tensors)


def _gate_up(experts: Experts, parts: set[str]) -> list[str]:
    if "gate_up" in parts:
        lines = [f"    h = {_linear(experts, parts, 'x', 'gate_up')}"]
        return [*lines, "    g, u = h.chunk(2, -1)"] if experts.split_gate else lines
    if "gate" not in parts:
        return [f"    h = {_linear(experts, parts, 'x', 'up')}"]
    gate, up = (_linear(experts, parts, "x", part) for part in ("gate", "up"))
    first = ["    x = rounded(x)"] if rounds_rows(experts) else []
    if experts.split_gate:
        return [*first, f"    g = {gate}", f"    u = {up}"]
    return [*first, f"    h = torch.cat([{gate}, {up}], -1)"]


def _linear(experts: Experts, parts: set[str], x: str, part: str) -> str:
    own = next(tensor for tensor in experts.tensors if tensor.part == part)
    turned = ".t()" if experts.transposed or own.transposed else ""
    arguments = [x, f'w["{part}"]{turned}']
    if f"{part}_bias" in parts:
        arguments.append(f'w["{part}_bias"]')
    if part + SCALE in parts:
        arguments.append(f'scale=w["{part}{SCALE}"]')
    return f"linear({', '.join(arguments)})"
