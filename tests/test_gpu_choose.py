"""Plans for machines with a GPU: budgets, bounds, `auto` against policies, and their identities."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ir_cases import captured

from dovetail.capture.captured import Captured
from dovetail.ir.errors import BudgetError, InputError, PlanError, VerifyError
from dovetail.ir.machine import Accelerator, Curve, Machine
from dovetail.ir.moves import Assign, Dispatch, Place
from dovetail.ir.plan import Plan, load_plan, save_plan
from dovetail.ir.workload import Workload
from dovetail.machine_files import save_machine
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.passes.gpu.bound import STEP, gpu_bound, shared_seconds
from dovetail.passes.gpu.cost import GpuCosts, Shape
from dovetail.passes.gpu.phases import phases, waves
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.gpu.residency import NAME
from dovetail.passes.loop.body import StepWork
from dovetail.passes.loop.simulate import pace
from dovetail.passes.lower import lower
from dovetail.passes.policies.gpu import DEFAULTS, GPU_POLICIES, GpuSetting, moves
from dovetail.passes.predict import peaks, verify_layout
from dovetail.planning import Model, Request, plan_here

RATE = Curve((1.0, 64.0, 1024.0), (1e9, 2e10, 5e10))
FAST = Curve((1.0, 64.0, 1024.0), (1e10, 2e11, 1e12))
GPU = Accelerator(
    name="paper gpu",
    count=1,
    gemm={"float32": FAST},
    attention={"float32": FAST},
    hbm_bandwidth=1e11,
    op_seconds=5e-6,
    h2d=Curve((4096.0, 1e6), (1e9, 4e9)),
    d2h=Curve((4096.0, 1e6), (1e9, 4e9)),
)
MACHINE = Machine(
    name="paper",
    tiers={"ram": 1 << 30, "hbm": 1 << 28, "disk": 1 << 40},
    workers=4,
    gemm={"float32": RATE},
    attention={"float32": RATE},
    kv_bandwidth={"float32": Curve((1.0,), (5e9,))},
    memory_bandwidth=1e10,
    op_seconds=2e-6,
    disk=Curve((4096.0, 1e6), (1e8, 1e9)),
    slowdown={"cpu|cpu": 0.9},
    accelerator=GPU,
)
WORKLOAD = Workload.of([24, 20, 9, 9, 3, 1], 6)


def sizes(family: str, share: float, ram: float = 3.0) -> dict[str, int]:
    """Budgets as shares of the weights."""
    weights = captured(family).weight_bytes
    return {"hbm": int(share * weights) + (2 << 20), "ram": int(ram * weights) + (8 << 20)}


@functools.cache
def plan(family: str, share: float, policy: str) -> Plan | None:
    """The plan, or None where the policy does not fit."""
    try:
        return choose(captured(family), MACHINE, sizes(family, share), WORKLOAD, policy)
    except BudgetError:
        return None


@pytest.mark.parametrize(
    ("family", "share"),
    [("olmoe", 0.6), ("olmoe", 4.0), ("deepseek_v2", 0.1), ("deepseek_v2", 0.6)],
)
def test_auto_is_never_predicted_worse_than_a_policy(family: str, share: float) -> None:
    auto = plan(family, share, "auto")
    assert auto is not None
    for policy in GPU_POLICIES:
        one = plan(family, share, policy)
        if one is not None:
            assert auto.prediction.seconds <= one.prediction.seconds * (1 + 1e-9), policy
    assert {c.policy for c in auto.candidates} == set(GPU_POLICIES)


@settings(max_examples=8)
@given(
    family=st.sampled_from(["olmoe", "deepseek_v2"]),
    share=st.floats(0.05, 3.0),
    ram=st.floats(0.3, 3.0),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    new=st.integers(1, 8),
)
def test_every_plan_is_legal_within_budget_and_above_its_bound(
    family: str, share: float, ram: float, lengths: list[int], new: int
) -> None:
    graph, workload, budget = captured(family), Workload.of(lengths, new), sizes(family, share, ram)
    for policy in ("module_batch", "cgopipe", "hybrid_cpu_gpu", "nano_overlap"):
        try:
            made = choose(graph, MACHINE, budget, workload, policy)
        except BudgetError as error:
            assert "no schedule tried fits" in str(error)
            continue
        layout = apply_moves(graph, made.moves)
        verify_layout(layout, MACHINE, budget, workload)
        assert all(peak <= budget[tier] for tier, peak in peaks(layout, MACHINE).items())
        assert made.prediction.seconds >= made.bound.seconds
        assert made.prediction.tokens == workload.prompts * new


def setting(family: str = "olmoe", share: float = 1.0) -> GpuSetting:
    """A setting with budgets as shares of the weights."""
    budget = sizes(family, share)
    return GpuSetting(captured(family), MACHINE, budget["hbm"], budget["ram"], WORKLOAD)


def step_seconds(knobs: dict[str, int | bool], work: StepWork, share: float = 0.3) -> float:
    """Seconds of one step of these knobs."""
    found = moves(setting(share=share), {**DEFAULTS, **knobs})
    assert found is not None
    layout = apply_moves(captured("olmoe"), found)
    return GpuPredictor(layout, GpuCosts(MACHINE, "float32")).step(work)[0]


DECODE = StepWork(Shape(6, 1, 20), None)


def test_module_batch_with_one_group_is_model_batch() -> None:
    one = step_seconds({"seqs": 6, "rows": 6, "layers": 2}, DECODE)
    other = step_seconds({"seqs": 6, "rows": 6, "accumulate": False, "layers": 2}, DECODE)
    assert one == pytest.approx(other, rel=0.02)


def test_one_stream_runs_attention_and_products_in_turn() -> None:
    knobs = {"seqs": 6, "rows": 6, "kv_hbm": 100}
    layout = apply_moves(captured("olmoe"), moves(setting(share=3.0), {**DEFAULTS, **knobs}) or ())
    predictor = GpuPredictor(layout, GpuCosts(MACHINE, "float32"))
    loop = predictor.loop(DECODE, 0)
    assert set(loop.order) == {"gpu0"}
    assert pace(loop).period == pytest.approx(loop.loads()["gpu0"])


def test_period_is_never_below_the_busiest_engine() -> None:
    paged = {"accumulate": False, "layers": 2, "paged": True, "attention_cpu": 100, "rows": 2}
    for knobs in (
        {"rows": 2},
        {"rows": 2, "attention_cpu": 50},
        {"rows": 3, "experts_cpu": 50},
        paged,
    ):
        found = moves(setting(share=0.3), {**DEFAULTS, "seqs": 6, **knobs})
        layout = apply_moves(captured("olmoe"), found or ())
        loop = GpuPredictor(layout, GpuCosts(MACHINE, "float32")).loop(DECODE, 0)
        assert pace(loop).period >= max(loop.loads().values()) * (1 - 1e-9)


def test_two_kinds_of_work_are_shared_by_comparative_advantage() -> None:
    assert shared_seconds((11, 11), ((10, 1), (1, 10))) == pytest.approx(1.1)
    assert shared_seconds((10, 0), ((4, 1), (1, 3))) == pytest.approx(2)
    assert shared_seconds((30, 4), ((10, 1), (1, 2))) == pytest.approx(32 / 11)


def test_waves_hold_every_prompt_once() -> None:
    workload = Workload(((9, 3), (7, 10), (2, 1)), 4)
    for seqs in range(1, 20):
        found = list(waves(workload, seqs))
        assert sum(each * count for each, _, count in found) == 14
        assert max(each for each, _, _ in found) <= seqs


def test_lower_refuses_a_schedule_for_a_gpu() -> None:
    layout = apply_moves(captured("olmoe"), moves(setting(), {"seqs": 2}) or ())
    with pytest.raises(VerifyError, match="none for this machine's processor: plan again"):
        lower(layout, {})


@settings(max_examples=2)
@given(
    family=st.sampled_from(["olmoe", "deepseek_v2"]),
    share=st.floats(0.05, 1.0),
    ram=st.floats(0.5, 2.0),
    more=st.floats(1.0, 3.0),
)
def test_more_memory_is_never_predicted_slower_than_what_is_proved(
    family: str, share: float, ram: float, more: float
) -> None:
    graph = captured(family)
    try:
        less = choose(graph, MACHINE, sizes(family, share, ram), WORKLOAD)
    except BudgetError:
        return
    roomier = choose(graph, MACHINE, sizes(family, more * share, more * ram), WORKLOAD)
    (proved,) = (c for c in roomier.certificates if c.name == NAME)
    # A bound of more memory is a bound of less: what is slower is so by no more than the gap.
    assert proved.bound <= less.prediction.seconds * (1 + 1e-9)
    assert roomier.prediction.seconds <= proved.objective
    assert roomier.prediction.seconds <= less.prediction.seconds / (1 - proved.gap) * (1 + 1e-9)
    # The bound looks at numbers of passes that are a step apart.
    assert roomier.bound.seconds <= less.bound.seconds * STEP


def test_kv_leaves_less_memory_for_weights() -> None:
    graph, budget = captured("olmoe"), sizes("olmoe", 0.2, 0.4)
    few, many = (Workload.of([20] * count, 40) for count in (8, 800))
    less, more = (gpu_bound(graph, MACHINE, budget, each).parts["disk"] for each in (few, many))
    assert more > less > 0


def test_two_gpus_are_predicted_faster_than_one() -> None:
    budget = sizes("olmoe", 1.0)
    two = replace(MACHINE, accelerator=replace(GPU, count=2, peer_bandwidth=2e10))
    one = choose(captured("olmoe"), MACHINE, budget, WORKLOAD, "module_batch")
    both = choose(captured("olmoe"), two, budget, WORKLOAD, "module_batch")
    assert both.prediction.seconds < one.prediction.seconds


def test_a_plan_with_a_gpu_survives_its_file(tmp_path: Path) -> None:
    made = plan("olmoe", 0.6, "auto")
    assert made is not None
    save_plan(made, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made


def test_a_run_on_the_processor_refuses_a_plan_for_a_gpu(tmp_path: Path) -> None:
    made = plan("olmoe", 0.6, "auto")
    assert made is not None
    save_plan(made, tmp_path / "plan.json")
    request = Request("m", {"ram": 1 << 30}, WORKLOAD, plan=str(tmp_path / "plan.json"))
    model = Model(Captured(captured("olmoe"), {}, 0.0))
    machine = tmp_path / "machine.json"
    save_machine(MACHINE, machine)
    with pytest.raises(PlanError, match="the plan is for the GPU of paper; schedules for GPUs"):
        plan_here(replace(request, machine=str(machine)), print, model)


def test_choose_refuses_a_budget_too_small() -> None:
    with pytest.raises(BudgetError, match=r"no schedule tried fits .*one sequence at a time needs"):
        choose(captured("olmoe"), MACHINE, {"hbm": 1000, "ram": 1 << 30}, WORKLOAD)


def test_choose_refuses_an_unknown_policy() -> None:
    with pytest.raises(InputError, match="policy 'best' is not known here; choose one of auto"):
        choose(captured("olmoe"), MACHINE, sizes("olmoe", 1.0), WORKLOAD, "best")


def test_place_in_hbm_refuses_a_schedule_without_a_gpu() -> None:
    with pytest.raises(VerifyError, match=r"needs a GPU; put assign\(all, gpu, 100\) before it"):
        found = moves(setting(), {**DEFAULTS, "seqs": 2}) or ()
        apply_moves(captured("olmoe"), [m for m in found if not isinstance(m, Assign)])


def test_shares_above_the_whole_are_refused() -> None:
    found = moves(setting(), {**DEFAULTS, "seqs": 2, "attention_cpu": 60}) or ()
    with pytest.raises(VerifyError, match="together more than 100 %"):
        apply_moves(captured("olmoe"), [*found, Place("kv", "hbm", (), 60)])


def test_refill_decodes_every_token_and_never_more_than_fit() -> None:
    workload = Workload(((9, 3), (7, 10), (2, 1)), 4)
    for seqs, prefill in ((1, 9), (4, 9), (8, 30), (14, 200)):
        dispatch = Dispatch(seqs, 1000, prefill, 9, refill=True)
        found = list(phases(dispatch, workload))
        decoded = sum(p.steps * p.work.decode.seqs for p in found if p.work.decode)
        prompts = sum(p.steps * p.work.prefill.seqs for p in found if p.work.prefill)
        assert prompts == pytest.approx(14)
        assert decoded == pytest.approx(14 * 3, rel=0.35)
        assert max(p.work.decode.seqs for p in found if p.work.decode) <= seqs


def test_refill_of_all_prompts_at_once_has_nothing_left_to_refill() -> None:
    workload = Workload(((64, 100),), 11)
    found = list(phases(Dispatch(100, 7500, 6400, 64, refill=True), workload))
    # Ten steps to take them in and ten in which they run out, half of them decoding on the mean.
    assert sum(p.steps for p in found) == pytest.approx(20)
    assert {p.work.decode.seqs for p in found if p.work.decode} == {50, 100}
