"""`dovetail plan make`, `show`, `check`, `diff` and `timeline`.

Only `make` needs torch; the others read the plan and the ``graph.json`` beside it.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dovetail.ir.errors import DovetailError, InputError, OutputError
from dovetail.ir.plan import load_plan, save_plan
from dovetail.plan_check import PlanCheck, load_graph
from dovetail.plan_diff import diff_text


def make(options: argparse.Namespace) -> int:
    """Plan a checkpoint for a file of prompts, save the plan with its graph and print it.

    Raises DovetailError.
    """
    from dovetail.checkpoint import ModelFolder
    from dovetail.ir.printer import print_plan
    from dovetail.ir.workload import Workload
    from dovetail.planning import Request, plan_here
    from dovetail.run import load_prompts, ram_budget

    out: Path = options.out
    if out.is_dir():
        raise InputError(f"-o {out}: found a folder, expected a file; give {out / 'plan.json'}")
    budget = ram_budget(options.budget)
    prompts = load_prompts(ModelFolder.open(options.checkpoint), options).prompts
    request = Request(
        checkpoint=str(options.checkpoint),
        budget=budget,
        workload=Workload.of([len(p.input_ids) for p in prompts], options.max_new_tokens),
        policy=options.policy,
        machine=options.machine,
    )
    with _written(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    plan, captured = plan_here(request, _note)
    with _written(out):
        captured.save(out.parent)
        save_plan(plan, out)
    print(print_plan(plan))
    print(f"\nplan: {out}")
    return 0


def show(path: Path, *, graph: bool, program: bool) -> int:
    """Print a plan, and with ``graph`` and ``program`` what it was made of and becomes.

    Raises PlanError if these need a ``graph.json`` that is not there or not the plan's.
    """
    from dovetail.ir.printer import print_graph, print_plan, print_program

    plan = load_plan(path)
    found = load_graph(path, plan) if graph or program else None
    print(print_plan(plan))
    if found is not None and graph:
        from dovetail.passes.cost import task_flops

        print(f"\n{print_graph(found, task_flops)}")
    if found is not None and program:
        from dovetail.passes.apply_moves import apply_moves
        from dovetail.passes.lower import lower

        print(f"\n{print_program(lower(apply_moves(found, plan.moves), plan.budget))}")
    return 0


def check(path: Path) -> int:
    """Verify a plan without a solver; a line per check. Returns 1 if one of them fails."""
    checks = PlanCheck(path)
    for name, run in checks.all():
        try:
            found = run()
        except DovetailError as error:
            print(f"failed   {name:<8} {error}")
            return 1
        print(f"{'skipped' if found.skipped else 'ok':<8} {name:<8} {found.text}")
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
    from dovetail.timeline_file import compare, write_trace

    plan = load_plan(path)
    layout = apply_moves(load_graph(path, plan), plan.moves)
    compared = compare(plan, layout, path.parent, _note)
    timelines = compared.timelines()
    write_trace(out, timelines)
    sources = " and ".join(t.source for t in timelines)
    print(f"timeline, {sources}: {out} (opens at ui.perfetto.dev)")
    if picture:
        from dovetail.timeline_picture import draw

        draw(compared, picture, _note)
        print(f"picture of one layer: {picture}")
    return 0


@contextmanager
def _written(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the plan {out} cannot be written: {error.strerror}; name another place with -o"
        ) from error


def _note(text: str) -> None:
    print(f"dovetail: {text}", file=sys.stderr)
