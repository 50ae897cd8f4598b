"""Rows of bytes between ranks, counted: all-to-all on torch.distributed, gloo or NCCL alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Traffic:
    """Bytes that a rank sent to others, by kind (what it sent to itself does not count), and how
    often each kind was exchanged."""

    sent: dict[str, int] = field(default_factory=dict)
    exchanges: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, nbytes: int) -> None:
        """Count one exchange and its bytes."""
        self.sent[kind] = self.sent.get(kind, 0) + nbytes
        self.exchanges[kind] = self.exchanges.get(kind, 0) + 1


class Exchange:
    """All-to-alls of one process group; every rank calls them in the same order. Rows go through
    memory of ``device``: the processor's for gloo, the GPU's for NCCL."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self._group, self._device = group, device
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Traffic()

    def counts(self, told: Sequence[Sequence[int]]) -> list[list[int]]:
        """Tell every rank some numbers, ``told[rank]``, and learn what it tells."""
        sent = torch.tensor(told, device=self._device)
        found = torch.empty_like(sent)
        dist.all_to_all_single(found, sent, group=self._group)
        self.traffic.add("headers", sent[0].nbytes * (self.ranks - 1))
        learnt: list[list[int]] = found.tolist()
        return learnt

    def rows(
        self, sent: Mapping[str, Sequence[Tensor]], counts: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """Send ``sent[kind][rank]``, rows of bytes ``[n, bytes]``, in one all-to-all; returns what
        came, ``counts[kind][rank]`` rows from each rank, one rank's after the other's."""
        widths = {kind: parts[0].shape[1] for kind, parts in sent.items()}
        sizes = [[counts[kind][rank] * widths[kind] for kind in sent] for rank in range(self.ranks)]
        each = [torch.cat([sent[kind][r].flatten() for kind in sent]) for r in range(self.ranks)]
        whole = torch.empty(sum(map(sum, sizes)), dtype=torch.uint8, device=self._device)
        dist.all_to_all_single(
            whole,
            torch.cat(each).to(self._device),
            [sum(size) for size in sizes],
            [len(part) for part in each],
            group=self._group,
        )
        for kind, parts in sent.items():
            others = [part.numel() for rank, part in enumerate(parts) if rank != self.rank]
            self.traffic.add(kind, sum(others))
        pieces = iter(torch.split(whole.cpu(), [n for size in sizes for n in size]))
        found: dict[str, list[Tensor]] = {kind: [] for kind in sent}
        for _ in range(self.ranks):
            for kind in sent:
                found[kind].append(next(pieces).view(-1, widths[kind]))
        return {kind: torch.cat(parts) for kind, parts in found.items()}

    def gather(self, kind: str, rows: Tensor) -> Tensor:
        """The rows of all other ranks, ``[n, bytes]``, one rank's after the other's."""
        told = self.counts([[len(rows)]] * self.ranks)
        parts = [rows[:0] if rank == self.rank else rows for rank in range(self.ranks)]
        counts = [0 if rank == self.rank else n for rank, (n,) in enumerate(told)]
        return self.rows({kind: parts}, {kind: counts})[kind]


def packed(*columns: Tensor) -> Tensor:
    """Columns of one length, in any shape and type, as rows of bytes ``[n, bytes]``."""
    return torch.cat([_bytes(column) for column in columns], dim=1)


def unpacked(rows: Tensor, *columns: tuple[torch.dtype, int]) -> list[Tensor]:
    """The columns of packed rows: (type, elements) of each gives ``[n, elements]``."""
    found, at = [], 0
    for dtype, width in columns:
        size = width * dtype.itemsize
        # A copy, since a view in another type must begin at a multiple of its size.
        part = rows[:, at : at + size].clone(memory_format=torch.contiguous_format)
        found.append(part.view(dtype).view(len(rows), width))
        at += size
    return found


def _bytes(column: Tensor) -> Tensor:
    flat = (column.flatten(1) if column.dim() > 1 else column.unsqueeze(1)).contiguous()
    return flat.view(torch.uint8)
