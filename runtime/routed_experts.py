"""Routed experts over weights in memory: every expert once, over all tokens routed to it.

The same formulation as the executor's (MoE-Gen, arXiv 2503.09716): tokens are sorted by expert, so
that an expert's weights are read once and its products are as tall as they can be. Nothing but
one expert's rows is ever materialised, unlike in a grouped product over all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.ir.gemm_tiles import LADDERS
from dovetail.runtime.expert_groups import GROUPED
from dovetail.runtime.linear import TiledLinear

AT_ONCE_BYTES = 16 << 20
"""Above so many bytes of intermediate rows an expert at a time is faster on a CPU: its rows stay in
the cache (measured with 64 experts of 512 x 256; the two meet between 8 and 32 MiB)."""
Activation = Callable[[Tensor], Tensor]
_tiled = TiledLinear(LADDERS[0])


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Stacked weights of all experts: ``up [experts, wide, hidden]`` and ``down [experts, hidden,
    narrow]``, or with ``transposed`` their last two axes swapped; biases ``[experts, out]``."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    transposed: bool = False

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.up.shape[0]


def run_experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    weights: ExpertWeights,
    activate: Activation,
    finish: Activation | None = None,
) -> Tensor:
    """The weighted sum of every token's experts: ``x [tokens, hidden]``, ``index`` and ``weight
    [tokens, top_k]`` -> ``[tokens, hidden]``.

    ``activate`` turns ``[n, wide]`` into ``[n, narrow]``, ``finish`` is applied to an expert's
    output. An index of ``weights.count`` or more means no expert. Sums are in float32 (float64 for
    a float64 model), so that the order of experts does not matter to 16-bit results.
    """
    top_k = index.shape[-1]
    by_expert, counts, shares = _sorted(index, weight, weights.count)
    rows = by_expert // top_k
    if _at_once(index, weights) and len(counts) == weights.count:
        y = _all_experts(x.index_select(0, rows), counts, weights, activate)
        y = finish(y) if finish is not None else y
        parts = (y.to(shares.dtype) * shares).to(_sum_dtype(x.dtype))
        ordered = torch.empty_like(parts).index_copy_(0, by_expert, parts)
        return ordered.view(*index.shape, -1).sum(1).to(x.dtype)

    def run(expert: int, own: Tensor) -> Tensor:
        y = _expert(own, expert, weights, activate)
        return finish(y) if finish is not None else y

    return _one_by_one(x, rows, counts[: weights.count], shares, run)


def run_expert_modules(
    x: Tensor, index: Tensor, weight: Tensor, experts: Sequence[Activation]
) -> Tensor:
    """Like ``run_experts`` for experts of any kind, each called once with all of its tokens and
    not at all if it has none."""
    by_expert, counts, shares = _sorted(index, weight, len(experts))
    rows = by_expert // index.shape[-1]
    return _one_by_one(x, rows, counts, shares, lambda expert, own: experts[expert](own))


def _one_by_one(
    x: Tensor,
    rows: Tensor,
    counts: list[int],
    shares: Tensor,
    run: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """The sum of ``run(expert, its tokens)``, weighted by ``shares``; ``rows`` are the tokens of
    the first expert, then of the second, and so on."""
    total = x.new_zeros(x.shape, dtype=_sum_dtype(x.dtype))
    start = 0
    for expert, count in enumerate(counts):
        if count:
            own = rows[start : start + count]
            y = run(expert, x.index_select(0, own))
            total.index_add_(0, own, y.to(total.dtype) * shares[start : start + count])
        start += count
    return total.to(x.dtype)


def _at_once(index: Tensor, weights: ExpertWeights) -> bool:
    """Whether what lies between the two products of all experts fits in a cache: then few calls
    over many rows cost less than many calls over few. Grouped products want rows of whole 16-byte
    words."""
    widths = (*weights.up.shape[1:], *weights.down.shape[1:])
    size = weights.up.element_size()
    if weights.up.dtype not in GROUPED or any(width * size % 16 for width in widths):
        return False
    return bool(index.numel() * sum(widths) * size <= AT_ONCE_BYTES)


def _all_experts(
    x: Tensor,
    counts: list[int],
    weights: ExpertWeights,
    activate: Activation,
) -> Tensor:
    """Outputs of all experts for rows sorted by expert, in two grouped products."""
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    up, down = weights.up, weights.down
    if not weights.transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    own = None
    if weights.up_bias is not None:
        own = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    h = F.grouped_mm(x, up, offs=ends)
    if weights.up_bias is not None:
        h = h + weights.up_bias[own]
    y = F.grouped_mm(activate(h), down, offs=ends)
    return y if weights.down_bias is None else y + weights.down_bias[own]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sorted(index: Tensor, weight: Tensor, experts: int) -> tuple[Tensor, list[int], Tensor]:
    """Places of ``index`` by expert, how many each has, and their weights as a column."""
    flat = index.reshape(-1)
    by_expert = flat.argsort(stable=True)
    counts: list[int] = torch.bincount(flat, minlength=experts).tolist()
    shares = weight.reshape(-1).index_select(0, by_expert).unsqueeze(1)
    return by_expert, counts, shares.to(_sum_dtype(weight.dtype))


def _expert(x: Tensor, expert: int, weights: ExpertWeights, activate: Activation) -> Tensor:
    up_bias = None if weights.up_bias is None else weights.up_bias[expert]
    down_bias = None if weights.down_bias is None else weights.down_bias[expert]
    h = _product(x, weights.up[expert], up_bias, weights.transposed)
    return _product(activate(h), weights.down[expert], down_bias, weights.transposed)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return _tiled(x, weight.T if transposed else weight, bias)


@torch.library.custom_op("dovetail::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows sorted by group times the group's matrix: ``x [n, in]``, ``weight [groups, in, out]``,
    ``ends [groups]`` (the row after each group's last) -> ``[n, out]``; rows past the last group
    get zeros."""
    pieces, start = [], 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            pieces.append(_tiled(x[start:end], weight[group].T))
            start = end
    if start < len(x):
        pieces.append(x.new_zeros(len(x) - start, weight.shape[2]))
    return torch.cat(pieces) if pieces else x.new_empty(0, weight.shape[2])


@grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def run_experts_traced(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    weights: ExpertWeights,
    activate: Activation,
    finish: Activation | None = None,
) -> Tensor:
    """``run_experts`` in operators that a tracer can follow: no size depends on data."""
    tokens, top_k = index.shape
    flat = index.reshape(-1)
    group, by_expert = torch.sort(flat, stable=True)
    ends = torch.searchsorted(group, torch.arange(weights.count, device=x.device), right=True)
    own = group.clamp(max=weights.count - 1)
    up, down = weights.up, weights.down
    if not weights.transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    h = torch.ops.dovetail.grouped_product(x[by_expert // top_k], up, ends)
    if weights.up_bias is not None:
        h = h + weights.up_bias[own]
    y = torch.ops.dovetail.grouped_product(activate(h), down, ends)
    if weights.down_bias is not None:
        y = y + weights.down_bias[own]
    y = finish(y) if finish is not None else y
    kind = _sum_dtype(x.dtype)
    shares = weight.reshape(-1)[by_expert].unsqueeze(1).to(kind)
    shares = shares.masked_fill((group >= weights.count).unsqueeze(1), 0.0)
    back = torch.empty_like(by_expert).scatter_(
        0, by_expert, torch.arange(tokens * top_k, device=x.device)
    )
    out = (y.to(kind) * shares)[back].view(tokens, top_k, -1).sum(1)
    return out.to(x.dtype)
