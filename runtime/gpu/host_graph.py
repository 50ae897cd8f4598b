"""What a CUDA graph is, on the host: tensor operations with the memory they were captured with.

A replay does every operation again, on the same tensors, and leaves its results where they were
left at first. So work that reads a number on the host, makes a tensor of numbers of the host, or
has shapes that depend on what tensors hold gives wrong tokens here as it would on a GPU, or, as far
as it can be seen, is refused.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dovetail.ir.errors import VerifyError

WAITS = (
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique2",
)
"""Operations for which the host waits on a GPU, or which bring it numbers of the host."""
Done = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]
"""An operation, what it was given, and the tensors that it made."""


class HostGraph(TorchDispatchMode):
    """Captures as a context manager, on this thread; ``replay`` does it again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._done: list[Done] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do an operation and keep it, unless all that it made is views."""
        name, given = func.overloadpacket.__name__, dict(kwargs or {})
        if name in WAITS or (name == "index" and _by_truth(args)):
            raise VerifyError(
                f"a step that is captured calls {func}, expected operations for which a GPU's host "
                "need not wait: run it without graphs"
            )
        result = func(*args, **given)
        made = tuple(_tensors(result))
        old = {_place(tensor) for tensor in _tensors((args, given))}
        new = tuple(tensor for tensor in made if _place(tensor) not in old)
        if new or any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments):
            self._done.append((func, args, given, new))
        return result

    def replay(self) -> None:
        """All operations, in their order."""
        with torch.inference_mode():
            for func, args, kwargs, made in self._done:
                result = func(*args, **kwargs)
                if made:
                    old = {_place(tensor) for tensor in _tensors((args, kwargs))}
                    found = [t for t in _tensors(result) if _place(t) not in old]
                    for tensor, value in zip(made, found, strict=True):
                        tensor.copy_(value)


def _by_truth(args: tuple[Any, ...]) -> bool:
    return any(t.dtype == torch.bool for t in _tensors(args[1:]))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for one in value for t in _tensors(one)] if isinstance(value, tuple | list) else []
