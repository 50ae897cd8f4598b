"""The checks of `dovetail plan check`: a plan is sound, without a solver and without torch."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dovetail.ir import codec
from dovetail.ir.errors import BudgetError, PlanError
from dovetail.ir.plan import Plan, load_plan
from dovetail.ir.program import unroll
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import format_bytes, format_duration
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.gpu.buffers import check_offsets
from dovetail.passes.lower import lower
from dovetail.passes.predict import least_time, peaks, verify_layout

GRAPH_FILE = "graph.json"
RESIDENCY = "batch sizes and residency"
"""The certificate of the integer program over all knobs of GPU plans."""
OPTIMAL = 0.0011
"""Largest gap of what is called optimal."""
ROUNDING = 1e-9
"""Share by which two sums of the same seconds may differ."""


def load_graph(plan_path: Path, plan: Plan) -> TaskGraph:
    """The task graph beside a plan; raises PlanError if it is missing, malformed or another one."""
    path = plan_path.parent / GRAPH_FILE
    try:
        graph = codec.decode(json.loads(path.read_text(encoding="utf-8")), TaskGraph)
    except FileNotFoundError:
        raise PlanError(
            f"{path}: missing; the plan's task graph is expected beside the plan: keep the files "
            "of `dovetail plan make` or `dovetail run` together, or make the plan again"
        ) from None
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: not a readable task graph: {error}; plan again") from None
    found = codec.digest(graph)
    if found != plan.graph:
        raise PlanError(
            f"{path}: task graph {found[:12]}, but the plan is for {plan.graph[:12]}; put the "
            "plan beside the graph it was made with, or plan again"
        )
    return graph


@dataclass(frozen=True, slots=True)
class Found:
    """What a check that did not fail says; ``skipped`` if it lacked what it needs."""

    text: str
    skipped: bool = False


class PlanCheck:
    """The checks of one plan file, in order: each may use what those before it found."""

    plan: Plan
    graph: TaskGraph | None
    layout: Layout

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[tuple[str, Callable[[], Found]]]:
        """Name and check; a check raises DovetailError with the reason if it fails."""
        return [
            ("file", self.check_file),
            ("graph", self.check_graph),
            ("moves", self.check_moves),
            ("program", self.check_program),
            ("memory", self.check_memory),
            ("bound", self.check_bound),
            ("certificates", self.check_certificates),
            ("kernels", self.check_kernels),
        ]

    def check_file(self) -> Found:
        """The file is whole: its digest is that of its content."""
        self.plan = load_plan(self.path)
        return Found(f"whole, digest {self.plan.digest()[:12]}")

    def check_graph(self) -> Found:
        """The task graph beside it, if any, is legal and the one it was made for."""
        from dovetail.ir.verify import verify_graph

        self.graph = None
        path = self.path.parent / GRAPH_FILE
        if not path.exists():
            return Found(f"{path} is not there: moves and program are not checked", skipped=True)
        self.graph = load_graph(self.path, self.plan)
        verify_graph(self.graph)
        return Found(f"{GRAPH_FILE} is the plan's and legal, digest {self.plan.graph[:12]}")

    def check_moves(self) -> Found:
        """Every move applies."""
        count = len(self.plan.moves)
        if self.graph is None:
            return Found(f"{count} moves, not replayed", skipped=True)
        self.layout = apply_moves(self.graph, self.plan.moves)
        return Found(f"{count} moves replay")

    def check_program(self) -> Found:
        """The program that they give is legal."""
        from dovetail.ir.verify import verify_program
        from dovetail.ir.verify_gpu_program import verify_gpu_program
        from dovetail.passes.gpu.cost import GpuCosts
        from dovetail.passes.gpu.lower import gpu_programs
        from dovetail.passes.gpu.predict import GpuPredictor

        if self.graph is None:
            return Found("not lowered", skipped=True)
        if self.layout.device is not None:
            plan = self.plan
            found = verify_layout(self.layout, plan.machine, plan.budget, plan.workload)
            if wrong := check_offsets(plan, self.graph) if plan.offsets else []:
                raise PlanError(f"the offsets of its buffers are wrong: {wrong[0]}; plan again")
            apart = f", {len(plan.offsets)} buffers do not overlap" if plan.offsets else ""
            costs = GpuCosts(plan.machine, self.graph.dtype, plan.workload.routing)
            predictor = GpuPredictor(self.layout, costs)
            programs = gpu_programs(predictor, plan.workload, plan.budget)
            for step in programs:
                verify_gpu_program(step)
            kinds = ", ".join(step.kind for step in programs)
            return Found(f"{found} are legal{apart}, programs of {kinds} have no hazard")
        program = lower(self.layout, self.plan.budget)
        verify_program(program, self.layout.graph)
        count = sum(len(list(unroll(items))) for items in program.engines.values())
        return Found(f"{count} instructions on {', '.join(program.engines)} are legal")

    def check_memory(self) -> Found:
        """The peak, computed again if there is a graph, is within the budget."""
        if self.graph is None:
            found, source = self.plan.prediction.peaks, "stated"
        else:
            found, source = peaks(self.layout, self.plan.machine), "computed again"
        texts = []
        for tier, peak in found.items():
            budget = self.plan.budget[tier]
            if peak > budget:
                raise BudgetError(
                    f"the peak of {tier} is {format_bytes(peak, up=True)} ({source}), expected at "
                    f"most the budget of {format_bytes(budget)}; plan again"
                )
            texts.append(f"peak {format_bytes(peak)} ({source}) of {tier}={format_bytes(budget)}")
        return Found(", ".join(texts))

    def check_certificates(self) -> Found:
        """No certificate contradicts itself or the plan: bounds are not above what was reached,
        what is called optimal is, and the plan is no slower than what was proved about."""
        worst = 0.0
        for proved in self.plan.certificates:
            if proved.bound > proved.objective * (1 + ROUNDING):
                raise PlanError(
                    f"certificate {proved.name!r} reached {proved.objective:.6g} below its own "
                    f"bound of {proved.bound:.6g}, which nothing can; plan again"
                )
            if proved.status == "optimal" and proved.gap > OPTIMAL:
                raise PlanError(
                    f"certificate {proved.name!r} is called optimal with a gap of "
                    f"{proved.gap:.1%}, expected at most {OPTIMAL:.1%}; plan again"
                )
            worst = max(worst, proved.gap)
        residency = [c for c in self.plan.certificates if c.name == RESIDENCY]
        for proved in residency:
            seconds = self.plan.prediction.seconds
            if seconds > proved.objective * (1 + ROUNDING):
                raise PlanError(
                    f"the plan takes {format_duration(seconds)}, but certificate {RESIDENCY!r} "
                    f"reached {format_duration(proved.objective)}; plan again"
                )
        count = len(self.plan.certificates)
        return Found(f"{count} agree with the plan, largest gap {worst:.1%}" if count else "none")

    def check_kernels(self) -> Found:
        """The sources beside a GPU plan are what its specs give; nothing of them is run."""
        from dovetail.kernels.planned import check_plan_kernels

        if not self.plan.kernels and not self.plan.no_kernels:
            return Found("none: the plan runs no kernels of its own")
        return Found(check_plan_kernels(self.plan, self.path.parent))

    def check_bound(self) -> Found:
        """No schedule can be faster than the bound, so the prediction is not."""
        plan, least, source = self.plan, self.plan.bound, "stated"
        if self.graph is not None:
            least = least_time(self.layout.graph, plan.machine, plan.budget, plan.workload)
            source = "computed again"
        seconds = plan.prediction.seconds
        if least.seconds > seconds * (1 + ROUNDING):
            raise PlanError(
                f"the prediction of {format_duration(seconds)} is below the bound of "
                f"{format_duration(least.seconds)} ({source}), which no schedule can beat; plan "
                "again"
            )
        return Found(
            f"{format_duration(least.seconds)} ({source}, {least.resource}) is at most the "
            f"predicted {format_duration(seconds)}"
        )
