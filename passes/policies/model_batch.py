"""``model_batch``: one batch size for every module, weights streamed beside compute.

The model-based batching of FlexGen and DeepSpeed (as MoE-Gen, arXiv 2503.09716, names it):
attention and experts see the same batch. ``module_batch`` with equal batch sizes is this policy.
"""

from collections.abc import Iterator

from dovetail.ir.moves import Move
from dovetail.passes.policies import module_batch
from dovetail.passes.policies.common import Knobs, Ladders, Policy, Setting, powers


def starts(setting: Setting) -> Iterator[Knobs]:
    """Batch sizes, doubling, each with small loads."""
    for seqs in powers(1, setting.workload.prompts):
        yield {"seqs": seqs, "chunk": 1, "slots": 2, "expert_rows": 256, "embed": False}


def ladders(setting: Setting) -> Ladders:
    """What the batch size, the loads and their buffers may be."""
    names = ("seqs", "chunk", "slots", "expert_rows", "embed")
    return {name: module_batch.ladders(setting)[name] for name in names}


def moves(setting: Setting, knobs: Knobs) -> tuple[Move, ...] | None:
    """``module_batch`` whose attention batch is the whole batch."""
    equal = module_batch.equal_batches(setting, int(knobs["seqs"]))
    return module_batch.moves(setting, {**knobs, **equal})


POLICY = Policy(
    name="model_batch",
    source="FlexGen (arXiv 2303.06865), DeepSpeed ZeRO-Inference",
    starts=starts,
    ladders=ladders,
    moves=moves,
)
