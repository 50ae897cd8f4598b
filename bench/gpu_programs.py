"""Every GPU policy's program, for models, machines and workloads: checked for hazards, with no GPU.

    python bench/gpu_programs.py --out bench/results/gpu-programs.json

For each policy one schedule that fits is lowered for every kind of step. The program is verified,
and its emitted executor is run on the fake device. A row says how long the program is and how the
step's simulated time, all layers in the model's order, compares with what the planner predicts from
each kind of layer alone. ``--auto`` lowers what `auto` chooses instead, which takes longer.
"""

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from policies import WORKLOADS, graphs, plan_cell

from dovetail.codegen.gpu_executor import emit_gpu_executor
from dovetail.ir.errors import DovetailError
from dovetail.ir.gpu_program import GpuProgram
from dovetail.ir.machine import Machine
from dovetail.ir.moves import Move
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.verify_gpu_program import verify_gpu_program
from dovetail.ir.workload import Workload
from dovetail.machine_files import load_machine
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.lower import lower_gpu, simulated_seconds
from dovetail.passes.gpu.memory import HBM_SHARE, RAM_SHARE
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.loop.work import StepWork
from dovetail.passes.policies.gpu import GPU_POLICIES, GpuSetting, moves, starts
from dovetail.runtime.gpu.executor import GpuExecutor
from dovetail.runtime.gpu.fake_device import FakeDevice

MODELS = ("Mixtral-8x7B", "Mixtral-8x22B", "Qwen3-30B-A3B", "DeepSeek-V2")
MACHINES = ("rtx4090-64gb", "l4-192gb", "h100-1tb", "8xh100")


@dataclass(frozen=True, slots=True)
class Row:
    """A program, in figures; ``hazard`` is "" where none was found. ``simulated`` and ``predicted``
    are seconds of the step, ``seconds`` CPU time of lowering, verifying and the fake device."""

    model: str
    machine: str
    workload: str
    policy: str
    kind: str
    seqs: int
    operations: int = 0
    waits: int = 0
    lines: int = 0
    simulated: float = 0.0
    predicted: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    hazard: str = ""


def schedules(
    graph: TaskGraph, machine: Machine, workload: Workload, auto: bool
) -> Iterator[tuple[str, int, tuple[Move, ...]]]:
    """(policy, sequences in flight, moves) of every policy that fits: with the most sequences."""
    if auto:
        try:
            plan = plan_cell(graph, machine, workload)
        except DovetailError as error:
            print(f"{machine.name}: {error}", file=sys.stderr)
            return
        yield f"auto ({plan.policy})", int(plan.knobs["seqs"]), plan.moves
        return
    hbm, ram = budgets(machine).values()
    setting = GpuSetting(graph, machine, hbm, ram, workload)
    for name, policy in GPU_POLICIES.items():
        fits = [(k, m) for k in starts(setting, policy) if (m := moves(setting, k)) is not None]
        if fits:
            yield name, int(fits[-1][0]["seqs"]), fits[-1][1]


def budgets(machine: Machine) -> dict[str, int]:
    """What a plan may use of a machine."""
    return {
        "hbm": int(machine.tiers["hbm"] * HBM_SHARE),
        "ram": int(machine.tiers["ram"] * RAM_SHARE),
    }


def checked(
    row: dict[str, Any], predictor: GpuPredictor, work: StepWork, budget: dict[str, int]
) -> Row:
    """Lower, verify, emit and run on the fake device."""
    begin = time.process_time()
    try:
        program = lower_gpu(predictor, work, budget)
        verify_gpu_program(program)
        lines = _run(program)
    except DovetailError as error:
        return Row(**row, hazard=str(error))
    seconds = time.process_time() - begin
    items = (type(i).__name__ for each in program.flat().values() for i in each)
    return Row(
        **row,
        operations=len(program.ops()),
        waits=Counter(items)["Wait"],
        lines=lines,
        simulated=simulated_seconds(predictor, work),
        predicted=predictor.step(work)[0],
        seconds=seconds,
        notes=program.notes,
    )


def _run(program: GpuProgram) -> int:
    source = emit_gpu_executor(program, {"step": program.kind})
    functions: dict[str, Any] = {}
    exec(compile(source, "executor", "exec"), functions)
    GpuExecutor(program, FakeDevice(program.capacity), functions).run_step()
    return len(source.splitlines())


def table(rows: list[Row]) -> str:
    """One line for each model, machine and policy."""
    lines = [
        "| model | machine | workload | policy | steps | operations | waits | lines | simulated ÷ "
        "predicted | hazards |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    key = lambda row: (row.model, row.machine, row.workload, row.policy)  # noqa: E731
    for (model, machine, workload, policy), some in itertools.groupby(rows, key):
        mine = list(some)
        ratios = ", ".join(f"{r.simulated / r.predicted:.2f}" for r in mine if r.predicted)
        found = "; ".join(r.hazard for r in mine if r.hazard) or "none"
        cells = [model, machine, workload, policy, ", ".join(r.kind for r in mine)]
        cells += [", ".join(str(n) for n in (getattr(r, what) for r in mine))
                  for what in ("operations", "waits", "lines")]  # fmt: skip
        lines.append(f"| {' | '.join([*cells, ratios, found])} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table; 1 if any program has a hazard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--machines", default=",".join(MACHINES))
    parser.add_argument("--workloads", default="batch 512+256")
    parser.add_argument("--auto", action="store_true")
    options = parser.parse_args()
    rows: list[Row] = []
    for model, graph in graphs(options.models.split(",")):
        pairs = itertools.product(options.machines.split(","), options.workloads.split(","))
        for machine_name, workload_name in pairs:
            machine, workload = load_machine(machine_name), WORKLOADS[workload_name]
            costs = GpuCosts(machine, graph.dtype)
            for policy, seqs, made in schedules(graph, machine, workload, options.auto):
                predictor = GpuPredictor(apply_moves(graph, made), costs)
                works = {p.work.kind: p.work for p in predictor.phases(workload)}
                for kind, work in works.items():
                    named = {"model": model, "machine": machine_name, "workload": workload_name}
                    row = named | {"policy": policy, "kind": kind, "seqs": seqs}
                    rows.append(checked(row, predictor, work, budgets(machine)))
            print(f"{model} {machine_name} {workload_name}: {len(rows)}", file=sys.stderr)
    print(table(rows))
    if options.out:
        text = json.dumps([asdict(row) for row in rows], indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")
    return int(any(row.hazard for row in rows))


if __name__ == "__main__":
    sys.exit(main())
