"""Batch sizes and residency of GPU plans: the program's bound against simulated schedules."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ir_cases import captured
from tests.test_gpu_choose import GPU, MACHINE, sizes

from dovetail.ir.errors import BoundError
from dovetail.ir.machine import Machine
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.passes.gpu.batch_tables import BatchTables
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.gpu.residency import NAME, Residency, inside, residency, shortage
from dovetail.passes.gpu.table_setting import EXPERT_ROWS, UNIT, Sizes
from dovetail.passes.gpu.tables import Tables
from dovetail.passes.policies.common import Knobs
from dovetail.passes.policies.gpu import DEFAULTS, GpuSetting, ladders, moves
from dovetail.solvers.batch_problem import check, check_batch
from dovetail.solvers.batch_residency import solve

SMALL = Workload.of([24, 20, 9, 9, 3, 1], 6)


def setting(family: str, share: float, ram: float, workload: Workload = SMALL) -> GpuSetting:
    """A setting with budgets as shares of the weights."""
    budget = sizes(family, share, ram)
    return GpuSetting(captured(family), MACHINE, budget["hbm"], budget["ram"], workload)


def simulated(where: GpuSetting, knobs: Knobs) -> float | None:
    """Seconds of a schedule, or None if it does not fit."""
    found = moves(where, knobs)
    if found is None:
        return None
    layout = apply_moves(where.graph, found)
    return (
        GpuPredictor(layout, GpuCosts(where.machine, where.graph.dtype))
        .predict(where.workload)
        .seconds
    )


@st.composite
def knob_points(draw: st.DrawFn, where: GpuSetting) -> Knobs:
    """Any point of the lattice that the program covers."""
    free = ["seqs", "rows", "prefill_tokens", "kv_hbm", "attention_cpu", "experts_cpu"]
    free += ["slots", "chunk", "refill", "streams", "expert_rows"]
    values = {**ladders(where), "expert_rows": EXPERT_ROWS}
    knobs = {name: draw(st.sampled_from(values[name])) for name in free}
    layers = draw(st.sampled_from([0, 0, 2]))
    return {**DEFAULTS, **knobs, "layers": layers, "accumulate": not layers, "paged": layers > 0}


@settings(max_examples=25)
@given(data=st.data(), family=st.sampled_from(["olmoe", "deepseek_v2"]))
def test_no_schedule_of_these_knobs_beats_the_bound(data: st.DataObject, family: str) -> None:
    share, ram = data.draw(st.floats(0.05, 3.0)), data.draw(st.floats(0.3, 3.0))
    new = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.sampled_from([3, 17, 40]), min_size=1, max_size=9))
    where = setting(family, share, ram, Workload.of(lengths, new))
    tables = Tables(where, GpuCosts(where.machine, where.graph.dtype))
    knobs = data.draw(knob_points(where))
    seconds = simulated(where, knobs)
    if seconds is None:
        return
    longest = where.workload.longest
    prefill = max(longest, min(int(knobs["prefill_tokens"]), int(knobs["seqs"]) * longest))
    batch = Sizes(int(knobs["seqs"]), prefill, bool(knobs["refill"]))
    place = tables.batches.index(batch)
    solved = solve([tables[place]], tables.capacities)
    assert solved.status != "infeasible", knobs
    assert solved.bound is not None and solved.bound * UNIT <= seconds * (1 + 1e-9), knobs
    floor = BatchTables(tables, batch).floor()
    assert floor <= solved.objective * (1 + 1e-9), knobs


def test_answers_fit_and_are_near_what_is_simulated() -> None:
    where = setting("olmoe", 0.3, 3.0)
    costs = GpuCosts(MACHINE, "float32")
    found = residency(where, costs, None)
    assert found.knobs and found.bound is not None
    seconds = [simulated(where, knobs) for knobs in found.knobs]
    assert all(s is not None and s >= found.bound for s in seconds)
    assert all(inside(knobs) for knobs in found.knobs)
    (certificate,) = found.certificate(min(s for s in seconds if s))
    assert certificate.name == NAME and certificate.gap < 0.5


def test_a_certificate_refuses_a_schedule_that_beats_its_bound() -> None:
    proved = Residency((), (), bound=2.0, work=1.0)
    with pytest.raises(BoundError, match=r"takes 1\.9 s, but .* less than 2 s: this is a defect"):
        proved.certificate(1.9)
    (certificate,) = proved.certificate(2.5)
    assert (certificate.bound, certificate.status) == (2.0, "feasible")
    # Sums of floats may end a little below the sum of the program's units.
    (certificate,) = proved.certificate(2.0 * (1 - 1e-12))
    assert certificate.bound <= certificate.objective and certificate.status == "optimal"


def test_a_known_schedule_that_none_can_reach_is_not_hidden_by_its_limit() -> None:
    where, costs = setting("olmoe", 0.3, 3.0), GpuCosts(MACHINE, "float32")
    impossible = (residency(where, costs, None).bound or 0.0) / 2
    found = residency(where, costs, impossible)
    assert not found.knobs
    with pytest.raises(BoundError, match="this is a defect of dovetail, please report it"):
        found.certificate(impossible)


def test_a_plan_whose_bound_is_contradicted_stands_without_proof(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def contradicted(self: Residency, seconds: float | None) -> None:
        raise BoundError("a schedule beats it")

    monkeypatch.setattr(Residency, "certificate", contradicted)
    made = choose(captured("olmoe"), MACHINE, sizes("olmoe", 0.3), SMALL)
    assert NAME not in {c.name for c in made.certificates} and made.prediction.seconds > 0
    assert "a schedule beats it; the plan stands, without proof" in caplog.text


def test_the_bound_is_only_claimed_for_what_the_program_covers() -> None:
    assert inside({"seqs": 4}) and inside({"expert_rows": 2048})
    assert inside({"layers": 2, "accumulate": False, "barrier": True})
    for knobs in ({"expert_rows": 64}, {"layers": 2}, {"one_batch": True}, {"dense_slots": 1}):
        assert not inside(knobs), knobs


def test_tables_are_well_formed_and_answers_keep_their_limits() -> None:
    where = setting("deepseek_v2", 0.3, 0.8)
    tables = Tables(where, GpuCosts(MACHINE, "float32"))
    for place in (0, len(tables) // 2, len(tables) - 1):
        check_batch(tables[place])
        solved = solve([tables[place]], tables.capacities)
        (choice,) = solved.value.choices
        assert check(tables[place], tables.capacities, choice) == []


def test_a_budget_that_fits_nothing_names_its_tiers() -> None:
    where, costs = replace(setting("olmoe", 1.0, 3.0), hbm=1000), GpuCosts(MACHINE, "float32")
    found = shortage(where, costs)
    assert found.binding == ("hbm",) and found.least["hbm"] > 1000
    # With as little hbm as works beside all that ram, no ram is too little.
    both = shortage(replace(where, hbm=found.least["hbm"] + 4096, ram=1000), costs)
    assert both.binding == ("hbm", "ram") and both.least["ram"] > 1000


def test_nothing_is_short_where_something_fits() -> None:
    assert shortage(setting("olmoe", 1.0, 3.0), GpuCosts(MACHINE, "float32")).binding == ()


def test_more_gpus_bound_less() -> None:
    two: Machine = replace(MACHINE, accelerator=replace(GPU, count=2, peer_bandwidth=2e10))
    one = setting("olmoe", 0.3, 3.0)
    bounds = []
    for machine in (MACHINE, two):
        where = replace(one, machine=machine)
        found = residency(where, GpuCosts(machine, "float32"), None)
        assert found.bound is not None
        bounds.append(found.bound)
    assert bounds[1] < bounds[0]
