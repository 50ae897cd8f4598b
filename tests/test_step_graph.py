"""The graph of a step gives the times and the classes that going through its instructions does."""

from dataclasses import replace

import pytest
from tests.ir_cases import captured, schedule
from tests.test_policies import AMPLE, MACHINE, VARIANTS, moves_of, setting

from dovetail.ir.errors import VerifyError
from dovetail.ir.program import Wait
from dovetail.ir.timeline import seconds_by_class
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.lower import lower
from dovetail.passes.policies import POLICIES
from dovetail.passes.simulate import Simulator, flatten, simulate_steps, workload_steps
from dovetail.passes.step_graph import step_graph


def check(layout: Layout) -> None:
    """Every kind of step, against the instructions one by one."""
    simulator = Simulator(layout, MACHINE, Costs(MACHINE))
    program, flat = simulator.program, flatten(simulator.program)
    for step in list(workload_steps(layout, setting().workload))[:12]:
        durations, _ = simulator._contended(step)
        spans = simulate_steps(program, flat, durations, [step, step])
        cpu = [
            s
            for s in spans.spans
            if s.engine in program.workers or len(flat) == len(program.workers)
        ]
        first, second = (max(s.end for s in cpu if s.step == i) for i in (0, 1))
        seconds, classes = simulator.step_seconds(step)
        assert seconds == pytest.approx(second - first, rel=1e-9)
        expected = {n: v for n, v in seconds_by_class(spans.step(1).spans).items() if v > 1e-12}
        found = {name: value for name, value in classes.items() if value > 1e-12}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", [AMPLE, 300_000])
def test_policies_take_as_long(variant: str, budget: int) -> None:
    policy, knobs = VARIANTS[variant]
    where = setting(budget=budget)
    found = POLICIES[policy].moves(where, knobs)
    check(
        apply_moves(where.graph, found if found is not None else moves_of(policy, setting(), knobs))
    )


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("experts", [0, 2])
def test_schedules_take_as_long(family: str, readers: int, experts: int) -> None:
    graph = captured(family)
    check(apply_moves(graph, schedule(graph, experts=experts, readers=readers, slots=3)))


def test_programs_that_differ_in_batches_only_share_a_graph() -> None:
    graph = captured("olmoe")
    one = lower(apply_moves(graph, schedule(graph)), {})
    two = lower(apply_moves(graph, schedule(graph)), {})
    assert step_graph(one) is step_graph(two)
    assert step_graph(lower(apply_moves(graph, schedule(graph, slots=3)), {})) is not step_graph(
        one
    )


def test_a_cycle_is_refused() -> None:
    graph = captured("olmoe")
    program = lower(apply_moves(graph, schedule(graph)), {})
    disk = program.engines["disk0"]
    stuck = replace(program, engines={**program.engines, "disk0": (Wait("ready", "dense"), *disk)})
    with pytest.raises(VerifyError, match=r"engines wait for each other in a cycle: .*disk0 at"):
        step_graph(stuck)
