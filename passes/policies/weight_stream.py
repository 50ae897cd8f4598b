"""``weight_stream``: no weight stays; each layer is read while earlier ones compute.

AirLLM's and accelerate's disk offload with a window of prefetched loads: the smallest memory that
runs, and the base that the others improve on.
"""

from collections.abc import Iterator

from dovetail.ir.moves import Move
from dovetail.passes.policies import module_batch
from dovetail.passes.policies.common import Knobs, Ladders, Policy, Setting, powers


def starts(setting: Setting) -> Iterator[Knobs]:
    """Batch sizes, doubling, each with small loads."""
    for seqs in powers(1, setting.workload.prompts):
        yield {"seqs": seqs, "chunk": 1, "window": 2}
    yield module_batch.leanest(setting)


def ladders(setting: Setting) -> Ladders:
    """What the batch size, the loads and their window may be."""
    shared = module_batch.ladders(setting)
    return {"seqs": shared["seqs"], "chunk": shared["chunk"], "window": (1, 2, 3, 4)}


def moves(setting: Setting, knobs: Knobs) -> tuple[Move, ...] | None:
    """``model_batch`` with nothing resident."""
    if "window" not in knobs:
        return module_batch.moves(setting, knobs)
    equal = module_batch.equal_batches(setting, int(knobs["seqs"]))
    nothing = {"resident": 0, "embed": False, "slots": knobs["window"], "chunk": knobs["chunk"]}
    return module_batch.moves(setting, {**equal, **nothing})


POLICY = Policy(
    name="weight_stream",
    source="AirLLM; accelerate disk offload",
    starts=starts,
    ladders=ladders,
    moves=moves,
)
