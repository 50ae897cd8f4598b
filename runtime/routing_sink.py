"""Where the executor tells which experts tokens chose, if someone wants to know."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dovetail.ir.batching import Group


class RoutingSink(Protocol):
    """Takes the choices of every step, layer by layer, while the experts wait for them."""

    def routed(self, step: int, layer: int, groups: Sequence[Group], experts: Tensor) -> None:
        """The experts ``[tokens, top_k]`` that the tokens of ``groups`` chose in ``layer``: group
        by group, row by row, without padding. ``step`` counts from 1. The tensor is only lent."""
