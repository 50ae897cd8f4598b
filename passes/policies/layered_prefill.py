"""``layered_prefill``: prompts pass one group of layers a step, beside the sequences that decode.

Layered Prefill (arXiv 2510.08055): cutting the layers instead of the prompts keeps steps short too,
but every layer's experts meet a prompt once, whereas a prompt of n pieces meets them n times. What
it costs are steps in which a prompt waits for its layers. With one group of layers, and while
nothing decodes, this is ``module_batch``.
"""

from collections.abc import Iterator

from dovetail.ir.moves import Move
from dovetail.passes.policies import module_batch
from dovetail.passes.policies.common import Knobs, Ladders, Policy, Setting, powers


def starts(setting: Setting) -> Iterator[Knobs]:
    """For every number of sequences in flight, doubling: short steps in little memory, and longer
    ones in more."""
    longest, loads = setting.workload.longest, module_batch.chunk_sizes(setting)
    for seqs in powers(1, setting.workload.prompts):
        lean = {"rows": 4, "chunk": 1, "slots": 2, "expert_rows": 128, "head_rows": 16}
        rich = {"rows": 32, "slots": 3, "expert_rows": 1024, "head_rows": 64}
        tokens = {"seqs": seqs, "prefill_tokens": longest}
        many = min(4, len(setting.layers))
        yield {**lean, **tokens, "layer_groups": many, "embed": False}
        few = {"layer_groups": min(2, many), "chunk": loads[len(loads) // 2]}
        yield {**rich, **tokens, **few, "embed": True}
    yield {**module_batch.leanest(setting), "layer_groups": 0}


def ladders(setting: Setting) -> Ladders:
    """What the groups of layers, the batch sizes and the loads may be."""
    names = (
        "seqs", "rows", "prefill_tokens", "chunk", "slots", "expert_rows", "head_rows", "embed"
    )  # fmt: skip
    shared = module_batch.ladders(setting)
    groups = tuple(n for n in powers(2, len(setting.layers)) if n <= min(16, len(setting.layers)))
    return {name: shared[name] for name in names} | {"layer_groups": (0, *groups)}


def moves(setting: Setting, knobs: Knobs) -> tuple[Move, ...] | None:
    """``module_batch`` with prompts of ``prefill_tokens`` at a time, in ``layer_groups`` steps; on
    all workers unless ``workers`` says how many."""
    plain = {
        "attn_tokens": setting.workload.longest,
        "workers": setting.machine.workers,
        "refill": True,
    }
    return module_batch.moves(setting, {**plain, **knobs})


POLICY = Policy(
    name="layered_prefill",
    source="Layered Prefill (arXiv 2510.08055)",
    starts=starts,
    ladders=ladders,
    moves=moves,
)
