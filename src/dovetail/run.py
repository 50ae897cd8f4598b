"""`dovetail run`: a file of prompts in, a file of results out, under a budget.

Beside OUT.jsonl a folder OUT.jsonl.dovetail holds the plan, the task graph, the emitted executor,
the timelines and the report.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dovetail.checkpoint import ModelFolder
from dovetail.execute import Execution
from dovetail.gpu_run import GpuExecution, check_target, gpu_place
from dovetail.ir import codec
from dovetail.ir.batching import Request as SequenceRequest
from dovetail.ir.errors import InputError
from dovetail.ir.plan import Plan, load_plan
from dovetail.ir.units import parse_budget
from dovetail.ir.workload import Workload
from dovetail.journal import Journal
from dovetail.journal_lines import Record
from dovetail.planning import Request, plan_apart
from dovetail.precision.of_plan import check_converted, plan_index
from dovetail.progress import Progress
from dovetail.prompts import Prompt, PromptSet, read_prompts
from dovetail.report import Report, save_run, table
from dovetail.routing.guard import RoutingGuard, Sinks
from dovetail.routing.record import RoutingRecord, check_recorded
from dovetail.runtime import calibrate_host as host
from dovetail.runtime.generate import Finished
from dovetail.runtime.sampling import Sampling
from dovetail.tuning.staleness import Grade, environment_here, plan_staleness
from dovetail.tuning_db.database import Database, Run, TaskSample

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    """The whole command. Raises DovetailError."""
    _check_paths(options)
    check_target(options)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    budget = ram_budget(options.budget) if options.target == "cpu" else {}
    folder = ModelFolder.open(options.checkpoint)
    check_converted(folder, options.allow)
    prompts = load_prompts(folder, options)
    key = _run_key(folder, prompts, sampling, options)
    with Journal.open(options.out, key, restart=options.restart) as journal, ExitStack() as stack:
        if journal.complete:
            check_recorded(options.record_routing)
            print(f"{options.out} is complete: {len(prompts.prompts)} prompts; nothing to do")
            return 0
        record = None
        if options.record_routing is not None:
            record = RoutingRecord.open(
                options.record_routing, key, _rows(journal), restart=options.restart
            )
            stack.enter_context(record)
        done = set(journal.done)
        left = [p for p in prompts.prompts if p.index not in done]
        place = Path(f"{options.out}.dovetail")
        if left:
            report = _run_rest(options, folder, sampling, budget, journal, left, place, record)
            save_run(report, place)
        if record is not None:
            record.finish(_rows(journal))
        journal.finish([p.index for p in prompts.prompts])
        if record is not None:
            record.remove()
    if not left:
        print(f"{options.out} is complete: {len(prompts.prompts)} prompts")
    elif options.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print(table(report, len(prompts.prompts), len(done), options.out, place))
    return 0


def _rows(journal: Journal) -> dict[int, int]:
    """How many tokens of every finished prompt went through the model: the last new one did not."""
    return {
        index: record.input_tokens + len(record.tokens) - 1
        for index, record in journal.done.items()
    }


def _check_paths(options: argparse.Namespace) -> None:
    if options.out.resolve() == options.prompts.resolve():
        raise InputError(f"--out and --prompts are both {options.out}; give another output file")
    record = options.record_routing
    if record is not None and record.resolve() in (
        options.out.resolve(),
        options.prompts.resolve(),
    ):
        name = "--out" if record.resolve() == options.out.resolve() else "--prompts"
        raise InputError(f"{name} and --record-routing are both {record}; give another file")


def ram_budget(text: str | None) -> dict[str, int]:
    """The budget as given, or half of this machine's memory."""
    budget = parse_budget(text) if text else {"ram": host.memory_bytes() // 2}
    if "ram" not in budget:
        raise InputError(f"budget {text!r} names no ram, which the cpu target needs: add ram=SIZE")
    return budget


def load_prompts(folder: ModelFolder, options: argparse.Namespace) -> PromptSet:
    """The prompts of the command's file; says on standard error what was left out or cut."""
    prompts = read_prompts(
        options.prompts,
        folder.encode,
        folder.vocab,
        folder.context,
        options.max_new_tokens,
        options.skip_bad,
    )
    for bad in prompts.skipped:
        print(f"dovetail: left out line {bad.line}: {bad.reason}", file=sys.stderr)
    if prompts.cut_short:
        print(
            f"dovetail: {prompts.cut_short} prompts reach the context of {folder.context} tokens "
            f"before {options.max_new_tokens} new ones and end there",
            file=sys.stderr,
        )
    return prompts


def requests_of(prompts: Sequence[Prompt], context: int, new_tokens: int) -> list[SequenceRequest]:
    """What the batcher needs to know of the prompts."""
    return [
        SequenceRequest(p.index, len(p.input_ids), min(new_tokens, context - len(p.input_ids)))
        for p in prompts
    ]


def _run_key(
    folder: ModelFolder, prompts: PromptSet, sampling: Sampling, options: argparse.Namespace
) -> dict[str, str | int | float | bool]:
    """What makes results comparable: not the schedule, which does not change them unless it may
    compute in fewer bits."""
    allowed = {"allow": ",".join(sorted(options.allow))} if options.allow else {}
    return allowed | {
        "checkpoint": folder.index.digest(),
        "config": codec.digest(dict(folder.config)),
        "stop_tokens": ",".join(str(token) for token in folder.stop_tokens),
        "prompts": prompts.digest,
        "max_new_tokens": options.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "ignore_eos": options.ignore_eos,
    }


def _run_rest(
    options: argparse.Namespace,
    folder: ModelFolder,
    sampling: Sampling,
    budget: dict[str, int],
    journal: Journal,
    left: list[Prompt],
    place: Path,
    record: RoutingRecord | None,
) -> Report:
    workload = Workload.of([len(p.input_ids) for p in left], options.max_new_tokens)
    machine = options.machine
    if options.target != "cpu":
        machine, budget = gpu_place(options, folder, place)
    request = Request(
        checkpoint=str(folder.path),
        budget=budget,
        workload=workload,
        policy=options.policy,
        machine=machine,
        plan=str(options.plan) if options.plan else "",
        runs=True,
        allow=tuple(options.allow),
    )
    _warn_if_stale(options, folder)
    plan, captured = plan_apart(request, place, lambda text: None)
    stop = () if options.ignore_eos else folder.stop_tokens
    if record is not None:
        record.begin(captured.graph)
    guard = None
    execution: Execution | GpuExecution
    if options.target == "cpu":
        guard = RoutingGuard.for_plan(plan, captured.graph)
        sinks = Sinks([sink for sink in (guard, record) if sink is not None])
        executor = place / "executor.py"
        index = plan_index(folder, captured.graph, plan.moves)
        execution = Execution(plan, captured, index, sampling, stop, executor, sinks.or_none)
    else:
        execution = GpuExecution(
            plan, captured, folder.index, sampling, stop, place, options.target, options.graphs
        )
    writer = _Writer(folder, journal, left, options.max_new_tokens, record)
    requests = requests_of(left, folder.context, options.max_new_tokens)
    ids = {p.index: p.input_ids for p in left}
    with execution, writer.progress:
        for step in execution.steps(requests, ids.__getitem__):
            writer.step(step.finished, step.tokens)
            _warn_of_drift(guard)
    _warn_of_drift(guard, last=True)
    if isinstance(execution, GpuExecution):
        return execution.report()
    report = Report.of(plan, execution.layout, execution.steps_run, execution.measured)
    _remember(plan, report)
    return report


def _warn_if_stale(options: argparse.Namespace, folder: ModelFolder) -> None:
    """Say in what this machine differs from the one that a given plan was made for."""
    if options.plan is None or options.machine:
        return
    here = environment_here([folder.index.shards[0].file])
    staleness = plan_staleness(load_plan(options.plan), here)
    if staleness.grade is not Grade.SAME:
        log.warning("%s", staleness.message(str(options.plan)))


def _warn_of_drift(guard: RoutingGuard | None, *, last: bool = False) -> None:
    if guard is not None and (warning := guard.warning(last=last)):
        log.warning("%s", warning)


def _remember(plan: Plan, report: Report) -> None:
    """Keep prediction and measurement in the tuning database; the results do not depend on it."""
    run = Run(
        silicon=host.silicon(),
        software=host.software(),
        plan_digest=report.plan,
        policy=report.policy,
        budget=plan.budget,
        workload=plan.workload,
        predicted_seconds=report.predicted_seconds,
        measured_seconds=report.seconds,
        predicted_peak_bytes=report.predicted_peak,
        measured_peak_bytes=report.rss_bytes,
        stop="done",
    )
    samples = [
        TaskSample(name, seconds, report.measured_classes[name], report.steps)
        for name, seconds in report.predicted_classes.items()
        if name in report.measured_classes
    ]
    try:
        with Database.open() as database:
            database.add_task_samples(database.add_run(run), samples)
    except InputError as error:
        log.warning("the run was not kept in the tuning database: %s", error)


@dataclass(slots=True)
class _Writer:
    """Journals what leaves and shows progress."""

    folder: ModelFolder
    journal: Journal
    prompts: dict[int, Prompt]
    progress: Progress
    new_tokens: int
    record: RoutingRecord | None

    def __init__(
        self,
        folder: ModelFolder,
        journal: Journal,
        left: list[Prompt],
        new_tokens: int,
        record: RoutingRecord | None,
    ) -> None:
        self.folder, self.journal, self.new_tokens = folder, journal, new_tokens
        self.record = record
        self.prompts = {p.index: p for p in left}
        total = sum(r.new_tokens for r in requests_of(left, folder.context, new_tokens))
        done = len(journal.done)
        self.progress = Progress(len(left) + done, total, done_prompts=done)

    def step(self, finished: Sequence[Finished], tokens: int) -> None:
        """Account for a step."""
        if self.record is not None and finished:
            self.record.sync()
        self.journal.append([self._record(item) for item in finished])
        saved = 0
        for item in finished:
            length = len(self.prompts[item.index].input_ids)
            saved += min(self.new_tokens, self.folder.context - length) - len(item.tokens)
        self.progress.add(len(finished), tokens, saved=saved)

    def _record(self, item: Finished) -> Record:
        prompt = self.prompts[item.index]
        text = self.folder.decode(item.tokens)
        length = len(prompt.input_ids)
        return Record(item.index, prompt.id, length, item.tokens, text, item.reason)
