"""``zigzag``: a block of equal batches goes through a layer before the next layer's weights come.

FlexGen's block schedule (arXiv 2303.06865): what is read of a layer serves all batches of the
block, and a share of the weights in percent never leaves memory. With one batch for each worker and
all weights kept that fit this is ``model_batch``, with nothing kept ``weight_stream``.
"""

from collections.abc import Iterator

from dovetail.ir.moves import Move
from dovetail.passes.policies import module_batch
from dovetail.passes.policies.common import Knobs, Ladders, Policy, Setting, powers

PERCENT = (0, 25, 50, 75, 100)
"""Shares of the weights to keep in memory; 100 keeps what fits."""


def starts(setting: Setting) -> Iterator[Knobs]:
    """Block sizes, doubling, in batches of 4 and in one batch for each worker."""
    for seqs in powers(1, setting.workload.prompts):
        for batches in sorted({setting.machine.workers, -(-seqs // 4)}):
            loads = {"chunk": 1, "slots": 2, "expert_rows": 256, "embed": False}
            yield {"seqs": seqs, "batches": batches, "percent": 100, **loads}


def ladders(setting: Setting) -> Ladders:
    """What the block, its batches, the weights kept and the loads may be."""
    shared = module_batch.ladders(setting)
    names = ("seqs", "chunk", "slots", "expert_rows", "embed")
    batches = powers(1, setting.workload.prompts)
    own = {"batches": tuple(batches), "percent": PERCENT}
    return {name: shared[name] for name in names} | own


def moves(setting: Setting, knobs: Knobs) -> tuple[Move, ...] | None:
    """A static block of ``seqs`` sequences in ``batches`` equal batches, with ``percent`` of the
    weights in ram; the other knobs are those of ``module_batch``."""
    seqs, batches, percent = (int(knobs[name]) for name in ("seqs", "batches", "percent"))
    tokens = seqs * setting.workload.longest
    block = {
        "rows": -(-seqs // batches),
        "attn_tokens": -(-tokens // batches),
        "prefill_tokens": tokens,
        "workers": setting.machine.workers,
        "refill": False,
    }
    kept = {"resident": setting.graph.weight_bytes * percent // 100} if percent < 100 else {}
    return module_batch.moves(setting, {**knobs, **block, **kept})


POLICY = Policy(
    name="zigzag",
    source="FlexGen's block schedule (arXiv 2303.06865)",
    starts=starts,
    ladders=ladders,
    moves=moves,
)
