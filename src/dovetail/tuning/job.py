"""What a tuning works on: the untuned plan, the sample that candidates run, and the name of its
trials in the database."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dovetail.capture.captured import Captured
from dovetail.checkpoint import ModelFolder
from dovetail.ir import codec
from dovetail.ir.moves import ExpertFormat
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
    """What is tuned: the untuned plan, what candidates run (a ``sample`` of the ``prompts`` that
    should take ``seconds``), and where the worker's files are. ``described`` says that the plan's
    machine comes from a file, and so has nothing to be corrected here; experts may be in the
    formats that ``allow`` lists."""

    untuned: Plan
    captured: Captured
    checkpoint: Path
    prompts: Prompts
    sample: Prompts
    seconds: float
    key: Key
    scratch: Path
    described: bool = False
    allow: tuple[ExpertFormat, ...] = ()

    @property
    def graph(self) -> TaskGraph:
        """The model's task graph."""
        return self.captured.graph

    @property
    def share(self) -> float:
        """The sample's share of the workload."""
        return self.sample.tokens / self.prompts.tokens

    def predicted(self, workload: Workload) -> float:
        """Seconds of the untuned plan on a workload by the cost model."""
        machine = self.untuned.machine
        return Simulator(self.layout, machine, Costs(machine)).predict(workload).seconds

    def slower(self, by: float) -> "TuneJob":
        """The job with a sample cut for a machine that takes ``by`` times the predicted seconds."""
        seqs, seconds = self.layout.dispatch.seqs, self.seconds / by
        return self.on(sample_of(self.prompts, seqs, seconds, self.predicted))

    def on(self, sample: Prompts) -> "TuneJob":
        """The job with this sample."""
        protocol = replace(self.key.protocol, sample=sample.workload)
        return replace(self, sample=sample, key=replace(self.key, protocol=protocol))

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
        allow=tuple(options.allow),
    )
    plan, captured = plan_apart(request, scratch, note)
    key = make_key(plan, folder, prompts.workload, prompts.source, options.allow)
    described, seconds = bool(options.machine), run_seconds(time)
    allow = tuple(options.allow)
    whole = TuneJob(
        plan, captured, folder.path, prompts, prompts, seconds, key, scratch, described, allow
    )
    return whole.slower(1.0)


def make_key(
    plan: Plan,
    folder: ModelFolder,
    sample: Workload,
    source: str,
    allow: Sequence[ExpertFormat] = (),
) -> Key:
    """What trials of this plan must share to be compared. The code of a candidate is a function of
    the task's signature and the candidate's moves (``passes.lower``, ``codegen.executor``)."""
    disk = host.disk_device(folder.index.shards[0].file)
    return Key(
        Task("schedule", {**_signature(plan.graph, plan.checkpoint, allow), **plan.budget}),
        plan.workload,
        Protocol("whole", sample, moves_digest(plan.moves)),
        host.silicon() | {"disk": disk},
        host.software() | {"dovetail": code_digest()},
        source,
    )


def task_of(
    graph: TaskGraph,
    checkpoint: str,
    budget: Mapping[str, int],
    allow: Sequence[ExpertFormat] = (),
) -> Task:
    """What is tuned, named without a plan."""
    return Task("schedule", {**_signature(codec.digest(graph), checkpoint, allow), **budget})


def _signature(graph: str, checkpoint: str, allow: Sequence[ExpertFormat]) -> dict[str, str]:
    named = {"graph": graph, "checkpoint": checkpoint, "target": "cpu"}
    return named | ({"allow": ",".join(sorted(allow))} if allow else {})


def note(text: str) -> None:
    """Say something on standard error."""
    print(f"dovetail: {text}", file=sys.stderr, flush=True)
