"""Predict: `layout, machine, workload -> prediction`, with or without a GPU, and its legality."""

from collections.abc import Mapping

from dovetail.ir.errors import BudgetError
from dovetail.ir.machine import Machine
from dovetail.ir.plan import Bound, Prediction
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import format_bytes
from dovetail.ir.verify import verify_program
from dovetail.ir.workload import Workload
from dovetail.passes import bound as cpu_bound
from dovetail.passes.apply_moves import Layout
from dovetail.passes.cost import Costs
from dovetail.passes.gpu.bound import gpu_bound
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.memory import tier_bytes
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.lower import lower
from dovetail.passes.memory import ram_bytes
from dovetail.passes.simulate import Simulator
from dovetail.solvers.loop_problem import check_problem


def predict(layout: Layout, machine: Machine, workload: Workload) -> Prediction:
    """Time and bytes of the workload, every sequence at its full length."""
    if layout.device is None:
        return Simulator(layout, machine, Costs(machine)).predict(workload)
    costs = GpuCosts(machine, layout.graph.dtype, workload.routing)
    return GpuPredictor(layout, costs).predict(workload)


def least_time(
    graph: TaskGraph, machine: Machine, budget: Mapping[str, int], workload: Workload
) -> Bound:
    """The time that no schedule can beat under this budget."""
    if machine.accelerator is not None and "hbm" in budget:
        return gpu_bound(graph, machine, budget, workload)
    return cpu_bound.bound(graph, machine, budget["ram"], workload)


def peaks(layout: Layout, machine: Machine) -> dict[str, int]:
    """Peak bytes of every tier that the budget limits, computed from the layout."""
    if layout.device is None:
        return {"ram": sum(ram_bytes(layout).values())}
    assert machine.accelerator is not None
    tiers = tier_bytes(layout, machine.accelerator.count)
    return {name: sum(parts.values()) for name, parts in tiers.items()}


def verify_layout(
    layout: Layout, machine: Machine, budget: Mapping[str, int], workload: Workload
) -> str:
    """Hold what a layout becomes against the specification; returns what was found to be legal.

    Raises VerifyError, or BudgetError if a tier holds more than its budget.
    """
    for tier, peak in peaks(layout, machine).items():
        if peak > budget[tier]:
            raise BudgetError(
                f"the peak of {tier} is {format_bytes(peak, up=True)} (computed again), expected "
                f"at most the budget of {format_bytes(budget[tier])}; plan again"
            )
    if layout.device is None:
        program = lower(layout, budget)
        verify_program(program, layout.graph)
        return f"program on {', '.join(program.engines)}"
    costs = GpuCosts(machine, layout.graph.dtype, workload.routing)
    predictor = GpuPredictor(layout, costs)
    engines: dict[str, None] = {}
    for loop in predictor.loops(workload):
        check_problem(loop.problem)
        engines |= dict.fromkeys(loop.order)
    predictor.steady(workload)
    return f"loop bodies on {', '.join(engines)}"
