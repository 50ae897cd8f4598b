"""In bfloat16 the logits are as close to the float32 model's as transformers' own are.

All three models have the same weights and read the same tokens, the prompts' and then random ones,
so that no early difference of one token makes the rest incomparable.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from tests.e2e.support import (
    FAMILIES,
    Tiny,
    forced_logits,
    machine,
    plan_for,
    ragged_prompts,
    save_tiny,
    tiny_model,
)
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.ir.workload import Workload
from dovetail.passes.choose import smallest_budget

CONTRACT = 1.5
"""Our error over transformers' own, at most."""
NEW = 8
LENGTHS = (5, 40, 1, 17, 9, 33, 3, 22, 8, 8, 27, 14, 2, 36, 11, 19)
PROMPTS = ragged_prompts(LENGTHS, seed=0) + ragged_prompts(LENGTHS, seed=1)
FORCED = ragged_prompts([NEW] * len(PROMPTS), seed=2)
WORKLOAD = Workload.of([len(prompt) for prompt in PROMPTS], NEW)
# Budgets as shares of the weights, beyond the least that runs.
SCHEDULES = {"auto": 4.0, "module_batch": 0.5, "weight_stream": 0.25}


@dataclass(frozen=True)
class Case:
    """A bfloat16 checkpoint, the float32 model's logits, and transformers' own error in bfloat16:
    a value for every token, averaged over the vocabulary."""

    tiny: Tiny
    exact: Tensor
    their_error: Tensor


def model_logits(model: PreTrainedModel) -> Tensor:
    """Logits ``[prompts * new, vocab]`` for the forced tokens, one prompt at a time."""
    found = []
    with torch.inference_mode():
        for prompt, forced in zip(PROMPTS, FORCED, strict=True):
            ids = torch.tensor([prompt + forced])
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits
            found.append(logits[0, len(prompt) - 1 : -1].float())
    return torch.cat(found)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Captured once for all tests of a family."""
    family: str = request.param
    model = tiny_model(family, torch.bfloat16)
    tiny = save_tiny(model, tmp_path_factory.mktemp(family))
    assert tiny.captured.graph.dtype == "bfloat16"
    exact = model_logits(torch.nn.Module.to(copy.deepcopy(model), torch.float32))
    model.set_attn_implementation("eager")
    return Case(tiny, exact, (model_logits(model) - exact).abs().mean(-1))


@pytest.mark.parametrize("policy", SCHEDULES)
def test_error_within_the_contract(case: Case, policy: str) -> None:
    least = smallest_budget(case.tiny.captured.graph, machine("bfloat16"), WORKLOAD)
    budget = least + int(SCHEDULES[policy] * case.tiny.weight_bytes)
    plan = plan_for(case.tiny, PROMPTS, NEW, budget, policy)
    ours = torch.cat(forced_logits(case.tiny, plan, PROMPTS, FORCED))
    error = (ours - case.exact).abs().mean(-1)
    assert error.mean() <= CONTRACT * case.their_error.mean()
    # The mean is of few tokens whose routing tips over; the median is of the rest.
    assert error.median() <= CONTRACT * case.their_error.median()
    assert error.median() > 0
