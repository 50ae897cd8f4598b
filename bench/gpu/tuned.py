"""Kernels tuned by `dovetail kernels tune`'s search, in turn with the cost model's choice."""

import sys
from collections.abc import Sequence
from pathlib import Path

from slots import placed

from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.choose import LADDER
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.tuning.kernels.key import gpu_environment, host_environment
from dovetail.tuning.kernels.rungs import Decided, Rung
from dovetail.tuning.kernels.space import KernelSpace
from dovetail.tuning.kernels.tune import Job, gpu_bench, host_bench, tune_rungs
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.trials import Trials


def bucket_of(tokens: int) -> tuple[int, int]:
    """The bucket of the usual ladder that ends with so many tokens."""
    at = LADDER.index(tokens)
    return (LADDER[at - 1] + 1 if at else 1, tokens)


def tune_layer(
    layer: LayerSpec, counts: Sequence[int], arch: Arch, seconds: float, rows: Path, dry: bool
) -> list[Decided]:
    """Search kernels for a layer's experts, at addresses, for so many tokens each; equal shares of
    ``seconds``. What is in the database ``rows`` is not timed again."""
    rungs = [
        Rung((layer.name,), KernelSpace.of(placed(layer), arch, bucket_of(tokens)), 1.0)
        for tokens in counts
    ]
    job = Job(
        rungs,
        host_environment() if dry else gpu_environment(),
        "interpreted" if dry else "graphs",
        host_bench if dry else gpu_bench,
        "coordinate",
        0,
        seconds,
    )
    with Database.open(rows) as database:
        return tune_rungs(job, Trials(database), lambda text: print(text, file=sys.stderr))
