"""Experts placed by routing traces: what the planner makes of skewed loads, and what it proves."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.ir_cases import captured
from tests.test_gpu_choose import MACHINE, WORKLOAD, sizes

from dovetail.ir.errors import InputError, VerifyError
from dovetail.ir.moves import Assign, Place
from dovetail.ir.placement import experts_of
from dovetail.ir.plan import Certificate, Plan, load_plan, save_plan
from dovetail.ir.printer import print_plan
from dovetail.ir.workload import Routing, Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.passes.expert_loads import ANY, ExpertLoads
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.memory import tier_bytes
from dovetail.passes.gpu.place import place
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.policies.gpu import DEFAULTS, GpuSetting
from dovetail.passes.policies.gpu import moves as gpu_moves
from dovetail.passes.predict import verify_layout
from dovetail.routing.of_workload import with_routing
from dovetail.routing.trace import make_trace, save_trace
from dovetail.solvers.tier_placement import step_seconds

GRAPH = captured("olmoe")
LAYERS = len(GRAPH.layers)
COUNT = (experts_of(GRAPH, 0) or pytest.fail("no experts")).count
# What hbm does not hold is copied: none of it is the CPU's.
DEALT = {"seqs": 2, "kv_hbm": 100, "experts_cpu": 1, "by_load": True}


def skewed(name: str, hot: Sequence[int], share: float = 0.95) -> Routing:
    """A trace in which ``share`` of the choices fall on the ``hot`` experts of every layer."""
    cold = 1000 * (1 - share) / (COUNT - len(hot))
    loads = tuple(
        round(1000 * share / len(hot)) if e in hot else max(1, round(cold)) for e in range(COUNT)
    )
    return Routing(name, "0" * 64, 1000, (loads,) * LAYERS)


def setting(*traces: Routing, share: float = 0.25) -> GpuSetting:
    budget = sizes("olmoe", share)
    workload = replace(WORKLOAD, routing=traces)
    return GpuSetting(GRAPH, MACHINE, budget["hbm"], budget["ram"], workload)


def seconds(where: GpuSetting, moves: Sequence[object]) -> float:
    costs = GpuCosts(MACHINE, "float32", where.workload.routing)
    layout = apply_moves(GRAPH, moves)  # type: ignore[arg-type]
    return GpuPredictor(layout, costs).predict(where.workload).seconds


def test_experts_that_tokens_choose_are_placed_in_hbm() -> None:
    hot = (1, 5, 6)
    where = setting(skewed("one domain", hot))
    moves = gpu_moves(where, {**DEFAULTS, **DEALT})
    assert moves is not None
    placed = place(where, moves)
    assert placed is not None
    named = [m for m in placed.moves if isinstance(m, Place) and m.which and m.tier == "hbm"]
    assert len(named) == LAYERS and all(set(hot) <= set(m.which) for m in named)
    assert seconds(where, placed.moves) < seconds(where, moves)
    layout = apply_moves(GRAPH, placed.moves)
    used = tier_bytes(layout, 1)
    assert sum(used["hbm"].values()) <= where.hbm and sum(used["ram"].values()) <= where.ram
    certificate = placed.certificate(layout)
    assert certificate.bound <= certificate.objective
    assert certificate.status == "optimal" or certificate.bound > 0.99 * certificate.objective
    before = placed.certificate(apply_moves(GRAPH, moves))
    assert before.objective >= certificate.objective


def test_a_placement_for_several_traces_is_the_best_in_the_worst_of_them() -> None:
    one, other = skewed("code", (0, 1, 2)), skewed("prose", (5, 6, 7))
    both = setting(one, other, share=0.25)
    moves = gpu_moves(both, {**DEFAULTS, **DEALT})
    assert moves is not None
    robust = place(both, moves)
    assert robust is not None
    worst = robust.certificate(apply_moves(GRAPH, robust.moves)).objective
    for trace in (one, other):
        alone = place(setting(trace, share=0.25), moves)
        assert alone is not None
        # The same items under both traces: what the placement for one costs under the other.
        assert worst <= robust.certificate(apply_moves(GRAPH, alone.moves)).objective * (1 + 1e-9)


def test_plans_with_a_trace_are_legal_and_say_what_it_gives(tmp_path: Path) -> None:
    budget = sizes("olmoe", 0.4)
    workload = Workload(((20, 2),), 8, (skewed("chat.npz", (1, 5, 6)),))
    made = choose(GRAPH, MACHINE, budget, workload)
    assert any(c.name.startswith("placement: ") for c in made.certificates)
    assert all(c.bound <= c.objective * (1 + 1e-9) for c in made.certificates)
    save_plan(made, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == made
    verify_layout(apply_moves(GRAPH, again.moves), MACHINE, budget, workload)
    assert "chat.npz" in print_plan(again)
    for policy in ("hybrid_cpu_gpu", "module_batch"):
        one = choose(GRAPH, MACHINE, budget, workload, policy)
        assert made.prediction.seconds <= one.prediction.seconds * (1 + 1e-9)


def test_without_a_trace_the_placement_is_proved_too() -> None:
    made: Plan = choose(GRAPH, MACHINE, sizes("olmoe", 0.4), WORKLOAD)
    found = [c for c in made.certificates if c.name.startswith("placement: ")]
    assert len(found) == 1 and "uniform routing" in found[0].name
    assert not any(isinstance(m, Place) and m.which for m in made.moves)


def test_a_plan_that_copies_nothing_can_be_printed() -> None:
    made = choose(GRAPH, MACHINE, sizes("olmoe", 8.0), WORKLOAD, "eager")
    nothing = Certificate("placement: copies of a step", 0.0, 0.0, "optimal")
    assert "gap 0.0%" in print_plan(replace(made, certificates=(nothing,)))


def test_loads_add_up_whatever_the_routing() -> None:
    experts = experts_of(GRAPH, 0)
    assert experts is not None
    for routing in ((), (skewed("a", (1, 5, 6)),)):
        loads = ExpertLoads(routing)
        for layer in (0, ANY):
            rows = sum(load.count * load.rows for load in loads.of(layer, experts, None, 50))
            assert rows == pytest.approx(50 * experts.top_k, rel=0.2)
            assert loads.draws(layer, experts, 50).sum() == len(loads.draws(layer, experts, 50)) * (
                50 * experts.top_k
            )
    skew, even = ExpertLoads((skewed("a", (1, 5, 6)),)), ExpertLoads()
    assert skew.hit(0, experts, 4).sum() < even.hit(0, experts, 4).sum()


def test_routing_of_another_model_is_refused(tmp_path: Path) -> None:
    chosen = np.tile(np.arange(2, dtype=np.int16), (6, LAYERS + 1, 1))
    trace = make_trace(chosen, COUNT, model="other")
    save_trace(trace, tmp_path / "t.npz")
    with pytest.raises(InputError, match=r"is of other with .* layers, found a model with"):
        with_routing(WORKLOAD, [tmp_path / "t.npz"], GRAPH)
    save_trace(make_trace(chosen[:, :LAYERS], COUNT), tmp_path / "u.npz")
    found = with_routing(WORKLOAD, [tmp_path / "u.npz"], GRAPH).routing[0]
    assert found.name == "u.npz" and found.loads[0][:3] == (6, 6, 0)


def test_named_experts_refuse_what_cannot_be() -> None:
    where = setting()
    moves = gpu_moves(where, {**DEFAULTS, **DEALT})
    assert moves is not None
    with pytest.raises(VerifyError, match="expected distinct experts from 0 to"):
        apply_moves(GRAPH, [*moves, Place("experts", "hbm", (0,), 2, (1, 1))])
    no_gpu = [m for m in moves if not isinstance(m, Assign)]
    no_gpu = [m for m in no_gpu if not (isinstance(m, Place) and m.tier == "hbm")]
    with pytest.raises(VerifyError, match="without a GPU every expert"):
        apply_moves(GRAPH, [*no_gpu, Place("experts", "ram", (0,), 1, (1,))])


def test_step_seconds_of_a_certificate_are_those_of_its_problem() -> None:
    where = setting(skewed("one", (2,)))
    moves = gpu_moves(where, {**DEFAULTS, **DEALT})
    assert moves is not None
    placed = place(where, moves)
    assert placed is not None
    everything_on_disk = step_seconds(placed.problem, [2] * len(placed.units))
    assert placed.bound < max(everything_on_disk)
