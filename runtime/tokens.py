"""Token buffers: where all groups' tokens meet for the routed experts (module-based batching).

The formulation follows MoE-Gen (arXiv 2503.09716): attention runs over small groups of sequences,
experts once over the tokens of the whole step, so that each expert's weights are read once.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dovetail.ir.batching import expert_shares
from dovetail.ir.gemm_tiles import LADDERS, tiles
from dovetail.ir.task_graph import Experts
from dovetail.runtime.pools import Arena, TierBudget


@dataclass(frozen=True, slots=True)
class Routing:
    """Tokens by expert: ``rows[offsets[e]:offsets[e + 1]]`` are expert e's tokens and ``weights``
    their routing weights; ``owner[e]`` is the worker that runs it, -1 if it has no tokens."""

    rows: Tensor
    weights: Tensor
    offsets: list[int]
    owner: tuple[int, ...]


class TokenBuffers:
    """Inputs, routing and per-worker accumulators for up to ``tokens`` tokens of a step.

    Inputs are ``[tokens, hidden]`` in the model's dtype; accumulators are float32 (float64 for a
    float64 model), one per worker, so that workers add without a lock and in a fixed order.
    """

    def __init__(
        self,
        specs: list[Experts],
        tokens: int,
        workers: int,
        dtype: torch.dtype,
        budget: TierBudget,
        buckets: tuple[int, ...] = LADDERS[0],
    ) -> None:
        self._buckets = buckets
        self._hidden = max(spec.hidden for spec in specs)
        self._top_k = max(spec.top_k for spec in specs)
        self._workers = workers
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        shapes = {
            "x": ((tokens, self._hidden), dtype),
            "index": ((tokens, self._top_k), torch.int64),
            "weight": ((tokens, self._top_k), sums),
        } | {f"sum{worker}": ((tokens, self._hidden), sums) for worker in range(workers)}
        nbytes = sum(prod(shape) * kind.itemsize + 4096 for shape, kind in shapes.values())
        self._arena = Arena(nbytes, budget, "tokens")
        made = {}
        for name, (shape, kind) in shapes.items():
            at = self._arena.allocate(prod(shape) * kind.itemsize)
            made[name] = self._arena.tensor(at, kind, shape)
        self.x, self._index, self._weight = made["x"], made["index"], made["weight"]
        self.sums = [made[f"sum{worker}"] for worker in range(workers)]
        self._count = 0

    def put(self, start: int, x: Tensor, index: Tensor, weight: Tensor) -> None:
        """Bring a group's tokens: ``x [n, hidden]``, ``index`` and ``weight [n, top_k]``."""
        stop = start + x.shape[0]
        self.x[start:stop] = x
        self._index[start:stop, : index.shape[1]] = index
        self._weight[start:stop, : weight.shape[1]] = weight

    def chosen(self, count: int, top_k: int) -> Tensor:
        """The experts that the first ``count`` tokens chose, ``[count, top_k]``."""
        return self._index[:count, :top_k]

    def route(self, count: int, spec: Experts, order: list[int]) -> Routing:
        """Sort the first ``count`` tokens by expert and clear the sums. ``order`` is the order in
        which the experts' weights arrive."""
        index = self.chosen(count, spec.top_k).reshape(-1)
        by_expert = index.argsort(stable=True)
        counts = torch.bincount(index, minlength=spec.count).tolist()
        offsets = [0]
        for n in counts:
            offsets.append(offsets[-1] + n)
        weights = self._weight[:count, : spec.top_k].reshape(-1)[by_expert].unsqueeze(1)
        for total in self.sums:
            total[:count].zero_()
        self._count = count
        owner = expert_shares(counts, order, self._workers)
        return Routing(by_expert // spec.top_k, weights, offsets, owner)

    def select(self, rows: Tensor) -> Tensor:
        """The inputs of these tokens; in 16-bit types zero rows follow, up to whole tiles."""
        return padded_rows(self.x, rows, self._buckets)

    def take(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """The summed outputs of a group's tokens, ``[count, hidden]``."""
        total = self.sums[0][start : start + count]
        for other in self.sums[1:]:
            total += other[start : start + count]
        return total.to(dtype, copy=True)

    def close(self) -> None:
        """Give the memory back."""
        self._arena.close()


def padded_rows(x: Tensor, rows: Tensor, buckets: tuple[int, ...]) -> Tensor:
    """Rows of ``x [tokens, hidden]``; in 16-bit types zero rows follow, up to whole tiles of the
    sizes in ``buckets``."""
    if x.dtype.itemsize != 2:
        return x.index_select(0, rows)
    padded = torch.empty((sum(tiles(len(rows), buckets)), x.shape[1]), dtype=x.dtype)
    padded[len(rows) :].zero_()
    torch.index_select(x, 0, rows, out=padded[: len(rows)])
    return padded
