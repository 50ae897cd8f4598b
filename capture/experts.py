"""The description of a layer's routed experts, with their activation traced to operators."""

from collections.abc import Callable
from dataclasses import replace

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from dovetail.capture.checkpoint_names import CheckpointNames
from dovetail.capture.clean import clean, name_of
from dovetail.capture.export import Symbols
from dovetail.capture.forms import ExpertsForm, form_of
from dovetail.capture.lower import Lowering, is_tensor_op
from dovetail.ir.errors import CaptureError
from dovetail.ir.expr import Q_LEN, SEQS
from dovetail.ir.task_graph import Arg, Experts, ExpertTensor, Op, Ref

_ROWS = 11
_SPLITS = ("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default")


class _Activation(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = (function,)  # in a tuple: a module's weights stay out of the trace

    def forward(self, h: Tensor) -> Tensor:
        return self._function[0](h)


def describe(
    module: nn.Module, fqn: str, top_k: int, layer: int, names: CheckpointNames
) -> Experts:
    """The experts of ``module`` named ``fqn`` in ``layer``; raises CaptureError if unknown."""
    form = form_of(module, fqn)
    sources = {
        part: names.source(f"{fqn}.{name}", layer) for part, (name, _) in form.tensors.items()
    }
    dtype = next(module.parameters()).dtype
    wide, hidden, intermediate = _sizes(form)
    activation = form.activation
    if any(source.interleaved for source in sources.values()):
        activation = _from_interleaved(activation, wide)
    ops, split = trace_activation(activation, fqn, wide, dtype)
    tensors = [
        tensor
        for part, (name, shape) in form.tensors.items()
        for tensor in _tensors(
            part, f"{fqn}.{name}", shape, sources[part].keys, module.get_parameter(name).dtype
        )
    ]
    matrices = {t.part for t in tensors if not t.part.endswith("_bias")}
    everything = matrices <= form.transposed
    if not everything:
        tensors = [replace(t, transposed=t.part in form.transposed) for t in tensors]
    if any(t.part == "gate" for t in tensors) and not split:
        raise CaptureError(
            f"{fqn}: the checkpoint keeps gate and up apart but the activation does not take them "
            "as two halves"
        )
    return Experts(form.count, top_k, hidden, intermediate, tuple(tensors), ops, split, everything)


def _sizes(form: ExpertsForm) -> tuple[int, int, int]:
    """What comes out of gate and up, and an expert's hidden and intermediate size."""

    def out_in(part: str) -> tuple[int, int]:
        rows, columns = form.tensors[part][1]
        return (columns, rows) if part in form.transposed else (rows, columns)

    hidden, intermediate = out_in("down")
    wide = sum(out_in(part)[0] for part in ("gate_up", "gate", "up") if part in form.tensors)
    return wide, hidden, intermediate


def _from_interleaved(
    activation: Callable[[Tensor], Tensor], wide: int
) -> Callable[[Tensor], Tensor]:
    """``activation`` for a checkpoint whose rows of gate and up take turns."""

    def reordered(h: Tensor) -> Tensor:
        pairs = h.reshape(*h.shape[:-1], wide // 2, 2)
        return activation(pairs.transpose(-1, -2).flatten(-2))

    return reordered


def _tensors(
    part: str, fqn: str, shape: tuple[int, ...], keys: tuple[str, ...], dtype: torch.dtype
) -> list[ExpertTensor]:
    kind = str(dtype).removeprefix("torch.")
    if len(keys) == 1:
        return [ExpertTensor(part, keys[0], shape, kind)]
    half = (shape[0] // 2, *shape[1:])
    parts = ("gate", "up") if part == "gate_up" and len(keys) == 2 else None
    if parts is None or not all("{expert}" in key for key in keys):
        raise CaptureError(f"{fqn} is stored as {', '.join(keys)}, which dovetail cannot read")
    return [ExpertTensor(p, k, half, kind) for p, k in zip(parts, keys, strict=True)]


def trace_activation(
    function: Callable[[Tensor], Tensor], fqn: str, wide: int, dtype: torch.dtype
) -> tuple[tuple[Op, ...], bool]:
    """Operators from ``h`` (or its halves ``g``, ``u``) to ``a``, and whether it takes halves."""
    h = torch.empty(_ROWS, wide, dtype=dtype, device="meta")
    with torch.no_grad():
        program = torch.export.export(
            _Activation(function), (h,), dynamic_shapes=({0: Dim.AUTO},), strict=False
        )
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise CaptureError(
            f"the activation of {fqn} has weights of its own, which is not supported"
        )
    clean(program.graph)
    rows = inputs[0].meta["val"].shape[0].node.expr
    if not isinstance(rows, sympy.Symbol):
        raise CaptureError(f"the activation of {fqn} works only for {rows} rows")
    symbols = Symbols({rows: SEQS * Q_LEN})
    halves = _halves(inputs[0], wide)
    lowering = Lowering(symbols, {inputs[0]: "h"})
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and is_tensor_op(n)]
    result = next(n for n in program.graph.nodes if n.op == "output").all_input_nodes[0]
    lowering.declare(result, "a")
    ops = tuple(lowering.lower(nodes).values())
    if halves is None:
        return ops, False
    split = next(op for op in ops if op.args and op.args[0] == Ref("h"))
    renamed = dict(zip(split.outs, ("g", "u"), strict=True))
    return tuple(_rename(op, renamed) for op in ops if op is not split), True


def _halves(h: fx.Node, wide: int) -> fx.Node | None:
    """The only reader of ``h`` if it cuts it into two equal contiguous halves."""
    readers = list(h.users)
    if len(readers) != 1 or name_of(readers[0]) not in _SPLITS:
        return None
    widths = [int(v.shape[-1]) for v in readers[0].meta["val"]]
    return readers[0] if widths == [wide // 2, wide // 2] else None


def _rename(op: Op, names: dict[str, str]) -> Op:
    def renamed(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(names.get(arg.name, arg.name))
        return tuple(renamed(a) for a in arg) if isinstance(arg, tuple) else arg

    kwargs = {k: renamed(v) for k, v in op.kwargs.items()}
    return replace(op, args=tuple(renamed(a) for a in op.args), kwargs=kwargs)
