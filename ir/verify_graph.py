"""Legal task graphs: names defined before use, tasks that say what they read and write, known
shapes, seams in their places."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from dovetail.ir.errors import VerifyError
from dovetail.ir.expr import DIMS
from dovetail.ir.task_graph import (
    ITEMSIZE,
    SCALE,
    Body,
    Experts,
    Op,
    Ref,
    Role,
    Task,
    TaskGraph,
    Value,
    Weight,
)
from dovetail.ir.verify_scales import check_scales

EXTERNAL = ("input_ids", "position_ids")
"""Inputs that come from outside of the model."""
_SEAMS = {
    "dovetail.experts": (Role.EXPERTS, 3, 1),
    "dovetail.kv_update": (Role.KV, 2, 2),
}
"""Operators that stand alone in a task of this role, how many tensors they take and give."""
_TOKENWISE = frozenset({"seqs", "tokens"})
_AXES: Mapping[Role, frozenset[str]] = {
    Role.ATTENTION: frozenset({"seqs"}),
    Role.KV: frozenset({"seqs"}),
    Role.EXPERTS: frozenset({"tokens", "experts"}),
}
_PARTS = frozenset({"gate", "up", "gate_up", "down"})


def verify_graph(graph: TaskGraph) -> None:
    """Raise VerifyError, naming body, task, operator and name, unless the graph is legal."""
    bodies = (graph.prologue, *graph.bodies, graph.epilogue)
    _unique([body.name for body in bodies], "the graph", "body")
    for layer, index in enumerate(graph.layers):
        if not 0 <= index < len(graph.bodies):
            raise VerifyError(
                f"layer {layer} runs body {index}, expected one of 0..{len(graph.bodies) - 1}"
            )
    if not graph.layers:
        raise VerifyError("the graph has no layers, expected at least one")
    for name, value in graph.constants.items():
        _check_value(f"constant {name}", value)
    for body in bodies:
        _check_body(graph, body)
    for body in (*graph.bodies, graph.epilogue):
        _check_inputs(graph, body)


def _check_body(graph: TaskGraph, body: Body) -> None:
    where = body.name
    _unique([task.name for task in body.tasks], where, "task")
    _unique(body.inputs, where, "input")
    for name, value in body.values.items():
        _check_value(f"{where}: value {name}", value)
    known = dict.fromkeys(body.inputs)
    if body is not graph.prologue:
        known |= dict.fromkeys(graph.shared)
    for name in body.inputs:
        _need_shape(body, where, name)
    for task in body.tasks:
        _check_task(graph, body, task, known)
        known |= dict.fromkeys(name for op in task.ops for name in op.outs)
    made = {name for task in body.tasks for op in task.ops for name in op.outs}
    ends = {"output": body.outputs, "shared value": graph.shared}
    for what, names in ends.items():
        for name in names if what == "output" or body is graph.prologue else ():
            if name not in made:
                raise VerifyError(f"{where}: {what} {name} is made by no task of the body")
    _check_flow(graph, body)
    for what, tasks in (
        ("experts", [t.name for t in body.tasks if t.role is Role.EXPERTS]),
        ("kv", [t.name for t in body.tasks if t.role is Role.KV]),
    ):
        if len(tasks) > (1 if body in graph.bodies else 0):
            most = "at most one" if body in graph.bodies else "none outside of layers"
            raise VerifyError(f"{where}: {what} tasks {', '.join(tasks)}, expected {most}")


def _check_task(graph: TaskGraph, body: Body, task: Task, known: Mapping[str, None]) -> None:
    where = f"{body.name}.{task.name}"
    weights = {weight.fqn for weight in task.weights}
    _unique([weight.fqn for weight in task.weights], where, "weight")
    for weight in task.weights:
        _check_weight(where, weight, in_layer=body in graph.bodies)
    made: set[str] = set()
    used: dict[str, None] = {}
    for op in task.ops:
        at = f"{where}: {op.target}"
        for name in op.uses():
            if not (name in known or name in made or name in weights or name in graph.constants):
                raise VerifyError(f"{at} uses {name}, {_why_unknown(body, name)}")
            used[name] = None
        for name in op.outs:
            if name in known or name in made or name in weights or name in graph.constants:
                raise VerifyError(f"{at} makes {name}, which is already defined")
            _need_shape(body, at, name)
            made.add(name)
    idle = weights - set(used)
    if idle:
        raise VerifyError(f"{where}: weight {min(idle)} is used by none of the task's operators")
    _same_names(f"{where}: reads", task.reads, {n for n in used if n in known and n not in made})
    wrong = [axis for axis in task.axes if axis not in _AXES.get(task.role, _TOKENWISE)]
    if wrong:
        allowed = ", ".join(sorted(_AXES.get(task.role, _TOKENWISE)))
        raise VerifyError(f"{where}: axis {wrong[0]}, expected for {task.role}: {allowed}")
    _check_seam(where, task)


def _why_unknown(body: Body, name: str) -> str:
    for task in body.tasks:
        if name in {weight.fqn for weight in task.weights}:
            return f"a weight of {task.name}; expected it among this task's weights"
        if any(name in op.outs for op in task.ops):
            return f"which {task.name} makes only later; expected it before its use"
    return "expected a value made before, a weight of the task, a constant or an input of the body"


def _check_flow(graph: TaskGraph, body: Body) -> None:
    """What tasks say they write is what is read after them."""
    later = set(body.outputs)
    if body is graph.prologue:
        later |= set(graph.shared)
    for task in reversed(body.tasks):
        made = {name for op in task.ops for name in op.outs}
        _same_names(f"{body.name}.{task.name}: writes", task.writes, made & later)
        later |= set(task.reads)


def _check_seam(where: str, task: Task) -> None:
    for op in task.ops:
        role, takes, gives = _SEAMS.get(op.target, (None, 0, 0))
        if role is None:
            continue
        if task.role is not role or len(task.ops) != 1:
            raise VerifyError(
                f"{where}: {op.target} among {len(task.ops)} operators of a task of role "
                f"{task.role}, expected it alone in a task of role {role}"
            )
        refs = sum(isinstance(arg, Ref) for arg in op.args)
        if (refs, len(op.args), len(op.outs)) != (takes, takes, gives):
            raise VerifyError(
                f"{where}: {op.target} takes {refs} tensors and gives {len(op.outs)}, expected "
                f"{takes} and {gives}"
            )
    for name, spec, role in (("experts", task.experts, Role.EXPERTS), ("kv", task.kv, Role.KV)):
        if (spec is not None) != (task.role is role):
            found = "a description" if spec else "no description"
            raise VerifyError(
                f"{where}: {found} of {name} on a task of role {task.role}, expected one exactly "
                f"on tasks of role {role}"
            )
        if task.role is role and not any(
            _SEAMS.get(op.target, (None,))[0] is role for op in task.ops
        ):
            seam = next(target for target, (r, _, _) in _SEAMS.items() if r is role)
            raise VerifyError(f"{where}: a task of role {role} without {seam}, expected that alone")
    if task.experts is not None:
        _check_experts(where, task.experts)


def _check_experts(where: str, experts: Experts) -> None:
    if not 1 <= experts.top_k <= experts.count:
        raise VerifyError(
            f"{where}: top {experts.top_k} of {experts.count} experts, expected 1..{experts.count}"
        )
    parts = [tensor.part for tensor in experts.tensors]
    _unique(parts, where, "part")
    plain = {part.removesuffix("_bias").removesuffix(SCALE) for part in parts}
    check_scales(where, experts)
    if not plain <= _PARTS or {p for p in parts if p in _PARTS} not in (
        {"gate", "up", "down"},
        {"gate_up", "down"},
        {"up", "down"},
    ):
        raise VerifyError(
            f"{where}: experts made of {', '.join(parts)}, expected gate, up and down, or gate_up "
            "and down, or up and down, each with or without its _bias"
        )
    for tensor in experts.tensors:
        _check_sizes(f"{where}: {tensor.key}", tensor.shape, tensor.dtype)
        if "{layer}" not in tensor.key:
            raise VerifyError(f"{where}: key {tensor.key}, expected {{layer}} in it")
    known = {"g", "u"} if experts.split_gate else {"h"}
    for op in experts.activation:
        _check_activation(where, op, known)
    if "a" not in known:
        raise VerifyError(f"{where}: the activation does not make a, the input of down")


def _check_activation(where: str, op: Op, known: set[str]) -> None:
    for name in op.uses():
        if name not in known:
            raise VerifyError(
                f"{where}: {op.target} of the activation uses {name}, expected one of "
                f"{', '.join(sorted(known))}"
            )
    known.update(op.outs)


def _check_inputs(graph: TaskGraph, body: Body) -> None:
    """A body's first inputs are the carried state, the others shared values or external."""
    before = graph.prologue
    carried = body.inputs[: len(before.outputs)]
    if len(carried) < len(before.outputs):
        raise VerifyError(
            f"{body.name}: inputs {', '.join(body.inputs) or 'none'}, expected to begin with the "
            f"{len(before.outputs)} carried from {before.name}"
        )
    for name in body.inputs[len(carried) :]:
        if name not in graph.shared and name not in EXTERNAL:
            raise VerifyError(
                f"{body.name}: input {name} is neither carried nor shared, expected one of "
                f"{', '.join((*graph.shared, *EXTERNAL))}"
            )
    for source in (graph.prologue, *graph.bodies):
        if len(source.outputs) != len(carried):
            raise VerifyError(
                f"{source.name}: {len(source.outputs)} outputs, expected the {len(carried)} that "
                f"{body.name} takes"
            )
        for out, name in zip(source.outputs, carried, strict=True):
            _same_value(f"{body.name}: input {name}", body.values[name], source, out)
    for name in graph.shared:
        if name in body.values:
            _same_value(f"{body.name}: shared {name}", body.values[name], graph.prologue, name)


