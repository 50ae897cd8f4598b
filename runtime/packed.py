"""Weights of several experts that stand where the weights of one are expected."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.runtime.expert_groups import Groups
from dovetail.runtime.quantised import Rounded, int4_matrix, int8_linear, rounded


class Packed:
    """One part's matrices (or biases) of a pack of experts; ``ends`` are the rows after each one's
    last. With ``groups`` its products are one call where ``grouped_mm`` takes them. The emitted
    executor's ``linear`` takes it for a weight."""

    def __init__(
        self, weights: Sequence[Tensor], ends: Sequence[int], groups: Groups | None = None
    ) -> None:
        self.weights, self.ends, self.groups = weights, ends, groups

    def t(self) -> "Packed":
        """The pack with every matrix turned."""
        return Packed([weight.t() for weight in self.weights], self.ends, self.groups)

    def linear(
        self, x: Tensor | Rounded, bias: "Packed | None" = None, scale: "Packed | None" = None
    ) -> Tensor:
        """``x [rows, in]`` -> ``[rows, out]``, each expert's rows with its matrix; with a ``scale``
        matrices are in fewer bits."""
        if scale is not None:
            return self._quantised(x, bias, scale)
        assert isinstance(x, Tensor)
        # With a bias the sum is rounded once, as long as the product adds it.
        if self.groups is not None and bias is None:
            made = self.groups.linear(x, self.weights)
            if made is not None:
                return made
        out = x.new_empty(len(x), self.weights[0].shape[0])
        start = 0
        for place, (weight, end) in enumerate(zip(self.weights, self.ends, strict=True)):
            if bias is None:
                torch.mm(x[start:end], weight.t(), out=out[start:end])
            else:
                torch.addmm(bias.weights[place], x[start:end], weight.t(), out=out[start:end])
            start = end
        return out

    def _quantised(self, x: Tensor | Rounded, bias: "Packed | None", scale: "Packed") -> Tensor:
        eight = self.weights[0].dtype == torch.int8
        if eight and isinstance(x, Tensor):
            x = rounded(x)
        parts, start = [], 0
        for place, (weight, end) in enumerate(zip(self.weights, self.ends, strict=True)):
            own, added = scale.weights[place], None if bias is None else bias.weights[place]
            if isinstance(x, Rounded):
                parts.append(int8_linear(x.rows(start, end), weight, own, added))
            else:
                parts.append(F.linear(x[start:end], int4_matrix(weight, own, x.dtype), added))
            start = end
        return torch.cat(parts)
