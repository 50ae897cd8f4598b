"""The description of a layer's routed experts, with their activation traced to operators."""

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from dovetail.capture.checkpoint_names import CheckpointNames
from dovetail.capture.clean import clean, name_of
from dovetail.capture.export import Symbols
from dovetail.capture.lower import Lowering, is_tensor_op
from dovetail.ir.errors import CaptureError
from dovetail.ir.expr import Q_LEN, SEQS
from dovetail.ir.task_graph import Arg, Experts, ExpertTensor, Op, Ref

_ROWS = 11
_SPLITS = ("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default")


class _Activation(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, so that the expert weights stay out of the trace

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self._module[0]._apply_gate(h)
        return out


def describe(
    module: nn.Module, fqn: str, top_k: int, layer: int, names: CheckpointNames
) -> Experts:
    """The experts of ``module`` named ``fqn`` in ``layer``; raises CaptureError if unknown."""
    config: Any = module
    if getattr(config, "has_post_expert_norm", False):
        raise CaptureError(f"{fqn} has a norm after each expert, which is not supported yet")
    if not getattr(config, "has_gate", False):
        raise CaptureError(f"{fqn} has experts without a gate, which are not supported yet")
    transposed = bool(config.is_transposed)
    up, down = config.gate_up_proj, config.down_proj
    count, hidden = up.shape[0], up.shape[1] if transposed else up.shape[2]
    wide = up.shape[2] if transposed else up.shape[1]
    activation, split = trace_activation(module, fqn, int(wide), up.dtype)
    tensors = [*_tensors("gate_up", f"{fqn}.gate_up_proj", up, layer, names)]
    tensors += _tensors("down", f"{fqn}.down_proj", down, layer, names)
    if config.has_bias:
        for part in ("gate_up", "down"):
            name = f"{part}_proj_bias"
            tensors += _tensors(
                f"{part}_bias", f"{fqn}.{name}", getattr(config, name), layer, names
            )
    separate = any(t.part == "gate" for t in tensors)
    if separate and not split:
        raise CaptureError(
            f"{fqn}: the checkpoint keeps gate and up apart but the activation does not take them "
            "as two halves"
        )
    return Experts(
        int(count),
        top_k,
        int(hidden),
        int(wide) // 2,
        tuple(tensors),
        activation,
        split,
        transposed,
    )


def _tensors(
    part: str, fqn: str, weight: Tensor, layer: int, names: CheckpointNames
) -> list[ExpertTensor]:
    keys = names.source(fqn, layer).keys
    shape = tuple(int(s) for s in weight.shape[1:])
    dtype = str(weight.dtype).removeprefix("torch.")
    if len(keys) == 1:
        return [ExpertTensor(part, keys[0], shape, dtype)]
    half = (shape[0] // 2, *shape[1:])
    parts = ("gate", "up") if part == "gate_up" and len(keys) == 2 else None
    if parts is None or not all("{expert}" in key for key in keys):
        raise CaptureError(f"{fqn} is stored as {', '.join(keys)}, which dovetail cannot read")
    return [ExpertTensor(p, k, half, dtype) for p, k in zip(parts, keys, strict=True)]


def trace_activation(
    module: nn.Module, fqn: str, wide: int, dtype: torch.dtype
) -> tuple[tuple[Op, ...], bool]:
    """Operators from ``h`` (or its halves ``g``, ``u``) to ``a``, and whether it takes halves."""
    h = torch.empty(_ROWS, wide, dtype=dtype, device="meta")
    with torch.no_grad():
        program = torch.export.export(
            _Activation(module), (h,), dynamic_shapes=({0: Dim.AUTO},), strict=False
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
