"""`dovetail plan make`, `show`, `check`, `diff`, `explain`, `timeline` and `report`.

Only `make` needs torch; the others read the plan and the ``graph.json`` beside it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.ir.errors import DovetailError, InputError, OutputError
from dovetail.ir.plan import load_plan, save_plan
from dovetail.ir.workload import Workload
from dovetail.plans.check import PlanCheck, load_graph
from dovetail.plans.diff import diff_text

if TYPE_CHECKING:
    from dovetail.ir.plan import Plan
    from dovetail.passes.apply_moves import Layout

NEW_TOKENS = 64
"""New tokens of every prompt where neither a workload nor an option says how many."""


def make(options: argparse.Namespace) -> int:
    """Plan a checkpoint or a configuration for a file of prompts or a workload, save the plan with
    its graph and print it. Raises DovetailError.
    """
    from dovetail.ir.printer import print_plan
    from dovetail.kernels.planned import save_kernels
    from dovetail.machine_files import load_machine, machine_budget
    from dovetail.planning import Model, Request, plan_here
    from dovetail.routing.of_workload import with_routing
    from dovetail.run import ram_budget
    from dovetail.workloads import check_context

    out: Path = options.out
    if out.is_dir():
        raise InputError(f"-o {out}: found a folder, expected a file; give {out / 'plan.json'}")
    if options.machine:
        budget = machine_budget(options.budget, load_machine(options.machine))
    else:
        budget = ram_budget(options.budget)
    workload = _workload(options)
    model = Model.open(options.checkpoint, _note)
    if options.workload:
        check_context(workload, model.captured.graph.context)
    if options.routing:
        workload = with_routing(workload, options.routing, model.captured.graph)
        if "hbm" not in budget:
            _note(
                "--routing changes plans for a GPU only: on the processor every expert that is not "
                "in ram is read in every step, whichever it is"
            )
    request = Request(
        checkpoint=str(options.checkpoint),
        budget=budget,
        workload=workload,
        policy=options.policy,
        machine=options.machine,
        allow=tuple(options.allow),
    )
    with written(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    plan, captured = plan_here(request, _note, model)
    with written(out):
        captured.save(out.parent)
        save_kernels(plan, out.parent)
        save_plan(plan, out)
    print(print_plan(plan))
    print(f"\nplan: {out}")
    return 0


def _workload(options: argparse.Namespace) -> Workload:
    """The workload that --workload names, or that of --prompts and --max-new-tokens."""
    from dovetail.checkpoint import ModelFolder
    from dovetail.run import load_prompts
    from dovetail.workloads import load_workload

    if options.workload:
        if options.skip_bad or options.max_new_tokens is not None:
            raise InputError(
                f"--workload {options.workload}: found --max-new-tokens or --skip-bad too, which "
                "go with --prompts; a workload says itself how many new tokens, as in "
                "1024x512+256: leave the option out"
            )
        return load_workload(options.workload)
    if options.max_new_tokens is None:
        options.max_new_tokens = NEW_TOKENS
    prompts = load_prompts(ModelFolder.open(options.checkpoint), options).prompts
    return Workload.of([len(p.input_ids) for p in prompts], options.max_new_tokens)


def show(path: Path, *, graph: bool, program: bool) -> int:
    """Print a plan, and with ``graph`` and ``program`` what it was made of and becomes.

    Raises PlanError if these need a ``graph.json`` that is not there or not the plan's.
    """
    from dovetail.ir.printer import print_graph, print_plan, print_program

    plan = load_plan(path)
    found = load_graph(path, plan) if graph or program else None
    print(print_plan(plan))
    if found is not None and graph:
        from dovetail.passes.op_cost import task_flops

        print(f"\n{print_graph(found, task_flops)}")
    if found is not None and program:
        from dovetail.passes.apply_moves import apply_moves
        from dovetail.passes.lower import lower

        layout = apply_moves(found, plan.moves)
        if layout.device is None:
            print(f"\n{print_program(lower(layout, plan.budget))}")
        else:
            _show_gpu_programs(layout, plan)
    return 0


def _show_gpu_programs(layout: "Layout", plan: "Plan") -> None:
    """Print the executor of each kind of step."""
    from dovetail.codegen.gpu_executor import emit_gpu_executor
    from dovetail.passes.gpu.cost import GpuCosts
    from dovetail.passes.gpu.lower import gpu_programs
    from dovetail.passes.gpu.predict import GpuPredictor

    costs = GpuCosts(plan.machine, layout.graph.dtype, plan.workload.routing)
    for program in gpu_programs(GpuPredictor(layout, costs), plan.workload, plan.budget):
        title = {"policy": plan.policy, "machine": plan.machine.name, "step": program.kind}
        print(f"\n{emit_gpu_executor(program, title)}", end="")


def check(path: Path, *, here: bool = False) -> int:
    """Verify a plan without a solver; a line per check. With ``here`` also say how far this machine
    is from the plan's. Returns 1 if a check fails or the plan is not to be used as it is."""
    checks = PlanCheck(path)
    for name, run in checks.all():
        try:
            found = run()
        except DovetailError as error:
            print(f"failed   {name:<8} {error}")
            return 1
        print(f"{'skipped' if found.skipped else 'ok':<8} {name:<8} {found.text}")
    if here:
        from dovetail.tuning.staleness import Grade, plan_staleness

        staleness = plan_staleness(checks.plan)
        fresh = staleness.grade in (Grade.SAME, Grade.NEAR)
        print(f"{'ok' if fresh else 'stale':<8} {'here':<8} {staleness.message('it')}")
        return 0 if fresh else 1
    return 0


