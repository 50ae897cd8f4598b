"""Products with experts' matrices in fewer bits than the model's, as `dovetail convert` makes them.

int8 matrices lie ``[in, out]`` with a scale for each output; a product rounds its rows to int8 too,
each by its largest value, sums in int32 and multiplies by both scales (dynamic quantisation per
token, weights per channel, as in W8A8 of SmoothQuant, arXiv 2211.10438, without its smoothing).
int4 matrices lie ``[out, in / 2]``: the low half of byte j is input j plus 8, the high half input
``j + in / 2``; they are turned into the rows' type before a product, which saves their bytes on the
way from disk and in memory, not arithmetic.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127
LEAST_STEP = 1e-12


class Rounded(NamedTuple):
    """Rows in int8: ``values [n, in]`` and what 1 stands for in each, ``steps [n, 1]`` in float32;
    products come back in ``dtype``."""

    values: Tensor
    steps: Tensor
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> "Rounded":
        """Some of the rows."""
        return Rounded(self.values[start:stop], self.steps[start:stop], self.dtype)


def rounded(x: Tensor) -> Rounded:
    """Rows ``[n, in]`` in int8."""
    steps = x.abs().amax(-1, keepdim=True).float().clamp_min_(LEAST_STEP).div_(LARGEST)
    return Rounded((x / steps).round_().to(torch.int8), steps, x.dtype)


def int8_linear(x: Rounded, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [n, in]`` times int8 ``weight [in, out]`` with ``scale [out]`` -> ``[n, out]``."""
    out = torch._int_mm(x.values, weight).float().mul_(x.steps).mul_(scale)
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def int4_matrix(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix ``[out, in]`` that int4 ``weight [out, in / 2]`` with ``scale [out, groups]``
    stands for."""
    outputs, half = weight.shape
    numbers = torch.empty((outputs, 2 * half), dtype=torch.int8)
    halves = numbers.view(torch.uint8)
    torch.bitwise_and(weight, 15, out=halves[:, :half])
    torch.bitwise_right_shift(weight, 4, out=halves[:, half:])
    grouped = numbers.sub_(8).to(dtype).view(outputs, scale.shape[1], -1)
    return grouped.mul_(scale.to(dtype).unsqueeze(-1)).view(outputs, 2 * half)
