"""One layer's experts over ranks: `inputs and choices -> dispatch, experts, combine -> sums`.

Rows are those of ir/expert_rows.py. An input goes to a rank once for all its experts there, and one
weighted sum comes back from each (as in DeepEP).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dovetail.ir.expert_dispatch import visited
from dovetail.runtime.exchange import Exchange, packed, unpacked
from dovetail.runtime.tokens import padded_rows
from dovetail.runtime.weight_store import Tensors

Ints = NDArray[np.int64]
Expert = Callable[[Tensor, Tensors], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What a rank's tokens bring to a layer's experts: ``x [n, hidden]``, the experts ``index`` and
    their ``weight [n, top_k]``, the tokens' ``numbers [n]``, the ranks ``serving [n, top_k]`` and
    the rank ``home [n]`` that takes the sums."""

    x: Tensor
    index: Tensor
    weight: Tensor
    numbers: Ints
    serving: Ints
    home: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Weighted sums of experts, ``values [n, hidden]``, of the tokens ``numbers [n]``: one entry
    for every rank that served a token, in the order of ranks."""

    values: Tensor
    numbers: Ints


class ExpertExchange:
    """The exchanges of expert parallelism on one rank; sums are of type ``sums``."""

    def __init__(
        self, exchange: Exchange, sums: torch.dtype, rows: int, buckets: tuple[int, ...]
    ) -> None:
        self._exchange, self._sums = exchange, sums
        self._tile, self._buckets = rows, buckets

    def run(
        self,
        chosen: Chosen,
        moves: Tensor,
        moving_home: Ints,
        expert: Expert,
        weights: Mapping[int, Tensors],
        combine: str,
    ) -> tuple[Sums, Tensor]:
        """Dispatch, run this rank's experts and combine. ``moves`` are the rows that go to
        ``moving_home`` along with the tokens that change their home; returns the sums of the tokens
        that are at home here, and the rows that arrived.

        ``combine`` says which sums come back: ``known`` (those this rank sent inputs for),
        ``told`` (to be asked for), or ``none`` (every sum is at home where it was made).
        """
        ranks, here = self._exchange.ranks, self._exchange.rank
        parts = self._inputs(chosen)
        leaving = [np.flatnonzero((moving_home == r) & (r != here)) for r in range(ranks)]
        moved = [moves[torch.from_numpy(rows)] for rows in leaving]
        told = self._exchange.counts(
            [[len(part), len(move)] for part, move in zip(parts, moved, strict=True)]
        )
        counts = {"dispatch": [n for n, _ in told], "move": [n for _, n in told]}
        came = self._exchange.rows({"dispatch": parts, "move": moved}, counts)
        hidden, top_k = chosen.x.shape[1], chosen.index.shape[1]
        x, meta, weight = unpacked(
            came["dispatch"],
            (chosen.x.dtype, hidden),
            (torch.int32, 2 + top_k),
            (self._sums, top_k),
        )
        total = self._experts(x, meta[:, 2:], weight, expert, weights)
        expected = visited(chosen.serving, ranks).sum(axis=0).tolist()
        return self._combine(total, meta, combine, expected), came["move"]

    def _inputs(self, chosen: Chosen) -> list[Tensor]:
        """The dispatch rows for every rank."""
        goes = visited(chosen.serving, self._exchange.ranks)
        serving = torch.from_numpy(chosen.serving)
        place = torch.from_numpy(np.stack([chosen.numbers, chosen.home], axis=1))
        parts = []
        for rank in range(self._exchange.ranks):
            rows = torch.from_numpy(np.flatnonzero(goes[:, rank]))
            ids = torch.where(serving[rows] == rank, chosen.index[rows], -1)
            meta = torch.cat([place[rows], ids], dim=1).to(torch.int32)
            parts.append(packed(chosen.x[rows], meta, chosen.weight[rows]))
        return parts

    def _experts(
        self,
        x: Tensor,
        ids: Tensor,
        weight: Tensor,
        expert: Expert,
        weights: Mapping[int, Tensors],
    ) -> Tensor:
        """The weighted sums of this rank's experts, ``[rows, hidden]``."""
        total = torch.zeros(x.shape, dtype=self._sums)
        for number, tensors in weights.items():
            hit = ids == number
            rows = hit.any(dim=1).nonzero().squeeze(1)
            share = (weight * hit).sum(dim=1, keepdim=True)
            for start in range(0, len(rows), self._tile):
                some = rows[start : start + self._tile]
                y = expert(padded_rows(x, some, self._buckets), tensors)[: len(some)]
                total.index_add_(0, some, y.to(total.dtype) * share[some])
        return total

    def _combine(self, total: Tensor, meta: Tensor, how: str, expected: list[int]) -> Sums:
        if how == "none":
            return Sums(total, meta[:, 0].numpy().astype(np.int64))
        home = meta[:, 1]
        parts = [
            packed(total[home == rank], meta[home == rank, 0])
            for rank in range(self._exchange.ranks)
        ]
        if how == "told":
            expected = [n for (n,) in self._exchange.counts([[len(part)] for part in parts])]
        rows = self._exchange.rows({"combine": parts}, {"combine": expected})["combine"]
        values, numbers = unpacked(rows, (self._sums, total.shape[1]), (torch.int32, 1))
        return Sums(values, numbers[:, 0].numpy().astype(np.int64))


def add_up(sums: Sums, numbers: Ints, hidden: int) -> Tensor:
    """The sums of the tokens ``numbers``, ``[n, hidden]``: each rank's added in the order of
    ranks."""
    total = torch.zeros((len(numbers), hidden), dtype=sums.values.dtype)
    order = numbers.argsort()
    rows = order[np.searchsorted(numbers[order], sums.numbers)]
    return total.index_add_(0, torch.from_numpy(rows), sums.values)
