"""The switch in front of a region's forward: a schedule's way while a compiled module runs, its own
otherwise.

A region's class becomes a subclass of the same name with the switch in it, so that every attribute,
hook and parameter stays where it is and the module works as before outside of the compiled one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn

Forward = Callable[..., Any]


class Scheduler(Protocol):
    """What decides how a region is run."""

    def run_region(
        self, module: nn.Module, own: Forward, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """The region's result; ``own`` is its own forward."""


_active: ContextVar[Scheduler | None] = ContextVar("dovetail_schedule", default=None)


@contextmanager
def scheduled_by(scheduler: Scheduler) -> Iterator[None]:
    """Within the block, regions are run by ``scheduler``."""
    token = _active.set(scheduler)
    try:
        yield
    finally:
        _active.reset(token)


def install(module: nn.Module) -> None:
    """Put the switch in front of ``module``'s forward, once."""
    if not hasattr(type(module), "_dovetail_own"):
        kind = type(module)
        if kind not in _kinds:
            _kinds[kind] = _switched(kind)
        module.__class__ = _kinds[kind]


_kinds: dict[type[nn.Module], type[nn.Module]] = {}


def _switched(kind: type[nn.Module]) -> type[nn.Module]:
    own: Forward = kind.forward

    def forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return own(self, *arguments, **options)
        scheduler = _active.get()
        if scheduler is None:
            return own(self, *arguments, **options)
        return scheduler.run_region(self, own, arguments, options)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """A copy, pickled or not, is of the class without the switch."""
        parts = tuple(nn.Module.__reduce_ex__(self, protocol))
        return _blank, (kind,), *parts[2:]

    names = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_dovetail_own": own,
    }
    return type(kind.__name__, (kind,), names)


def _blank(kind: type[nn.Module]) -> nn.Module:
    """A module of ``kind`` without attributes, which a copy is filled into."""
    return object.__new__(kind)