def _same_value(where: str, found: Value, source: Body, name: str) -> None:
    expected = source.values[name]
    if found != expected:
        raise VerifyError(
            f"{where} is {value_text(found)}, expected {value_text(expected)} as {source.name} "
            f"makes {name}"
        )


def _check_weight(where: str, weight: Weight, *, in_layer: bool) -> None:
    _check_sizes(f"{where}: weight {weight.fqn}", weight.shape, weight.dtype)
    for name in (weight.fqn, weight.key):
        if ("{layer}" in name) != in_layer:
            expected = "{layer} left open inside a layer" if in_layer else "no {layer} outside"
            raise VerifyError(f"{where}: weight {name}, expected {expected}")


def _check_value(where: str, value: Value) -> None:
    _check_dtype(where, value.dtype)
    for size in value.shape:
        foreign = {str(symbol) for symbol in size.free_symbols} - set(DIMS)
        if foreign:
            raise VerifyError(
                f"{where}: shape {value_text(value)} holds {min(foreign)}, expected the dims "
                f"{', '.join(DIMS)}"
            )


def _check_sizes(where: str, shape: Sequence[int], dtype: str) -> None:
    _check_dtype(where, dtype)
    if any(size < 1 for size in shape):
        raise VerifyError(f"{where}: shape {list(shape)}, expected sizes of at least 1")


def _check_dtype(where: str, dtype: str) -> None:
    if dtype not in ITEMSIZE:
        raise VerifyError(f"{where}: dtype {dtype}, expected one of {', '.join(ITEMSIZE)}")


def _need_shape(body: Body, where: str, name: str) -> None:
    if name not in body.values:
        raise VerifyError(f"{where}: {name} has no shape, expected it in the values of the body")


def _same_names(where: str, found: Sequence[str], expected: Iterable[str]) -> None:
    if len(found) != len(set(found)) or set(found) != set(expected):
        raise VerifyError(
            f"{where} {', '.join(found) or 'nothing'}, expected "
            f"{', '.join(sorted(expected)) or 'nothing'} from its operators"
        )


def _unique(names: Sequence[str], where: str, what: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise VerifyError(f"{where}: {what} {twice[0]} occurs twice, expected names to be unique")


def value_text(value: Value) -> str:
    """Shape and dtype: ``[seqs, q_len, 64] float32``."""
    return f"[{', '.join(map(str, value.shape))}] {value.dtype}"
