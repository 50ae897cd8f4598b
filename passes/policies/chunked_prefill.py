"""``chunked_prefill``: prompts go through the model in pieces, beside the sequences that decode.

Sarathi-Serve (arXiv 2403.02310): a step takes a bounded number of prompt tokens, so that no prompt
holds up the sequences in decode, and the memory of a step does not grow with the longest prompt.
What it costs are passes over the weights: a prompt of n pieces takes n of them. With pieces as long
as the longest prompt this is ``module_batch``.
"""

from collections.abc import Iterator

from dovetail.ir.moves import Move
from dovetail.passes.policies import module_batch
from dovetail.passes.policies.common import Knobs, Ladders, Policy, Setting, powers

SHORTEST = 16
"""Fewest tokens of a piece worth trying: attention over fewer is as slow as decoding them."""


def starts(setting: Setting) -> Iterator[Knobs]:
    """For every number of sequences in flight, doubling: short pieces in little memory, and long
    ones in more."""
    longest, loads = setting.workload.longest, module_batch.chunk_sizes(setting)
    for seqs in powers(1, setting.workload.prompts):
        lean = {"rows": 4, "chunk": 1, "slots": 2, "expert_rows": 128, "head_rows": 16}
        yield {**lean, "seqs": seqs, "chunk_tokens": min(longest, 128), "embed": False}
        rich = {"rows": 32, "slots": 3, "expert_rows": 1024, "head_rows": 64, "embed": True}
        many = {"chunk": loads[len(loads) // 2], "chunk_tokens": min(longest, 512)}
        yield {**rich, **many, "seqs": seqs}
    yield leanest(setting)


def leanest(setting: Setting) -> Knobs:
    """The least memory that runs: that of ``module_batch``, with prompts in the shortest pieces."""
    piece = min(SHORTEST, setting.workload.longest)
    return {**module_batch.leanest(setting), "chunk_tokens": piece}


def ladders(setting: Setting) -> Ladders:
    """What the pieces, the batch sizes and the loads may be."""
    names = ("seqs", "rows", "chunk", "slots", "expert_rows", "head_rows", "embed")
    shared = module_batch.ladders(setting)
    pieces = powers(SHORTEST, setting.workload.longest)
    return {name: shared[name] for name in names} | {"chunk_tokens": tuple(pieces)}


def moves(setting: Setting, knobs: Knobs) -> tuple[Move, ...] | None:
    """``module_batch`` with a piece of at most ``chunk_tokens`` for every worker in a step; on all
    workers unless ``workers`` says how many. A model that mixes a prompt's tokens takes it
    whole."""
    piece, workers = int(knobs["chunk_tokens"]), int(knobs.get("workers", setting.machine.workers))
    in_pieces = piece < setting.workload.longest and not setting.graph.whole_prompts
    return module_batch.moves(
        setting,
        {
            **knobs,
            "chunk_tokens": piece if in_pieces else 0,
            "attn_tokens": piece,
            "prefill_tokens": piece * workers,
            "workers": workers,
            "refill": True,
        },
    )


POLICY = Policy(
    name="chunked_prefill",
    source="Sarathi-Serve (arXiv 2403.02310)",
    starts=starts,
    ladders=ladders,
    moves=moves,
)
