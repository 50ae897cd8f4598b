"""Matrix products of 16-bit types over a handful of distinct numbers of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.ir.gemm_tiles import tiles
from dovetail.runtime.packed import Packed
from dovetail.runtime.quantised import Rounded, int4_matrix, int8_linear, rounded


class TiledLinear:
    """``x [..., in], weight [out, in] -> x @ weight.T + bias [..., out]``, in tiles of ``sizes``
    rows where the type has 16 bits (see ``ir.gemm_tiles``). With a ``scale`` the weight is one in
    fewer bits (see ``runtime.quantised``), and rows may be rounded already."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)

    def __call__(
        self,
        x: Tensor | Rounded,
        weight: Tensor | Packed,
        bias: Tensor | Packed | None = None,
        scale: Tensor | Packed | None = None,
    ) -> Tensor:
        """The product; rows of packs are in tiles already."""
        if isinstance(weight, Packed):
            assert not isinstance(bias, Tensor) and not isinstance(scale, Tensor)
            return weight.linear(x, bias, scale)
        assert not isinstance(bias, Packed) and not isinstance(scale, Packed)
        if scale is not None and weight.dtype == torch.int8:
            return self._rounded(x if isinstance(x, Rounded) else rounded(x), weight, bias, scale)
        assert isinstance(x, Tensor)
        if scale is not None:
            weight = int4_matrix(weight, scale, x.dtype)
        if x.dtype.itemsize != 2:
            return F.linear(x, weight, bias)
        rows = x.numel() // x.shape[-1]
        flat = x.reshape(rows, -1)
        sizes = tiles(rows, self._sizes)
        if (total := sum(sizes)) != rows:
            flat = torch.empty((total, x.shape[-1]), dtype=x.dtype)
            flat[:rows] = x.reshape(rows, -1)
            flat[rows:].zero_()
        if len(sizes) == 1:
            out = F.linear(flat, weight, bias)
        else:
            out = torch.cat([F.linear(part, weight, bias) for part in torch.split(flat, sizes)])
        return out[:rows].view(*x.shape[:-1], weight.shape[0])

    def _rounded(self, x: Rounded, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        """An expert's rows, which are padded to whole tiles already."""
        parts, start = [], 0
        for size in tiles(len(x.values), self._sizes):
            parts.append(int8_linear(x.rows(start, start + size), weight, scale, bias))
            start += size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def batched(self, x: Tensor, weights: Tensor) -> Tensor:
        """``x [batch, rows, in] @ weights [batch, in, out] -> [batch, rows, out]``."""
        if x.dtype.itemsize != 2:
            return torch.bmm(x, weights)
        rows = x.shape[1]
        sizes = tiles(rows, self._sizes)
        if (total := sum(sizes)) != rows:
            x = F.pad(x, (0, 0, 0, total - rows))
        parts = [torch.bmm(part, weights) for part in torch.split(x, sizes, 1)]
        return torch.cat(parts, 1)[:, :rows] if len(parts) > 1 else parts[0][:, :rows]
