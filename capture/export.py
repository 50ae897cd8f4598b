"""From a model on the meta device to one traced graph with symbolic sizes."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.numbers import int_oo
from transformers import PreTrainedModel

from dovetail.capture.layers import Stack, one_of_each
from dovetail.capture.positions import positions_of
from dovetail.capture.seams import kv_cache, seams
from dovetail.capture.whole import Whole, cache_takers, find_whole, learn, stay_whole
from dovetail.ir.errors import CaptureError
from dovetail.ir.expr import PAST, Q_LEN, SEQS, Expr

_LOG = logging.getLogger(__name__)
_TRACED = {"seqs": 3, "q_len": 13, "past": 7}
_DRY = ((3, 13), (5, 29))
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
    non-persistent buffers, ``lifted`` to the data of constants made in forward. ``wholes`` are the
    modules that stayed whole, by path.
    """

    graph: fx.Graph
    symbols: Symbols
    weights: Mapping[str, str]
    buffers: Mapping[str, str]
    lifted: Mapping[str, Tensor]
    wholes: Mapping[str, Whole] = field(default_factory=dict)


class _Pass(nn.Module):
    """One pass of a language model: prompts or single tokens in, logits out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.lm = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, past: Tensor) -> Tensor:
        """``input_ids``, ``position_ids`` [seqs, q_len]; only the size of ``past`` counts."""
        seqs, q_len = input_ids.shape
        torch._check(position_ids.shape[0] == seqs)  # type: ignore[no-untyped-call]
        torch._check(position_ids.shape[1] == q_len)  # type: ignore[no-untyped-call]
        with positions_of(position_ids):
            out = self.lm(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=kv_cache(self.lm, past.shape[0]),
                use_cache=True,
            )
        logits: Tensor = out.logits
        return logits


def trace(model: PreTrainedModel, stack: Stack) -> Traced:
    """Trace one pass over one layer of each kind; raises CaptureError where that fails.

    Modules with a state of their own stay whole, and so does attention that no seam describes.
    """
    wholes = find_whole(model, stack)
    while True:
        try:
            return _trace(model, stack, wholes)
        except (*_TRACE_ERRORS, CaptureError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            found = _fallback(model, stack, wholes, error)
            if not found:
                if isinstance(error, CaptureError):
                    raise
                raise CaptureError(
                    f"model type {model.config.model_type!r} cannot be traced: "
                    f"{_where(model, error)}: {reason}"
                ) from error
            kind = type(model.get_submodule(found[0])).__name__
            _LOG.warning("%s runs as whole modules, not operators (%s)", kind, reason)
            wholes |= {path: Whole(path, why=reason) for path in found}


def _fallback(
    model: PreTrainedModel, stack: Stack, wholes: Mapping[str, Whole], error: BaseException
) -> list[str]:
    """The modules of the failing one's class, if it takes the cache and was not whole yet."""
    running = {id(module) for module in _running(error)}
    takers = {p: m for p, m in cache_takers(model, stack).items() if p not in wholes}
    failed = {type(module) for module in takers.values() if id(module) in running}
    return [path for path, module in takers.items() if type(module) in failed]


def _running(error: BaseException) -> list[nn.Module]:
    """The modules that were running when ``error`` was raised, outermost first."""
    found: list[nn.Module] = []
    step: TracebackType | None = error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found.append(owner)
        step = step.tb_next
    return found


def _trace(model: PreTrainedModel, stack: Stack, wholes: dict[str, Whole]) -> Traced:
    new = {path: whole for path, whole in wholes.items() if not whole.runs}
    known = {path: whole for path, whole in wholes.items() if whole.runs}
    for seqs, q_len in _DRY if new else ():
        with _tracing(model, stack, known) as within:
            within.enter_context(stay_whole(model, new, dry=True))
            _Pass(model)(**_inputs(seqs, q_len, 0))
    for whole in new.values():
        if len(whole.runs) == len(_DRY):
            learn(whole)
    inputs = _inputs(_TRACED["seqs"], _TRACED["q_len"], _TRACED["past"])
    free = {name: dict.fromkeys(range(x.dim()), Dim.AUTO) for name, x in inputs.items()}
    with _tracing(model, stack, wholes):
        program = torch.export.export(_Pass(model), (), inputs, dynamic_shapes=free, strict=False)
    return _traced(program, wholes)


def _inputs(seqs: int, q_len: int, past: int) -> dict[str, Tensor]:
    ids = torch.zeros((seqs, q_len), dtype=torch.long, device="meta")
    return {
        "input_ids": ids,
        "position_ids": ids.clone(),
        "past": torch.zeros(past, device="meta"),
    }


def _tracing(model: PreTrainedModel, stack: Stack, wholes: dict[str, Whole]) -> ExitStack:
    """Everything that stands in for something while the model runs for us."""
    within = ExitStack()
    within.enter_context(torch.no_grad())
    within.enter_context(seams(model))
    within.enter_context(one_of_each(model, stack))
    within.enter_context(stay_whole(model, wholes, dry=False))
    return within


def _where(model: nn.Module, error: BaseException) -> str:
    """Name and class of the innermost module that was running when ``error`` was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    inside = [module for module in _running(error) if id(module) in names]
    if not inside:
        return "outside the model's modules"
    return f"module {names[id(inside[-1])] or 'root'} ({type(inside[-1]).__name__})"


def _traced(program: ExportedProgram, wholes: Mapping[str, Whole]) -> Traced:
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
        wholes,
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
