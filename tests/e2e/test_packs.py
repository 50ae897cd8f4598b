"""Experts in packs, grouped or not, give the same logits, to the last bit, as one by one."""

from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import pytest
import torch
from tests.e2e.support import forced_logits, plan_for, ragged_prompts, save_tiny, tiny_model
from torch.nn import functional as F

from dovetail.ir.moves import Pack
from dovetail.passes.apply_moves import apply_moves

PROMPTS = ragged_prompts((5, 40, 1, 17, 9, 33, 3, 22), seed=0)
FORCED = ragged_prompts([6] * len(PROMPTS), seed=1)
CASES: tuple[tuple[int, int, Literal["", "grouped"]], ...]
CASES = ((1, 64, ""), (2, 512, ""), (1, 512, "grouped"))
"""Workers, rows of a pack, and how its products are made."""


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("olmoe", torch.float32), ("olmoe", torch.bfloat16), ("gpt_oss", torch.bfloat16)],
)
def test_packs_change_no_bit(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped = Mock(wraps=F.grouped_mm)
    monkeypatch.setattr(F, "grouped_mm", grouped)
    tiny = save_tiny(tiny_model(family, dtype), tmp_path)
    budget = int(3.0 * tiny.weight_bytes) + (8 << 20)
    for workers, rows, product in CASES:
        plan = plan_for(tiny, PROMPTS, 6, budget, "module_batch", workers=workers)
        pack = Pack("experts", rows, product)
        packed = replace(plan, moves=(*plan.moves, pack))
        assert apply_moves(tiny.captured.graph, packed.moves).settings.pack > 0
        apart, together = (forced_logits(tiny, p, PROMPTS, FORCED) for p in (plan, packed))
        for one, other in zip(apart, together, strict=True):
            assert torch.equal(one, other)
        # Products with biases stay apart.
        assert grouped.called == (product == "grouped" and family == "olmoe")
