"""The positions of the pass that is being traced, for adapters that need them deep inside."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_POSITIONS: ContextVar[Tensor] = ContextVar("positions")


@contextmanager
def positions_of(position_ids: Tensor) -> Iterator[None]:
    """Within the block ``current_positions`` gives ``position_ids`` ``[seqs, q_len]``."""
    token = _POSITIONS.set(position_ids)
    try:
        yield
    finally:
        _POSITIONS.reset(token)


def current_positions() -> Tensor:
    """The positions of the new tokens, ``[seqs, q_len]``; only while a model is traced."""
    return _POSITIONS.get()
