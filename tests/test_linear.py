"""16-bit products in tiles: few shapes, the same numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dovetail.runtime.linear import SIZES, linear, tiles


@given(st.integers(1, 5000))
def test_tiles_cover_the_rows_with_few_sizes(rows: int) -> None:
    sizes = tiles(rows)
    assert set(sizes) <= set(SIZES)
    assert rows <= sum(sizes) <= max(8, 2 * rows)
    assert tiles(sum(sizes)) == sizes


@pytest.mark.parametrize("rows", [1, 8, 40, 97, 150, 230, 300, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_equals_torch(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn((2, rows, 32), generator=generator).to(dtype)
    weight = torch.randn((48, 32), generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    plain = (F.linear(x, weight, bias).double() - expected).abs().max()
    ours = (linear(x, weight, bias).double() - expected).abs().max()
    assert linear(x, weight, bias).shape == expected.shape
    assert ours <= 1.5 * plain + 1e-12
