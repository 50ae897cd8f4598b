"""Plans on small graphs: `auto` against policies, peaks against budgets, times against bounds."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ir_cases import captured

from dovetail.ir.errors import BudgetError, InputError
from dovetail.ir.machine import Curve, Machine
from dovetail.ir.plan import Plan, load_plan, save_plan
from dovetail.ir.verify import verify_program
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose, smallest_budget
from dovetail.passes.lower import lower
from dovetail.passes.policies import POLICIES, module_batch
from dovetail.passes.policies.common import Setting

RATE = Curve((1.0, 64.0, 1024.0), (1e9, 2e10, 5e10))
MACHINE = Machine(
    name="paper",
    tiers={"ram": 1 << 30},
    workers=2,
    gemm={"float32": RATE},
    attention={"float32": RATE},
    kv_bandwidth={"float32": Curve((1.0,), (1e10,))},
    memory_bandwidth=1e10,
    op_seconds=2e-6,
    disk=Curve((4096.0, 1e6), (1e8, 1e9)),
    slowdown={"cpu|cpu": 0.9, "cpu|disk": 0.95, "disk|cpu": 0.8},
)
WORKLOAD = Workload.of([24, 20, 9, 9, 3, 1], 6)


@functools.cache
def plan(family: str, budget: int, policy: str) -> Plan | None:
    """The plan, or None where the policy does not fit."""
    try:
        return choose(captured(family), MACHINE, {"ram": budget}, WORKLOAD, policy)
    except BudgetError:
        return None


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
@pytest.mark.parametrize("share", [1.0, 1.5, 4.0, 100.0])
def test_auto_is_never_predicted_worse_than_a_policy(family: str, share: float) -> None:
    budget = int(share * smallest_budget(captured(family), MACHINE, WORKLOAD))
    auto = plan(family, budget, "auto")
    assert auto is not None
    for policy in POLICIES:
        one = plan(family, budget, policy)
        if one is not None:
            assert auto.prediction.seconds <= one.prediction.seconds
    assert {c.policy for c in auto.candidates} == set(POLICIES)


@settings(max_examples=12)
@given(
    family=st.sampled_from(["olmoe", "deepseek_v2"]),
    share=st.floats(1.0, 30.0),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    new=st.integers(1, 8),
)
def test_every_plan_is_legal_within_budget_and_above_its_bound(
    family: str, share: float, lengths: list[int], new: int
) -> None:
    graph, workload = captured(family), Workload.of(lengths, new)
    budget = int(share * smallest_budget(graph, MACHINE, workload))
    for policy in POLICIES:
        try:
            made = choose(graph, MACHINE, {"ram": budget}, workload, policy)
        except BudgetError as error:
            assert "has no schedule that fits" in str(error)
            continue
        verify_program(lower(apply_moves(graph, made.moves), {"ram": budget}), graph)
        assert made.prediction.peak_bytes <= budget
        assert made.prediction.seconds >= made.bound.seconds
        assert made.prediction.tokens == workload.prompts * new


def test_the_smallest_budget_works_and_one_byte_less_is_refused() -> None:
    graph = captured("olmoe")
    least = smallest_budget(graph, MACHINE, WORKLOAD)
    assert choose(graph, MACHINE, {"ram": least}, WORKLOAD).prediction.peak_bytes <= least
    with pytest.raises(BudgetError, match="the leanest schedule needs ram="):
        choose(graph, MACHINE, {"ram": least - 1}, WORKLOAD)


def test_a_search_near_another_plans_candidates_begins_and_stays_with_them() -> None:
    graph = captured("olmoe")
    budget = {"ram": 2 * smallest_budget(graph, MACHINE, WORKLOAD)}
    whole = choose(graph, MACHINE, budget, WORKLOAD)
    best = min((c for c in whole.candidates if c.seconds), key=lambda c: c.seconds or 0.0)
    near = choose(graph, MACHINE, budget, WORKLOAD, near=[best])
    assert {c.policy for c in near.candidates} == {best.policy}
    assert near.prediction.seconds <= whole.prediction.seconds * (1 + 1e-9)


def test_choose_refuses_an_unknown_policy() -> None:
    with pytest.raises(InputError, match="'best' is not known; choose one of auto, eager"):
        choose(captured("olmoe"), MACHINE, {"ram": 1 << 30}, WORKLOAD, "best")


def test_equal_batches_make_module_batching_model_batching() -> None:
    setting = Setting(captured("olmoe"), MACHINE, 1 << 30, WORKLOAD)
    knobs = {"seqs": 4, "chunk": 2, "slots": 2, "expert_rows": 64, "embed": True}
    equal = {**knobs, **module_batch.equal_batches(setting, 4)}
    one = POLICIES["model_batch"].moves(setting, knobs)
    assert one is not None and one == POLICIES["module_batch"].moves(setting, equal)


def test_same_inputs_same_digest_and_the_file_keeps_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    graph = captured("olmoe")
    first, second = (choose(graph, MACHINE, {"ram": 3 << 20}, WORKLOAD) for _ in range(2))
    assert first.digest() == second.digest()
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    save_plan(first, path)
    assert load_plan(path) == first
