"""Experts in fewer bits: `task graph, format -> task graph` of the same model.

A converted checkpoint holds what such a graph reads (`dovetail convert`): each expert's matrices in
whole numbers, ``[out, in]`` whatever they were, every one followed by its float32 scales, and its
biases as they are. The formats are those of the GPU kernels (``ir.kernel_parts.Weights``, order
nk): int8 has a scale for each output, int4 (two to a byte) one for each output and ``GROUP``
inputs.
"""

from collections.abc import Iterator
from dataclasses import replace

from dovetail.ir.errors import InputError
from dovetail.ir.kernel_parts import Weights
from dovetail.ir.moves import ExpertFormat
from dovetail.ir.task_graph import Body, Experts, ExpertTensor, TaskGraph

GROUP = 64
"""Inputs that share a scale of int4."""
KEY = "dovetail.layers.{{layer}}.experts.{{expert}}.{part}"
SCALE = "_scale"
"""What the name of a matrix's scales ends with."""


def with_precision(graph: TaskGraph, form: ExpertFormat) -> TaskGraph:
    """The graph with its routed experts' matrices in ``form``. Raises InputError for one that has
    none, or whose matrices do not divide into groups."""
    bodies = tuple(_body(body, form) for body in graph.bodies)
    if bodies == graph.bodies:
        raise InputError(
            f"{form} experts: the model has no routed experts whose matrices dovetail reads; leave "
            f"--allow {form} out"
        )
    return replace(graph, bodies=bodies)


def weights_of(form: ExpertFormat) -> Weights:
    """The format as kernels and their quantiser name it."""
    return Weights(form, scale_k=GROUP if form == "int4" else 0)


def _body(body: Body, form: ExpertFormat) -> Body:
    tasks = tuple(
        task if task.experts is None else replace(task, experts=_experts(task.experts, form))
        for task in body.tasks
    )
    return replace(body, tasks=tasks)


def _experts(experts: Experts, form: ExpertFormat) -> Experts:
    if any(tensor.part.endswith(SCALE) for tensor in experts.tensors):
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
        shapes: tuple[tuple[int, ...], ...] = ((out, inputs), (out,))
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
