"""``eager``: the model as it is, every weight in memory, one batch after the other.

What plain transformers does with ``from_pretrained`` and a padded batch; the reference that every
other policy is compared with when everything fits.
"""

from collections.abc import Iterator

from dovetail.ir.moves import Dispatch, Move, Overlap, Split
from dovetail.passes.policies import module_batch
from dovetail.passes.policies.common import Knobs, Policy, Setting, base_moves, place_all, powers


def starts(setting: Setting) -> Iterator[Knobs]:
    """Batch sizes, doubling."""
    for seqs in powers(1, setting.workload.prompts):
        yield {"seqs": seqs}


def moves(setting: Setting, knobs: Knobs) -> tuple[Move, ...]:
    """One static batch of ``seqs`` sequences at a time, shared evenly by the workers."""
    equal = module_batch.equal_batches(setting, int(knobs["seqs"]))
    return (
        Dispatch(
            seqs=int(equal["seqs"]),
            kv_tokens=setting.kv_tokens(int(equal["seqs"]), int(equal["rows"])),
            prefill_tokens=int(equal["prefill_tokens"]),
            longest=setting.workload.longest,
            refill=False,
        ),
        *base_moves(setting.graph, setting.budget),
        Split("attention", "seqs", int(equal["rows"])),
        Split("attention", "tokens", int(equal["attn_tokens"])),
        *place_all(setting),
        Overlap(setting.machine.workers, threads=1),
    )


POLICY = Policy(
    name="eager",
    source="transformers, plain generate",
    starts=starts,
    ladders=lambda setting: {},
    moves=moves,
)
