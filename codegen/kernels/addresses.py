"""Where experts lie: a table of addresses on the device, one for each expert, 0 for those that a
launch leaves out.

Kernels read the table, so that weights may lie in any slot of any pool, some resident and some just
copied, and the host reads nothing back. A table is data like any other: it must be written before
the kernels that read it, on their stream, and its experts stay where it says until they have ended.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dovetail.codegen.kernels.gemm_rows import ALIGNED
from dovetail.ir.errors import InputError


def slot_addresses(pool: Tensor, stride: int, slots: Tensor, into: Tensor | None = None) -> Tensor:
    """Addresses [experts], int64, of experts in a pool's slots, computed on the device.

    ``slots`` [experts] (int32, on the pool's device) has the slot of every expert, negative for one
    that is not there; slots are ``stride`` bytes apart. ``into`` is a table to write to. Raises
    InputError where slots do not begin at whole 16 bytes.
    """
    start = pool.data_ptr()
    if start % ALIGNED or stride % ALIGNED:
        raise InputError(
            f"slots of {stride} bytes from address {start:#x} on: kernels expect experts at "
            f"multiples of {ALIGNED} bytes; align the pool and round slots up"
        )
    at = torch.where(slots >= 0, slots.to(torch.int64) * stride + start, 0)
    return at if into is None else into.copy_(at)


def expert_addresses(experts: Mapping[int, Tensor], count: int, device: str) -> Tensor:
    """Addresses [count], int64, of the experts whose bytes ``experts`` has, each a contiguous
    tensor on ``device``; 0 for all others. Raises InputError where one is not aligned."""
    found = [0] * count
    for expert, held in experts.items():
        at = held.data_ptr()
        if at % ALIGNED or not held.is_contiguous():
            raise InputError(
                f"expert {expert} lies at {at:#x}"
                f"{'' if held.is_contiguous() else ', not contiguous'}: kernels expect experts in "
                f"one piece at multiples of {ALIGNED} bytes"
            )
        found[expert] = at
    return torch.tensor(found, dtype=torch.int64).to(device)