def diff(before: Path, after: Path) -> int:
    """Print in what two plans differ. Raises PlanError if one cannot be read."""
    print(diff_text(load_plan(before), load_plan(after)))
    return 0


def timeline(path: Path, out: Path, picture: Path | None) -> int:
    """Write the plan's timeline, predicted afresh, with what a run in the plan's folder recorded;
    draw one layer of it. Raises DovetailError.
    """
    from dovetail.passes.apply_moves import apply_moves
    from dovetail.plans.timeline_file import compare, write_trace

    plan = load_plan(path)
    layout = apply_moves(load_graph(path, plan), plan.moves)
    if layout.device is not None:
        return _gpu_timeline(plan, layout, out, picture)
    compared = compare(plan, layout, path.parent, _note)
    timelines = compared.timelines()
    write_trace(out, timelines)
    sources = " and ".join(t.source for t in timelines)
    print(f"timeline, {sources}: {out} (opens at ui.perfetto.dev)")
    if picture:
        from dovetail.plans.timeline_picture import draw

        draw(compared, picture, _note)
        print(f"picture of one layer: {picture}")
    return 0


def _gpu_timeline(plan: "Plan", layout: "Layout", out: Path, picture: Path | None) -> int:
    """The timeline of a plan for a GPU, which nothing has run yet: predicted alone."""
    from dovetail.plans.timeline_file import write_trace
    from dovetail.plans.timeline_gpu import gpu_panels, gpu_timeline
    from dovetail.plans.timeline_picture import save_panels

    write_trace(out, [gpu_timeline(plan, layout)])
    print(f"timeline, predicted: {out} (opens at ui.perfetto.dev)")
    if picture:
        save_panels(gpu_panels(plan, layout), {}, plan, picture)
        print(f"picture of first layers, steady state and last layers: {picture}")
    return 0


def explain(path: Path, *, as_json: bool) -> int:
    """Print why the plan is what it is and what more of each resource would give, by solving again.

    Raises PlanError if the ``graph.json`` beside it is not there or not the plan's.
    """
    from dovetail.plans.explain import explain as explained
    from dovetail.plans.explain_text import explanation_text

    plan = load_plan(path)
    found = explained(load_graph(path, plan), plan, _note)
    print(json.dumps(found.as_dict(), indent=1) if as_json else explanation_text(found))
    return 0


def report(path: Path, out: Path, *, fast: bool) -> int:
    """Write the plan's report, one page with all charts; ``fast`` solves nothing again.

    Raises DovetailError.
    """
    from dovetail.plans.report import findings, write_report
    from dovetail.plans.report_sections import html

    plan = load_plan(path)
    write_report(html(findings(load_graph(path, plan), plan, path.parent, fast, _note)), out)
    print(f"report: {out}")
    return 0


@contextmanager
def written(out: Path) -> Iterator[None]:
    """Turns what the system says of a plan's place into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the plan {out} cannot be written: {error.strerror}; name another place with -o"
        ) from error


def _note(text: str) -> None:
    print(f"dovetail: {text}", file=sys.stderr)
