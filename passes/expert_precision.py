"""Experts in fewer bits: `task graph, format -> task graph` of the same model.

A converted checkpoint holds what such a graph reads (`dovetail convert`): each expert's matrices in
whole numbers, every one followed by its float32 scales, and its biases as they are. The formats are
those of the GPU kernels (``ir.kernel_parts.Weights``): int8 has a scale for each output and lies
``[in, out]``, which oneDNN multiplies with a fifth faster than ``[out, in]``; int4, two to a byte,
has one for each output and ``GROUP`` inputs and lies ``[out, in]``.
"""

from collections.abc import Iterator
from dataclasses import replace

from dovetail.ir.codec import digest
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_parts import Weights
from dovetail.ir.moves import ExpertFormat, precision_of
from dovetail.ir.plan import Plan
from dovetail.ir.task_graph import ITEMSIZE, SCALE, Body, Experts, ExpertTensor, TaskGraph

GROUP = 32
"""Inputs that share a scale of int4."""
KEY = "dovetail.layers.{{layer}}.experts.{{expert}}.{part}"


_MADE: dict[tuple[int, ExpertFormat], tuple[TaskGraph, TaskGraph]] = {}
"""The last graphs made, with what they were made of: a search asks for the same one all the time,
and costs are remembered by body."""
_KEPT = 8


def with_precision(graph: TaskGraph, form: ExpertFormat) -> TaskGraph:
    """The graph with its routed experts' matrices in ``form``. Raises InputError for one that has
    none or computes in 32 bits, or whose matrices do not divide into groups."""
    key = id(graph), form
    if key not in _MADE or _MADE[key][0] is not graph:
        made = _with_precision(graph, form)
        while len(_MADE) >= _KEPT:
            _MADE.pop(next(iter(_MADE)))
        _MADE[key] = graph, made
    return _MADE[key][1]


def _with_precision(graph: TaskGraph, form: ExpertFormat) -> TaskGraph:
    if ITEMSIZE[graph.dtype] != 2:
        raise InputError(
            f"{form} experts: the model computes in {graph.dtype}, expected 16 bits: convert the "
            f"checkpoint to bfloat16 first, or leave {form} out"
        )
    bodies = tuple(_body(body, form) for body in graph.bodies)
    if bodies == graph.bodies:
        raise InputError(
            f"{form} experts: the model has no routed experts whose matrices dovetail reads; leave "
            f"{form} out"
        )
    return replace(graph, bodies=bodies)


def settled(graph: TaskGraph, plan: Plan) -> tuple[TaskGraph, Plan]:
    """A plan whose experts are in fewer bits as a plan for the graph that has them so, which can be
    solved again; other plans as they are."""
    form = precision_of(plan.moves)
    if form is None:
        return graph, plan
    made = with_precision(graph, form)
    return made, replace(plan, graph=digest(made), moves=plan.moves[1:])


def weights_of(form: ExpertFormat) -> Weights:
    """The format as kernels and their quantiser name it."""
    return Weights(form, "nk", scale_k=GROUP) if form == "int4" else Weights(form, "kn")


def _body(body: Body, form: ExpertFormat) -> Body:
    tasks = tuple(
        task if task.experts is None else replace(task, experts=_experts(task.experts, form))
        for task in body.tasks
    )
    return replace(body, tasks=tasks)


def _experts(experts: Experts, form: ExpertFormat) -> Experts:
    if experts.precision:
        raise InputError(f"{form} experts: the model's experts are in fewer bits already")
    tensors = tuple(made for tensor in experts.tensors for made in _tensors(experts, tensor, form))
    return replace(experts, tensors=tensors, transposed=False)


def _tensors(experts: Experts, tensor: ExpertTensor, form: ExpertFormat) -> Iterator[ExpertTensor]:
    key = KEY.format(part=tensor.part)
    if len(tensor.shape) != 2:
        yield replace(tensor, key=key)
        return
    out, inputs = tensor.shape
    if experts.transposed or tensor.transposed:
        out, inputs = inputs, out
    if form == "int8":
        shapes: tuple[tuple[int, ...], ...] = ((inputs, out), (out,))
    else:
        if inputs % GROUP:
            raise InputError(
                f"int4 experts: {tensor.part} has {inputs} inputs, expected a multiple of {GROUP}, "
                "which share a scale; allow int8 instead"
            )
        shapes = ((out, inputs // 2), (out, inputs // GROUP))
    dtype = "int8" if form == "int8" else "uint8"
    yield ExpertTensor(tensor.part, key, shapes[0], dtype)
    yield ExpertTensor(tensor.part + SCALE, key + SCALE, shapes[1], "float32")
