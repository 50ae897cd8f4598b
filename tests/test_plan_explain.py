"""`dovetail plan explain`: what binds, what more of a resource gives, and why not the second."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.plan_cases import GPU, MACHINE, WORKLOAD, few_policies, save_beside, small_plan

from dovetail.cli import main
from dovetail.ir.batching import Step
from dovetail.ir.machine import Machine
from dovetail.ir.plan import Candidate, Plan
from dovetail.ir.program import Free, Load, Run, unroll
from dovetail.ir.task_graph import TaskGraph
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.passes.cost import Costs
from dovetail.passes.engine_use import engine_use
from dovetail.passes.replay import buffers_held, replay_step
from dovetail.passes.sensitivity import (
    GIB,
    Effect,
    Resource,
    Sensitivity,
    curve,
    policy_of,
    resources,
    with_amount,
)
from dovetail.passes.simulate import Simulator, workload_steps
from dovetail.plans.explain import Explanation, Facts, explain, reasons
from dovetail.plans.explain_text import explanation_text
from dovetail.plans.words import more_text, wait_text

Made = tuple[TaskGraph, Plan]


_few_policies = pytest.fixture(autouse=True, scope="module")(few_policies)


@pytest.fixture(scope="module")
def made() -> Made:
    return small_plan()


@pytest.fixture(scope="module")
def quick() -> Made:
    """A plan that is solved again in no time, because one simple policy was asked for."""
    return small_plan("weight_stream")


@pytest.fixture(scope="module")
def explained(made: Made) -> Explanation:
    return explain(*made, quiet)


@pytest.fixture(scope="module")
def solved(explained: Explanation) -> Sensitivity:
    return explained.sensitivity


def quiet(text: str) -> None:
    """Nobody wants to know what is being solved."""


def middle_step(simulator: Simulator) -> Step:
    steps = list(workload_steps(simulator.layout, WORKLOAD))
    return steps[len(steps) // 2]


def simulator_of(made: Made) -> Simulator:
    return Simulator(apply_moves(made[0], made[1].moves), MACHINE, Costs(MACHINE))


def test_every_resource_is_tried_and_more_never_costs_time(solved: Sensitivity) -> None:
    names = {(effect.resource.kind, effect.resource.name) for effect in solved.effects}
    assert names == {("tier", "ram"), ("link", "disk"), ("rate", "cpu")}
    assert all(solved.gain(effect) >= 0 for effect in solved.effects)
    times = [effect.seconds or 0.0 for effect in solved.effects]
    assert times == sorted(times)


def test_an_effect_is_at_least_as_good_as_choosing_again(made: Made, solved: Sensitivity) -> None:
    graph, plan = made
    effect = solved.effects[0]
    machine, budget = with_amount(plan, effect.resource, effect.amount)
    again = choose(graph, machine, budget, plan.workload)
    assert effect.seconds is not None and effect.seconds <= again.prediction.seconds
    assert effect.seconds < plan.prediction.seconds


def test_the_plans_own_problem_takes_as_long_as_the_plan_says(
    made: Made, solved: Sensitivity
) -> None:
    assert solved.base.seconds == pytest.approx(made[1].prediction.seconds)


@pytest.mark.parametrize(("size", "more"), [(4 * GIB, GIB), (9 * GIB, GIB), (1000, 250)])
def test_a_large_budget_grows_by_a_gib_and_a_small_one_by_a_quarter(
    made: Made, size: int, more: int
) -> None:
    graph, plan = made
    found = resources(graph, replace(plan, budget={"ram": size}))
    assert found[0] == Resource("tier", "ram", size, more)


def test_resources_of_a_machine_with_a_gpu(made: Made) -> None:
    graph, plan = made
    machine = replace(MACHINE, accelerator=GPU)
    here = replace(plan, machine=machine, budget={"ram": 8 * GIB, "hbm": GIB})
    found = resources(graph, here)
    assert [(r.kind, r.name) for r in found] == [
        ("tier", "ram"),
        ("tier", "hbm"),
        *(("link", name) for name in ("disk", "h2d", "d2h", "peer")),
        ("rate", "cpu"),
        ("rate", "gpu"),
    ]
    for each in found:
        doubled, budget = with_amount(here, each, 2 * each.amount)
        assert amount_of(doubled, budget, each) == pytest.approx(2 * each.amount)
        others = [r for r in found if r != each]
        assert all(amount_of(doubled, budget, r) == pytest.approx(r.amount) for r in others)


def amount_of(machine: Machine, budget: dict[str, int], resource: Resource) -> float:
    gpu = machine.accelerator
    assert gpu is not None
    amounts = {
        "ram": budget["ram"],
        "hbm": budget["hbm"],
        "disk": machine.disk.peak,
        "h2d": gpu.h2d.peak,
        "d2h": gpu.d2h.peak,
        "peer": gpu.peer_bandwidth,
        "cpu": machine.gemm["float32"].peak,
        "gpu": gpu.gemm["float32"].peak,
    }
    return amounts[resource.name]


def test_a_curve_falls_and_says_where_nothing_fits(quick: Made) -> None:
    graph, plan = quick
    ram = resources(graph, plan)[0]
    base = Effect(ram, ram.amount, plan.prediction.seconds)
    points = curve(graph, plan, base, ram, (2.0, 0.25), quiet)
    assert [point.amount / ram.amount for point in points] == pytest.approx([0.25, 1, 2], rel=1e-6)
    assert points[0].seconds is None
    assert points[1].seconds is not None and points[2].seconds is not None
    assert points[2].seconds <= points[1].seconds


def test_a_curve_leaves_the_plan_where_it_is(quick: Made) -> None:
    graph, plan = quick
    ram = resources(graph, plan)[0]
    slow = Effect(ram, ram.amount, plan.prediction.seconds * 1e3)
    points = curve(graph, plan, slow, ram, (0.9, 1.5), quiet)
    assert [point.seconds == slow.seconds for point in points] == [False, True, False]


def test_solving_again_is_among_the_plans_policies(made: Made, quick: Made) -> None:
    assert policy_of(made[1]) == "auto"
    assert policy_of(quick[1]) == "weight_stream"


def test_engines_work_and_wait_all_the_time(made: Made) -> None:
    graph, plan = made
    use = engine_use(graph, plan)
    after_setup = plan.prediction.seconds - plan.prediction.setup_seconds
    assert {each.engine for each in use} >= {"cpu0", "disk0"}
    for each in use:
        assert each.seconds == pytest.approx(after_setup, rel=0.05)
        assert 0 < each.share <= 1
        assert each.busy + sum(each.waits.values()) <= each.seconds * 1.05
    waits = {what for each in use for what in each.waits}
    assert all(what.split(":")[0] in ("ready", "room", "phase") for what in waits)


def test_replay_gives_every_instruction_its_time(made: Made) -> None:
    simulator = simulator_of(made)
    steady = simulator.steady(middle_step(simulator))
    for engine, done in replay_step(simulator.program, steady).items():
        assert [each.item for each in done] == list(unroll(simulator.program.engines[engine]))
        assert all(a.end <= b.start for a, b in pairwise(done))
        busy = sum(d.end - d.start for d in done if isinstance(d.item, Load | Run))
        spans = [s for s in steady.spans if s.engine == engine and s.kind in ("load", "run")]
        assert busy == pytest.approx(sum(span.seconds for span in spans))
        frees = [(a, b) for a, b in pairwise(done) if isinstance(b.item, Free)]
        assert all(run.end == free.start for run, free in frees)


def test_buffers_are_never_more_than_the_ring_has(made: Made) -> None:
    simulator = simulator_of(made)
    held = buffers_held(simulator.program, simulator.steady(middle_step(simulator)))
    assert set(held) == {ring.name for ring in simulator.program.rings}
    for ring, spans in held.items():
        slots = simulator.program.ring(ring).slots
        assert all(start < end for start, end in spans)
        for start, _ in spans:
            assert sum(a <= start < b for a, b in spans) <= slots


SECONDS = st.floats(0, 1e4)


@given(st.lists(SECONDS, min_size=3, max_size=3), st.lists(SECONDS, min_size=3, max_size=3))
def test_reasons_add_up_to_the_difference(first: list[float], second: list[float]) -> None:
    one, other = (
        Facts(sum(parts), parts[0], 0, 1, 1, {}, "cpu0", parts[1], parts[2])
        for parts in (first, second)
    )
    found = reasons(one, other)
    gap = other.seconds - one.seconds
    left_out = (3 - len(found)) * 0.02 * abs(gap)
    assert sum(reason.seconds for reason in found) == pytest.approx(gap, abs=left_out + 1e-6)
    assert [r.seconds for r in found] == sorted((r.seconds for r in found), reverse=True)


def test_explanation_names_the_second_policy(explained: Explanation) -> None:
    plan, second = explained.plan, explained.second
    assert second is not None and second.policy != plan.policy
    others = [c.seconds for c in plan.candidates if c.seconds and c.policy != plan.policy]
    assert second.seconds == min(others)
    assert second.facts is not None
    gap = second.seconds - plan.prediction.seconds
    assert sum(r.seconds for r in second.reasons) == pytest.approx(gap, abs=0.06 * gap + 1e-9)


def test_explanation_of_a_policy_alone(quick: Made) -> None:
    found = explain(*quick, quiet)
    assert found.second is None
    assert "weight_stream stands alone" in explanation_text(found)


def test_a_second_that_is_the_same_schedule_is_called_that(
    made: Made, solved: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, plan = made
    monkeypatch.setattr("dovetail.plans.explain.sensitivity", lambda *more: solved)
    here = Candidate("by_another_name", plan.knobs, plan.prediction.seconds)
    monkeypatch.setattr("dovetail.plans.explain.choose", lambda *more: plan)
    found = explain(graph, replace(plan, candidates=(*plan.candidates, here)), quiet)
    assert found.second is not None and found.second.same
    text = " ".join(explanation_text(found).split())
    assert "Second: by_another_name with" in text and "the same one: all moves are equal" in text


def test_a_second_of_a_policy_that_is_gone(
    made: Made, solved: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, plan = made
    monkeypatch.setattr("dovetail.plans.explain.sensitivity", lambda *more: solved)
    candidates = (Candidate("of_old", {"seqs": 1}, plan.prediction.seconds * 2),)
    found = explain(graph, replace(plan, candidates=candidates), quiet)
    text = " ".join(explanation_text(found).split())
    assert "Its schedule cannot be made again from its knobs." in text
    assert "Second: of_old" in text


def test_text_says_what_binds_and_what_more_would_give(explained: Explanation) -> None:
    text = explanation_text(explained)
    words = " ".join(text.split())
    assert f"{explained.plan.policy} wins with" in words
    assert "No schedule can take less than" in words
    assert "what one more unit of each resource would give, each checked by solving again" in text
    assert "+1 GB/s disk bandwidth" in text
    assert "+25% rate of products on the processor" in text
    assert f"Second: {explained.second.policy if explained.second else ''}" in words
    assert all(len(line) <= 100 for line in text.splitlines())


def test_text_lists_refused_policies_with_their_reason(explained: Explanation) -> None:
    why = "none of 3 schedules tried fits ram=1.00 MiB"
    found = replace(explained, refused=(Candidate("eager", {}, None, why),))
    assert f"refused: eager: {why}" in explanation_text(found)


def test_explaining_is_deterministic(quick: Made) -> None:
    assert explain(*quick, quiet).as_dict() == explain(*quick, quiet).as_dict()


def test_explaining_a_plan_for_a_gpu(made: Made) -> None:
    graph, _ = made
    machine = replace(MACHINE, accelerator=GPU)
    budget = {"ram": 64 << 20, "hbm": 64 << 20}
    found = explain(graph, choose(graph, machine, budget, WORKLOAD, "module_batch"), quiet)
    text = explanation_text(found)
    assert "gpu" in text and "hbm" in text
    assert {use.engine for use in found.sensitivity.engines} >= {"gpu0"}


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("ready:experts", "experts to be read"),
        ("room:dense", "a free buffer for dense"),
        ("phase:tokens", "the other workers"),
    ],
)
def test_waits_in_words(what: str, text: str) -> None:
    assert wait_text(what) == text


@pytest.mark.parametrize(
    ("resource", "text"),
    [
        (Resource("tier", "ram", 8 * GIB, GIB), "+1.00 GiB ram"),
        (Resource("tier", "hbm", 1000, 250), "+250 B hbm, +25%"),
        (Resource("link", "h2d", 2e10, 1e9), "+1 GB/s bandwidth from ram to hbm"),
        (Resource("rate", "gpu", 8e12, 2e12), "+25% rate of products on the GPU"),
    ],
)
def test_more_of_a_resource_in_words(resource: Resource, text: str) -> None:
    assert more_text(Effect(resource, resource.amount + resource.more, 1.0)) == text


def test_command_prints_the_explanation(
    quick: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_beside(*quick, tmp_path)
    assert main(["plan", "explain", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == explanation_text(explain(*quick, quiet)) + "\n"
    assert "solving again" in captured.err
    assert main(["plan", "explain", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["digest"] == quick[1].digest()
    assert found["binds"]["bound"] == quick[1].bound.resource
    assert [e["resource"]["name"] for e in found["sensitivity"]["effects"]]
    assert found["second"] is None


def test_command_refuses_a_plan_without_its_graph(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_beside(*made, tmp_path)
    (tmp_path / "graph.json").unlink()
    assert main(["plan", "explain", str(path)]) == 1
    error = capsys.readouterr().err
    assert "graph.json: missing" in error and "make the plan again" in error


def test_explaining_needs_no_torch(quick: Made, tmp_path: Path) -> None:
    path = save_beside(*quick, tmp_path)
    code = (
        "import sys; from dovetail.cli import main\n"
        "assert main(['plan', 'explain', sys.argv[1]]) == 0\n"
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
