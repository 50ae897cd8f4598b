"""What the operations of a GPU program do, by their names: `before_cpu3` begins the third group.

Lowering gives the names (passes/loop), a runtime reads them; here is what both hold to.
"""

import re
from dataclasses import dataclass
from functools import cache

from dovetail.ir.errors import VerifyError

GROUP_KINDS = ("prefill", "hbm", "cpu", "copied")
"""Where a group's attention runs: prompts; decode with KV in hbm; on the CPU; with KV that is
copied for the step."""
PLAIN = (
    "embed",
    "embed_rows",
    "copy_rows",
    "head",
    "copy_head",
    "read_dense",
    "copy_dense",
    "experts_hbm",
    "read_cpu_experts",
    "down_experts",
    "cpu_experts",
    "up_experts",
    "tail",
)
NUMBERED = ("read_experts", "copy_experts", "gemm", "experts_group", "barrier", "tail")
"""Followed by the number of a load, a group or a barrier."""
OF_GROUP = ("attention", "before", "kv", "after", "kv_in", "kv_out", "down", "cpu", "up")
"""Followed by the kind of a group and its number among the layer's groups."""
_NUMBERED = re.compile(rf"({'|'.join(NUMBERED)})([0-9]+)")
_GROUP = re.compile(rf"({'|'.join(OF_GROUP)})_({'|'.join(GROUP_KINDS)})([0-9]+)")


@dataclass(frozen=True, slots=True)
class GpuTask:
    """``verb`` is what is done, ``number`` to which load or group (-1: to all), ``kind`` the kind
    of a group."""

    verb: str
    number: int = -1
    kind: str = ""


@cache
def gpu_task(op: str) -> GpuTask:
    """What an operation does. Raises VerifyError for one that only a simulator knows."""
    if op in PLAIN:
        return GpuTask(op)
    if parts := _NUMBERED.fullmatch(op):
        return GpuTask(parts[1], int(parts[2]))
    if parts := _GROUP.fullmatch(op):
        return GpuTask(parts[1], int(parts[3]), parts[2])
    raise VerifyError(
        f"operation {op} is planned and simulated, but no executor does it yet; plan with a policy "
        "and knobs without it (linears_cpu=0)"
    )
