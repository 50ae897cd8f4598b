"""Weights of several experts that stand where the weights of one are expected."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Packed:
    """One part's matrices (or biases) of a pack of experts; ``ends`` are the rows after each one's
    last. The emitted executor's ``linear`` takes it for a weight."""

    def __init__(self, weights: Sequence[Tensor], ends: Sequence[int]) -> None:
        self.weights, self.ends = weights, ends

    def t(self) -> "Packed":
        """The pack with every matrix turned."""
        return Packed([weight.t() for weight in self.weights], self.ends)

    def linear(self, x: Tensor, bias: "Packed | None" = None) -> Tensor:
        """``x [rows, in]`` -> ``[rows, out]``, each expert's rows with its matrix."""
        out = x.new_empty(len(x), self.weights[0].shape[0])
        start = 0
        for place, (weight, end) in enumerate(zip(self.weights, self.ends, strict=True)):
            if bias is None:
                torch.mm(x[start:end], weight.t(), out=out[start:end])
            else:
                torch.addmm(bias.weights[place], x[start:end], weight.t(), out=out[start:end])
            start = end
        return out
