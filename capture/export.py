"""From a model on the meta device to one traced graph with symbolic sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.numbers import int_oo
from transformers import PreTrainedModel

from dovetail.capture.layers import Stack, one_of_each
from dovetail.capture.seams import kv_cache, seams
from dovetail.ir.errors import CaptureError
from dovetail.ir.expr import PAST, Q_LEN, SEQS, Expr

_TRACED = {"seqs": 3, "q_len": 13, "past": 7}
_PREFIX = "lm."
_TRACE_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    KeyError,
    IndexError,
    NotImplementedError,
)


class Symbols:
    """Renames the exporter's size symbols to our dims and its functions to plain sympy."""

    def __init__(self, names: Mapping[sympy.Symbol, Expr]) -> None:
        self._names = dict(names)

    def size(self, value: Any) -> Expr:
        """A traced size (int or SymInt) as an expression in the dims."""
        return sympy.Integer(value) if isinstance(value, int) else self._plain(value.node.expr)

    def shape(self, tensor: Tensor) -> tuple[Expr, ...]:
        """The shape of a traced tensor."""
        return tuple(self.size(s) for s in tensor.shape)

    def _plain(self, expr: Any) -> Expr:
        if expr.is_Symbol:
            if expr not in self._names:
                raise CaptureError(
                    f"a tensor size depends on data (symbol {expr}); sizes must follow from the "
                    "numbers of sequences, new tokens and past tokens"
                )
            return self._names[expr]
        if expr.is_Integer:
            return sympy.Integer(int(expr))
        build = _FUNCTIONS.get(type(expr).__name__)
        if build is None:
            raise CaptureError(
                f"the size {expr} uses {type(expr).__name__}, which has no plain form"
            )
        return build(*(self._plain(arg) for arg in expr.args))


_FUNCTIONS: Mapping[str, Any] = {
    "Add": sympy.Add,
    "Mul": sympy.Mul,
    "Pow": sympy.Pow,
    "FloorDiv": lambda a, b: sympy.floor(a / b),
    "CleanDiv": lambda a, b: a / b,
    "CeilDiv": lambda a, b: sympy.ceiling(a / b),
    "Mod": sympy.Mod,
    "PythonMod": sympy.Mod,
    "Max": sympy.Max,
    "Min": sympy.Min,
}


@dataclass(frozen=True, slots=True)
class Traced:
    """A traced graph: names of weights and constants by placeholder, and how sizes are spelled.

    ``weights`` maps placeholder names to parameter or persistent buffer names, ``buffers`` to
    non-persistent buffers, ``lifted`` to the data of constants made in forward.
    """

    graph: fx.Graph
    symbols: Symbols
    weights: Mapping[str, str]
    buffers: Mapping[str, str]
    lifted: Mapping[str, Tensor]


class _Pass(nn.Module):
    """One pass of a language model: prompts or single tokens in, logits out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.lm = model
        self.layers = model.config.get_text_config().num_hidden_layers

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor) -> Tensor:
        """``input_ids``, ``position_ids`` [seqs, q_len]; only the size of ``past`` counts."""
        seqs, q_len = input_ids.shape
        torch._check(position_ids.shape[0] == seqs)  # type: ignore[no-untyped-call]
        torch._check(position_ids.shape[1] == q_len)  # type: ignore[no-untyped-call]
        out = self.lm(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=kv_cache(self.layers, past.shape[0]),
            use_cache=True,
        )
        logits: Tensor = out.logits
        return logits


def trace(model: PreTrainedModel, stack: Stack) -> Traced:
    """Trace one pass over one layer of each kind; raises CaptureError where that fails."""
    shape = (_TRACED["seqs"], _TRACED["q_len"])
    inputs = {
        "input_ids": torch.zeros(shape, dtype=torch.long, device="meta"),
        "position_ids": torch.zeros(shape, dtype=torch.long, device="meta"),
        "past": torch.zeros(_TRACED["past"], device="meta"),
    }
    free = {name: dict.fromkeys(range(x.dim()), Dim.AUTO) for name, x in inputs.items()}
    try:
        with torch.no_grad(), seams(model), one_of_each(model, stack):
            program = torch.export.export(
                _Pass(model), (), inputs, dynamic_shapes=free, strict=False
            )
    except _TRACE_ERRORS as error:
        raise CaptureError(
            f"model type {model.config.model_type!r} cannot be traced: {_where(model, error)}: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        ) from error
    return _traced(program)


def _where(model: nn.Module, error: BaseException) -> str:
    """Name and class of the innermost module that was running when ``error`` was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found = "outside the model's modules"
    step: TracebackType | None = error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = f"module {names[id(owner)] or 'root'} ({type(owner).__name__})"
        step = step.tb_next
    return found


def _traced(program: ExportedProgram) -> Traced:
    signature = program.graph_signature
    transient = set(signature.non_persistent_buffers)
    stored = dict(signature.inputs_to_parameters)
    stored |= {p: b for p, b in signature.inputs_to_buffers.items() if b not in transient}
    buffers = {p: b for p, b in signature.inputs_to_buffers.items() if b in transient}
    lifted = {
        p: program.constants[c] for p, c in signature.inputs_to_lifted_tensor_constants.items()
    }
    return Traced(
        program.graph,
        _symbols(program),
        {p: name.removeprefix(_PREFIX) for p, name in stored.items()},
        {p: name.removeprefix(_PREFIX) for p, name in buffers.items()},
        lifted,
    )


def _symbols(program: ExportedProgram) -> Symbols:
    nodes = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    seqs, q_len = nodes["input_ids"].shape
    (past,) = nodes["past"].shape
    names: dict[sympy.Symbol, Expr] = {}
    for size, dim in ((seqs, SEQS), (q_len, Q_LEN), (past, PAST)):
        symbol = getattr(getattr(size, "node", None), "expr", size)
        if not isinstance(symbol, sympy.Symbol):
            raise CaptureError(
                f"the model works only with {dim} = {symbol}: tracing fixed that size; the graph "
                "must hold for every number of sequences, new tokens and past tokens"
            )
        limits = program.range_constraints.get(symbol)
        if limits is not None and limits.upper != int_oo:
            raise CaptureError(
                f"the model limits {dim} to {limits.upper}; the graph must hold for any number"
            )
        names[symbol] = dim
    if len(names) < 3:
        raise CaptureError("the model ties its sequence, new-token and past sizes to each other")
    return Symbols(names)
