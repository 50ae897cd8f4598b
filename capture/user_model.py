"""A user's own module to one traced graph: recognised experts as one operator, and what cannot be
traced as coarse tasks, each with a warning that says why."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dovetail.capture import seams, whole
from dovetail.capture.user_moe import UserMoe, as_experts_tasks, find_user_moe
from dovetail.ir.errors import CaptureError

_LOG = logging.getLogger(__name__)
_OPERATORS = (seams.experts, whole.module)
"""The operators that stay opaque; naming them here registers them."""
_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)
_MOST_COARSE = 32


@dataclass(frozen=True, slots=True)
class UserGraph:
    """A traced module: ``experts`` are the blocks that became one ``dovetail::experts`` each, and
    ``coarse`` the modules that became one ``dovetail::module``, with the reason."""

    program: ExportedProgram
    experts: tuple[UserMoe, ...]
    coarse: Mapping[str, str]


def trace_user_module(module: nn.Module, *inputs: Tensor) -> UserGraph:
    """Trace ``module`` as it runs on ``inputs``, any first size. Raises CaptureError where neither
    the module nor coarser tasks can be traced; the message names the module."""
    refuse_what_changes(module)
    experts, notes = find_user_moe(module)
    for note in notes:
        _LOG.warning("%s", note)
    coarse: dict[str, str] = {}
    free = tuple({0: Dim.AUTO} if x.dim() else {} for x in inputs)
    while True:
        outer = [moe for moe in experts if not _inside(moe.path, coarse)]
        try:
            with torch.no_grad(), as_experts_tasks(module, outer), _coarse(module, coarse):
                program = torch.export.export(module, inputs, dynamic_shapes=free, strict=False)
            return UserGraph(program, tuple(outer), coarse)
        except _ERRORS as error:
            path = _culprit(module, error, coarse)
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if not path or len(coarse) == _MOST_COARSE:
                raise CaptureError(
                    f"{type(module).__name__} cannot be traced: {reason}. Its own forward decides "
                    "by data or changes state: expected tensors to flow through submodules alone; "
                    "move that part into a submodule, which then runs as one task"
                ) from error
            _check_shape(module, path, inputs)
            _LOG.warning(
                "module %s (%s) runs as one coarse task: %s",
                path,
                type(module.get_submodule(path)).__name__,
                reason,
            )
            coarse[path] = reason


def refuse_what_changes(module: nn.Module) -> None:
    """Raise CaptureError for what a schedule would run out of order: hooks, and modules in
    training that change their buffers."""
    for path, inner in module.named_modules():
        where = f"module {path or 'root'} ({type(inner).__name__})"
        if inner._forward_hooks or inner._forward_pre_hooks or inner._backward_hooks:
            raise CaptureError(
                f"{where} has hooks, which a graph does not hold: remove them "
                "(the handle that registered each has remove()) before compiling"
            )
        tracks = getattr(inner, "track_running_stats", False)
        if tracks and inner.training:
            raise CaptureError(
                f"{where} changes its buffers while it runs (track_running_stats in training "
                "mode); expected a module in evaluation mode: call .eval() first"
            )


def _inside(path: str, coarse: Mapping[str, str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in coarse)


@contextmanager
def _coarse(module: nn.Module, paths: Mapping[str, str]) -> Iterator[None]:
    for path in paths:
        inner = module.get_submodule(path)
        inner.forward = _operator(path, inner)
    try:
        yield
    finally:
        for path in paths:
            del module.get_submodule(path).forward


def _operator(path: str, inner: nn.Module) -> Any:
    original = inner.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not tensors or len(tensors) != len(given):
            raise CaptureError(
                f"module {path} ({type(inner).__name__}) cannot be traced and gets more than "
                "tensors, so that it cannot run as one task either; pass it tensors only"
            )
        call = json.dumps({"call": {}, "outs": [_like(tensors[0])], "places": [0]})
        (out,) = torch.ops.dovetail.module(tensors, path, call)
        return out  # type: ignore[no-any-return]

    forward.__wrapped__ = original  # type: ignore[attr-defined]
    return forward


def _check_shape(module: nn.Module, path: str, inputs: tuple[Tensor, ...]) -> None:
    """Raise CaptureError unless the module at ``path`` gives one tensor like its first input."""
    inner = module.get_submodule(path)
    seen: list[tuple[Any, Any]] = []
    hook = inner.register_forward_hook(lambda _, given, out: seen.append((given, out)))
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        hook.remove()
    for given, out in seen:
        first = next((value for value in given if isinstance(value, Tensor)), None)
        alike = isinstance(out, Tensor) and first is not None
        if not alike or (out.shape, out.dtype) != (first.shape, first.dtype):  # type: ignore[union-attr]
            found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise CaptureError(
                f"module {path} ({type(inner).__name__}) cannot be traced, and cannot run as one "
                f"task either: it returns {found}, expected one tensor like its first input; give "
                "the part that decides by data a module of its own"
            )


def _like(x: Tensor) -> tuple[list[int | str], str]:
    """The shape of ``x`` with its first two sizes left open, as the operator takes it."""
    first: list[int | str] = ["seqs", "q_len"]
    sizes = [*first, *(int(s) for s in x.shape[2:])]
    return sizes[: x.dim()], str(x.dtype).removeprefix("torch.")


def _culprit(module: nn.Module, error: BaseException, coarse: Mapping[str, str]) -> str:
    """The innermost submodule that was running when ``error`` was raised, "" for none."""
    names = {id(inner): name for name, inner in module.named_modules()}
    found = ""
    step: TracebackType | None = error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        name = names.get(id(owner), "") if isinstance(owner, nn.Module) else ""
        if name and not _inside(name, coarse):
            found = name
        step = step.tb_next
    return found
