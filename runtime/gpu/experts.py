"""Routed experts of a GPU plan: the tokens of a step, who chose whom, and the products by torch.

Tokens of all groups meet in buffers on the device, as on the CPU (runtime/tokens.py). ``Experts``
is what a faster implementation of the products has to be; kernels that keep the counts on the
device need not wait for them here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from dovetail.ir.task_graph import Experts as ExpertSpec
from dovetail.runtime.weight_store import Tensors

ExpertFunction = Callable[[Tensor, Tensors], Tensor]
"""An emitted expert: ``(x [rows, hidden], weights) -> [rows, hidden]``."""


@dataclass
class Routing:
    """Choices of the tokens from ``start`` on: ``index`` and ``weight`` [tokens, top_k]."""

    start: int
    index: Tensor
    weight: Tensor
    count: int

    @cached_property
    def order(self) -> Tensor:
        """Choices sorted by expert, [tokens * top_k]."""
        return self.index.reshape(-1).argsort(stable=True)

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of each expert; waits for the device."""
        found: list[int] = torch.bincount(self.index.reshape(-1), minlength=self.count).tolist()
        return found

    @cached_property
    def offsets(self) -> list[int]:
        """Where each expert's choices begin in ``order``."""
        found = [0]
        for count in self.counts:
            found.append(found[-1] + count)
        return found

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """An expert's tokens, as rows of the buffers [n], and their weights [n, 1]."""
        mine = self.order[self.offsets[expert] : self.offsets[expert + 1]]
        rows = torch.div(mine, self.index.shape[1], rounding_mode="floor") + self.start
        return rows, self.weight.reshape(-1)[mine].unsqueeze(1)


class Experts(Protocol):
    """Adds what some experts make of the tokens that chose them to ``sums`` [tokens, hidden];
    ``nbytes`` of hbm are its own buffers; ``capturable`` where ``run`` never waits for the device
    and does the same operations whoever chose whom."""

    nbytes: int
    capturable: bool

    def run(
        self,
        layer: int,
        function: ExpertFunction,
        experts: Sequence[int],
        weights: Sequence[Tensors],
        routing: Routing,
        x: Tensor,
        sums: Tensor,
    ) -> None:
        """``weights`` are the experts' own, in their order; ``x`` [tokens, hidden] and ``sums`` are
        those of the whole step, of which ``routing`` names rows."""


class TorchExperts:
    """One expert after the other, ``rows`` of its tokens at a time; the host reads their counts."""

    nbytes = 0
    capturable = False

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def run(
        self,
        layer: int,
        function: ExpertFunction,
        experts: Sequence[int],
        weights: Sequence[Tensors],
        routing: Routing,
        x: Tensor,
        sums: Tensor,
    ) -> None:
        """As ``Experts.run``."""
        for expert, tensors in zip(experts, weights, strict=True):
            if not routing.counts[expert]:
                continue
            rows, shares = routing.of(expert)
            parts = zip(torch.split(rows, self._rows), torch.split(shares, self._rows), strict=True)
            for part, share in parts:
                made = function(x.index_select(0, part), tensors).to(sums.dtype)
                sums.index_add_(0, part, made * share)


class GpuTokens:
    """Inputs, choices and sums of up to ``tokens`` tokens over ``memory`` [nbytes], and what the
    CPU's experts made of them."""

    def __init__(
        self, specs: Sequence[ExpertSpec], tokens: int, dtype: torch.dtype, memory: Tensor
    ):
        at = 0
        made = {}
        for name, (shape, kind) in _shapes(specs, tokens, dtype).items():
            size = prod(shape) * kind.itemsize
            made[name] = memory[at : at + size].view(kind).view(shape)
            at += -(-size // _ALIGN) * _ALIGN
        self.x, self.index, self.weight = made["x"], made["index"], made["weight"]
        self.sums = made["sums"]

    def put(self, start: int, x: Tensor, index: Tensor, weight: Tensor) -> None:
        """Bring a group's tokens: ``x [n, hidden]``, ``index`` and ``weight [n, top_k]``."""
        stop = start + x.shape[0]
        self.x[start:stop] = x
        self.index[start:stop, : index.shape[1]] = index
        self.weight[start:stop, : weight.shape[1]] = weight
        self.sums[start:stop].zero_()

    def routing(self, start: int, stop: int, spec: ExpertSpec) -> Routing:
        """The choices of these tokens."""
        top = spec.top_k
        return Routing(
            start, self.index[start:stop, :top], self.weight[start:stop, :top], spec.count
        )


_ALIGN = 16


def _shapes(
    specs: Sequence[ExpertSpec], tokens: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    hidden, top_k = max(s.hidden for s in specs), max(s.top_k for s in specs)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": ((tokens, hidden), dtype),
        "index": ((tokens, top_k), torch.int64),
        "weight": ((tokens, top_k), sums),
        "sums": ((tokens, hidden), sums),
    }


def tokens_nbytes(specs: Sequence[ExpertSpec], tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the buffers for so many tokens."""
    if not specs:
        return 0
    found = _shapes(specs, tokens, dtype).values()
    return sum(-(-prod(shape) * kind.itemsize // _ALIGN) * _ALIGN for shape, kind in found)
