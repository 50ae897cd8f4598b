"""Every family, policy and budget gives the greedy tokens of transformers' own ``generate``."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tests.e2e.support import (
    FAMILIES,
    Knobs,
    Tiny,
    generate,
    machine,
    plan_for,
    ragged_prompts,
    save_tiny,
    tiny_model,
    transformers_tokens,
)

from dovetail.ir.errors import BudgetError
from dovetail.ir.units import format_bytes, parse_bytes
from dovetail.ir.workload import Workload
from dovetail.passes.choose import smallest_budget

NEW = 12
LENGTHS = (5, 40, 1, 17, 9, 33, 3, 22, 8, 8)
PROMPTS = ragged_prompts(LENGTHS)
# Budgets as shares of the weights.
SHARES = {"ample": 4.0, "half": 0.5, "quarter": 0.25}
# The other policies' own moves are in test_policies_equal.
NAMES = ("auto", "eager", "model_batch", "weight_stream", "module_batch")
# ``eager`` keeps every weight, ``model_batch`` three buffers of a layer's experts.
MAY_REFUSE = {"half": {"eager"}, "quarter": {"eager", "model_batch"}}
# Corner cases of the schedules that the search need not choose on a machine like this one: tiles
# that do not divide, refill, one expert at a time, more workers than sequences, one buffer.
SCHEDULES: dict[str, Knobs] = {
    "refill": {"seqs": 3, "rows": 2, "attn_tokens": 40, "prefill_tokens": 64, "workers": 2},
    "one_by_one": {"seqs": 1, "rows": 1, "attn_tokens": 1, "prefill_tokens": 1, "workers": 3},
    "odd_tiles": {"seqs": 7, "rows": 3, "attn_tokens": 50, "prefill_tokens": 90, "workers": 2,
                  "expert_rows": 5, "head_rows": 2},
    "many_workers": {"seqs": 10, "rows": 4, "attn_tokens": 99, "prefill_tokens": 400, "workers": 4,
                     "head_rows": 3},
    "waves": {"seqs": 4, "rows": 4, "attn_tokens": 200, "prefill_tokens": 200, "workers": 1,
              "refill": False},
    "one_buffer": {"seqs": 10, "rows": 10, "attn_tokens": 64, "prefill_tokens": 70, "workers": 2,
                   "slots": 1, "dense_slots": 1, "chunk": 8, "resident": 0, "embed": False},
    "some_resident": {"seqs": 8, "rows": 8, "attn_tokens": 64, "prefill_tokens": 128, "workers": 2,
                      "chunk": 4, "resident": 2_000_000},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A family's checkpoint and what transformers makes of the prompts."""

    tiny: Tiny
    expected: list[tuple[int, ...]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Captured once for all tests of a family."""
    family: str = request.param
    tiny = save_tiny(tiny_model(family), tmp_path_factory.mktemp(family))
    return Case(tiny, transformers_tokens(tiny.model, PROMPTS, NEW))


@pytest.fixture(scope="module")
def combinations(pytestconfig: pytest.Config) -> Iterator[list[str]]:
    """Collects what ran, and says how many at the end."""
    ran: list[str] = []
    yield ran
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{len(ran)} combinations of family, policy and budget gave equal tokens")


def differing(case: Case, tokens: dict[int, tuple[int, ...]]) -> dict[int, object]:
    """The prompts whose tokens differ, with what was found and what transformers gave."""
    assert sorted(tokens) == list(range(len(PROMPTS)))
    return {
        index: (tokens[index], expected)
        for index, expected in enumerate(case.expected)
        if tokens[index] != expected
    }


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("policy", NAMES)
def test_tokens_equal_transformers(
    case: Case, policy: str, share: str, combinations: list[str]
) -> None:
    budget = int(SHARES[share] * case.tiny.weight_bytes)
    try:
        plan = plan_for(case.tiny, PROMPTS, NEW, budget, policy)
    except BudgetError as error:
        assert policy in MAY_REFUSE.get(share, set()), str(error)
        least = smallest_budget(case.tiny.captured.graph, machine(), Workload.of(LENGTHS, NEW))
        assert f"policy {policy!r} has no schedule that fits" in str(error)
        assert f"the leanest needs {format_bytes(least, up=True)}" in str(error)
        return
    assert policy in ("auto", plan.policy)
    assert plan.prediction.peak_bytes <= budget
    outcome = generate(case.tiny, plan, dict(enumerate(PROMPTS)), NEW)
    assert differing(case, outcome.tokens) == {}
    assert set(outcome.reasons.values()) == {"length"}
    assert outcome.pools_peak <= plan.prediction.peak_bytes
    combinations.append(f"{policy} {share}")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_equal_transformers_on_corner_schedules(case: Case, schedule: str) -> None:
    budget = 4 * case.tiny.weight_bytes
    knobs = {"chunk": 1, "slots": 3} | dict(SCHEDULES[schedule])
    plan = plan_for(case.tiny, PROMPTS, NEW, budget, "module_batch", knobs)
    outcome = generate(case.tiny, plan, dict(enumerate(PROMPTS)), NEW)
    assert differing(case, outcome.tokens) == {}
    assert outcome.pools_peak <= plan.prediction.peak_bytes


def test_smallest_budget_gives_equal_tokens(case: Case) -> None:
    few, new = PROMPTS[:4], 5
    workload = Workload.of([len(prompt) for prompt in few], new)
    least = smallest_budget(case.tiny.captured.graph, machine(), workload)
    named = parse_bytes(format_bytes(least, up=True))
    outcome = generate(case.tiny, plan_for(case.tiny, few, new, named), dict(enumerate(few)), new)
    assert outcome.tokens == {i: case.expected[i][:new] for i in range(len(few))}
