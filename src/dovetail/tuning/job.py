"""What a tuning works on: the untuned plan, the sample that candidates run, and the name of its
trials in the database."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dovetail.capture.captured import Captured
from dovetail.checkpoint import ModelFolder
from dovetail.ir import codec
from dovetail.ir.plan import Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.policies.common import Setting
from dovetail.passes.simulate import Simulator
from dovetail.planning import Request, plan_apart
from dovetail.run import ram_budget
from dovetail.runtime import calibrate_host as host
from dovetail.tuning.sample import Prompts, run_seconds, sample_of
from dovetail.tuning.space import moves_digest
from dovetail.tuning.staleness import code_digest
from dovetail.tuning_db.facts import Key, Protocol, Task


@dataclass(frozen=True, slots=True)
class TuneJob:
    """What is tuned: the untuned plan, what candidates run, and where the worker's files are."""

    untuned: Plan
    captured: Captured
    checkpoint: Path
    sample: Prompts
    share: float
    key: Key
    scratch: Path
    described: bool = False
    """Whether the plan's machine comes from a file, and so has nothing to be corrected here."""

    @property
    def graph(self) -> TaskGraph:
        """The model's task graph."""
        return self.captured.graph

    @property
    def layout(self) -> Layout:
        """The untuned schedule."""
        return apply_moves(self.graph, self.untuned.moves)

    @property
    def setting(self) -> Setting:
        """What schedules are made for."""
        plan = self.untuned
        ram = plan.budget["ram"] - plan.machine.process_bytes
        return Setting(self.graph, plan.machine, ram, plan.workload)


def make_job(
    options: argparse.Namespace, folder: ModelFolder, prompts: Prompts, scratch: Path, time: float
) -> TuneJob:
    """Plan, and cut the workload down to what can be run many times in ``time`` seconds."""
    note("planning")
    request = Request(
        checkpoint=str(folder.path),
        budget=ram_budget(options.budget),
        workload=prompts.workload,
        policy=options.policy,
        machine=options.machine,
    )
    plan, captured = plan_apart(request, scratch, note)
    layout = apply_moves(captured.graph, plan.moves)
    simulator = Simulator(layout, plan.machine, Costs(plan.machine))
    sample = sample_of(
        prompts,
        layout.dispatch.seqs,
        run_seconds(time),
        lambda workload: simulator.predict(workload).seconds,
    )
    key = make_key(plan, folder, sample.workload, prompts.source)
    share = sample.tokens / prompts.tokens
    described = bool(options.machine)
    return TuneJob(plan, captured, folder.path, sample, share, key, scratch, described)


def make_key(plan: Plan, folder: ModelFolder, sample: Workload, source: str) -> Key:
    """What trials of this plan must share to be compared. The code of a candidate is a function of
    the task's signature and the candidate's moves (``passes.lower``, ``codegen.executor``)."""
    disk = host.disk_device(folder.index.shards[0].file)
    return Key(
        Task("schedule", {**_signature(plan.graph, plan.checkpoint), **plan.budget}),
        plan.workload,
        Protocol("whole", sample, moves_digest(plan.moves)),
        host.silicon() | {"disk": disk},
        host.software() | {"dovetail": code_digest()},
        source,
    )


def task_of(graph: TaskGraph, checkpoint: str, budget: Mapping[str, int]) -> Task:
    """What is tuned, named without a plan."""
    return Task("schedule", {**_signature(codec.digest(graph), checkpoint), **budget})


def _signature(graph: str, checkpoint: str) -> dict[str, str]:
    return {"graph": graph, "checkpoint": checkpoint, "target": "cpu"}


def note(text: str) -> None:
    """Say something on standard error."""
    print(f"dovetail: {text}", file=sys.stderr, flush=True)
