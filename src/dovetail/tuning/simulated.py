"""`dovetail tune --target`: tune for a machine that is not here, by the cost model alone.

Nothing is run, so nothing is learnt that the model does not know: what more there is to find are
knobs that the planner's own search did not visit. The plan says that it was simulated only.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dovetail.ir.errors import BudgetError, InputError
from dovetail.ir.machine import Machine
from dovetail.ir.plan import Evidence, Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import parse_duration
from dovetail.ir.workload import Workload
from dovetail.kernels.planned import with_kernels
from dovetail.machine_files import load_machine, machine_budget
from dovetail.passes.choose import choose
from dovetail.passes.policies import POLICIES
from dovetail.passes.policies.common import Setting
from dovetail.passes.policies.gpu import GPU_POLICIES, GpuSetting
from dovetail.passes.policies.gpu import ladders as gpu_ladders
from dovetail.planning import Model
from dovetail.tuning.clock import Clock
from dovetail.tuning.job import note
from dovetail.tuning.samplers import make_sampler
from dovetail.tuning.search import PATIENCE
from dovetail.tuning.space import Ladders, moves_digest, window
from dovetail.tuning.staleness import code_digest
from dovetail.tuning.tune import report, save
from dovetail.workloads import check_context, load_workload

BETTER = 1e-3
"""Share of the time that a change must save to count, so that rounding is no improvement."""


def tune_simulated(options: argparse.Namespace) -> int:
    """The whole command. Raises DovetailError."""
    if options.allow:
        raise InputError(
            f"--allow {' '.join(options.allow)} with --target: formats are weighed where they can "
            "be measured; leave --allow out, or tune on the machine itself"
        )
    machine = load_machine(options.target)
    budget = machine_budget(options.budget, machine)
    model = Model.open(options.checkpoint, note)
    graph = model.captured.graph
    workload = _workload(options, graph.context)
    note(f"tuning for {machine.name} by simulation; nothing is run")
    untuned = choose(
        graph, machine, budget, workload, policy=options.policy, checkpoint=model.digest
    )
    found = Simulated(graph, machine, budget, workload, model.digest, untuned)
    plan = found.run(options.sampler, options.seed, parse_duration(options.time))
    # The cost model's best of all tiles: with nothing to measure, no search finds a better one.
    plan = with_kernels(plan, graph)
    save(plan, model.captured, options.out)
    report(plan, options.out, as_json=options.json)
    return 0


def _workload(options: argparse.Namespace, context: int) -> Workload:
    if options.workload.endswith(".jsonl"):
        from dovetail.checkpoint import ModelFolder
        from dovetail.tuning.sample import read_workload

        folder = ModelFolder.open(Path(options.checkpoint))
        new, bad = options.max_new_tokens, options.skip_bad
        return read_workload(folder, options.workload, new, bad, options.seed).workload
    workload = load_workload(options.workload)
    check_context(workload, context)
    return workload


@dataclass(frozen=True, slots=True)
class Simulated:
    """A search by prediction around an untuned plan."""

    graph: TaskGraph
    machine: Machine
    budget: Mapping[str, int]
    workload: Workload
    checkpoint: str
    untuned: Plan

    def run(self, sampler: str, seed: int, seconds: float) -> Plan:
        """Search until the time is up or nothing gets better; raises DovetailError."""
        clock, space = Clock(seconds), self._space()
        search = make_sampler(sampler, space, seed)
        best, best_at, tried = self.untuned, 0, 0
        known: dict[tuple[tuple[str, int], ...], float] = {}
        while clock.left > 0 and tried - best_at < 8 * PATIENCE:
            points = search.propose(1)
            if not points:
                break
            point = points[0]
            place = tuple(sorted(point.items()))
            tried += 1
            if place not in known:
                plan = self._plan(point)
                known[place] = self._ratio(plan)
                if plan is not None and known[place] < self._ratio(best) - BETTER:
                    best, best_at = plan, tried
            if math.isinf(known[place]):
                search.tell_over(point, 1.0)
            else:
                search.tell(point, known[place])
        return replace(best, tuning=self._evidence(best, sampler, seed, len(known), clock.spent))

    def _space(self) -> Ladders:
        knobs = {name: int(value) for name, value in self.untuned.knobs.items()}
        known = {
            name: window(v, knobs[name]) for name, v in self._ladders().items() if name in knobs
        }
        return Ladders(knobs, {name: v for name, v in known.items() if len(v) > 1})

    def _ladders(self) -> dict[str, tuple[int, ...]]:
        name, ram = self.untuned.policy, self.budget["ram"] - self.machine.process_bytes
        if self.machine.accelerator is not None and "hbm" in self.budget:
            setting = GpuSetting(
                self.graph, self.machine, self.budget["hbm"], self.budget["ram"], self.workload
            )
            free = GPU_POLICIES[name].free
            found = {k: v for k, v in gpu_ladders(setting).items() if k in free}
        else:
            cpu = Setting(self.graph, self.machine, ram, self.workload)
            found = dict(POLICIES[name].ladders(cpu))
        return {knob: tuple(int(value) for value in values) for knob, values in found.items()}

    def _plan(self, point: Mapping[str, int]) -> Plan | None:
        """The plan of these knobs, or None if they do not fit."""
        before = self.untuned.knobs
        knobs = {k: bool(v) if isinstance(before[k], bool) else v for k, v in point.items()}
        policy = self.untuned.policy
        try:
            return choose(
                self.graph,
                self.machine,
                self.budget,
                self.workload,
                policy,
                knobs,
                self.checkpoint,
            )
        except BudgetError:
            return None

    def _ratio(self, plan: Plan | None) -> float:
        if plan is None:
            return math.inf
        return plan.prediction.seconds / self.untuned.prediction.seconds

    def _evidence(self, best: Plan, sampler: str, seed: int, trials: int, spent: float) -> Evidence:
        ratio = self._ratio(best)
        gain = (
            f"predicted to take {ratio:.3f} of the untuned plan's time"
            if ratio < 1
            else ("no schedule is predicted to be faster than the untuned plan")
        )
        return Evidence(
            outcome="simulated",
            reason=f"{gain}; by the cost model of {self.machine.name}, nothing was run",
            untuned=moves_digest(self.untuned.moves),
            sample=self.workload,
            sampler=sampler,
            seed=seed,
            trials=trials,
            seconds=round(spent, 3),
            environment={**self.machine.silicon, "dovetail": code_digest()},
            ratio=ratio,
            low=ratio,
            high=ratio,
            untuned_seconds=self.untuned.prediction.seconds,
        )
