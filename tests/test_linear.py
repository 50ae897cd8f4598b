"""16-bit products in tiles: few shapes, the same numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dovetail.ir.gemm_tiles import LADDERS, tiles
from dovetail.runtime.linear import TiledLinear


@given(st.integers(1, 5000), st.sampled_from(LADDERS))
def test_tiles_cover_the_rows_with_few_sizes(rows: int, ladder: tuple[int, ...]) -> None:
    sizes = tiles(rows, ladder)
    assert set(sizes) <= set(ladder)
    assert rows <= sum(sizes) < rows + ladder[-1]
    assert sum(tiles(sum(sizes), ladder)) == sum(sizes)


def test_finer_tiles_never_pad_more() -> None:
    for rows in range(1, 600):
        fine, coarse = (sum(tiles(rows, ladder)) for ladder in LADDERS[:2])
        assert fine <= coarse * 8 / 7


@pytest.mark.parametrize("rows", [1, 8, 40, 97, 150, 230, 300, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_equals_torch(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn((2, rows, 32), generator=generator).to(dtype)
    weight = torch.randn((48, 32), generator=generator).to(dtype)
    linear = TiledLinear(LADDERS[1])
    bias = torch.randn(48, generator=generator).to(dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    plain = (F.linear(x, weight, bias).double() - expected).abs().max()
    ours = (linear(x, weight, bias).double() - expected).abs().max()
    assert linear(x, weight, bias).shape == expected.shape
    assert ours <= 1.5 * plain + 1e-12
