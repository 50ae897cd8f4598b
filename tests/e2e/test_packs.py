"""Experts in packs give the same logits, to the last bit, as experts one by one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.e2e.support import forced_logits, plan_for, ragged_prompts, save_tiny, tiny_model

from dovetail.ir.moves import Pack
from dovetail.passes.apply_moves import apply_moves

PROMPTS = ragged_prompts((5, 40, 1, 17, 9, 33, 3, 22), seed=0)
FORCED = ragged_prompts([6] * len(PROMPTS), seed=1)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("olmoe", torch.float32), ("olmoe", torch.bfloat16), ("gpt_oss", torch.bfloat16)],
)
def test_packs_change_no_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny = save_tiny(tiny_model(family, dtype), tmp_path)
    budget = int(3.0 * tiny.weight_bytes) + (8 << 20)
    for workers, rows in ((1, 64), (2, 512)):
        plan = plan_for(tiny, PROMPTS, 6, budget, "module_batch", workers=workers)
        packed = replace(plan, moves=(*plan.moves, Pack("experts", rows)))
        assert apply_moves(tiny.captured.graph, packed.moves).settings.pack > 0
        apart, together = (forced_logits(tiny, p, PROMPTS, FORCED) for p in (plan, packed))
        for one, other in zip(apart, together, strict=True):
            assert torch.equal(one, other)
