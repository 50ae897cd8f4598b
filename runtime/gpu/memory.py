"""Memory of a GPU run: everything that is set aside on a device, reserved in its tier's budget."""

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dovetail.runtime.gpu.device import ComputeDevice
from dovetail.runtime.pools import TierBudget


class GpuMemory:
    """Allocates on ``device`` within ``capacity``, the bytes of each tier."""

    def __init__(self, device: ComputeDevice, capacity: Mapping[str, int]) -> None:
        self.device = device
        self.budgets = {tier: TierBudget(size, tier) for tier, size in capacity.items()}

    def allocate(self, tier: str, nbytes: int, what: str) -> Tensor:
        """``nbytes`` bytes [nbytes] for the whole run. Raises BudgetError where they do not fit."""
        self.budgets[tier].reserve(nbytes, what)
        owner = f"{what} in {tier}"
        self.device.allocate(tier, nbytes, owner)
        return self.device.memory[owner]

    @contextmanager
    def scratch(self, nbytes: int) -> Iterator[Tensor]:
        """Page-aligned bytes of ram for a while."""
        self.budgets["ram"].reserve(nbytes, "scratch")
        try:
            yield torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        finally:
            self.budgets["ram"].release(nbytes, "scratch")
