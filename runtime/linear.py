"""Matrix products of 16-bit types over a handful of distinct numbers of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.ir.gemm_tiles import tiles
from dovetail.runtime.packed import Packed


class TiledLinear:
    """``x [..., in], weight [out, in] -> x @ weight.T + bias [..., out]``, in tiles of ``sizes``
    rows where the type has 16 bits (see ``ir.gemm_tiles``)."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)

    def __call__(
        self, x: Tensor, weight: Tensor | Packed, bias: Tensor | Packed | None = None
    ) -> Tensor:
        """The product; rows of packs are in tiles already."""
        if isinstance(weight, Packed):
            return weight.linear(x, bias if isinstance(bias, Packed) else None)
        assert not isinstance(bias, Packed)
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
