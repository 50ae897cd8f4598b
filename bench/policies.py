"""Every policy and `auto` on models, machines and workloads: predicted tokens/s, bound and gap.

    python bench/policies.py --out bench/results/policies.json
    python bench/policies.py --measured bench/results/zen5-2core-OLMoE-1B-7B.json

The first form plans only, from the configs in ``bench/configs``. The second reads what
``bench/offload_cpu.py`` measured in its section ``accuracy`` and says how well the predicted order
of the policies agrees with the measured one (Kendall's tau), and `auto` against the best one.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from agreement import agreement_table

from dovetail.ir.errors import DovetailError
from dovetail.ir.machine import Machine
from dovetail.ir.plan import Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.machine_files import load_machine
from dovetail.passes.choose import choose
from dovetail.passes.gpu.residency import NAME

CONFIGS = Path(__file__).parent / "configs"
MODELS = ("Mixtral-8x7B", "Mixtral-8x22B", "Qwen3-30B-A3B", "DeepSeek-V2", "DeepSeek-V3")
MACHINES = ("rtx4090-64gb", "a5000-512gb", "l4-192gb", "t4-192gb", "h100-1tb", "8xh100")
WORKLOADS = {
    "chat 77+64": Workload(((77, 4096),), 64),
    "batch 512+256": Workload(((512, 4096),), 256),
    "scoring 512+1": Workload(((512, 16384),), 1),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A model, machine and workload: every policy's predicted seconds, auto's plan in short.

    ``proved_gap`` is the gap of the integer program over batch sizes and residency,
    ``period_gap`` the largest of the plan's layer bodies; ``planning_seconds`` are of CPU time."""

    model: str
    machine: str
    workload: str
    policies: dict[str, float | None]
    auto: float | None
    auto_policy: str
    auto_knobs: dict[str, int | bool]
    tokens: int
    bound: float | None
    bound_resource: str
    planning_seconds: float
    refused: str = ""
    proved_gap: float | None = None
    period_gap: float | None = None


def plan_cell(graph: TaskGraph, machine: Machine, workload: Workload) -> Plan:
    """``auto``'s plan with all of the machine's memory as the budget."""
    budget = {name: size for name, size in machine.tiers.items() if name != "disk"}
    return choose(graph, machine, budget, workload)


def cell(model: str, graph: TaskGraph, machine: Machine, name: str, workload: Workload) -> Cell:
    """One cell of the table; a plan that does not fit says so."""
    begin = time.process_time()
    try:
        plan = plan_cell(graph, machine, workload)
    except DovetailError as error:
        seconds = time.process_time() - begin
        return Cell(model, machine.name, name, {}, None, "-", {}, 0, None, "", seconds, str(error))
    policies: dict[str, float | None] = {}
    for candidate in plan.candidates:
        known = policies.get(candidate.policy)
        if candidate.seconds is not None and (known is None or candidate.seconds < known):
            policies[candidate.policy] = candidate.seconds
        policies.setdefault(candidate.policy, None)
    return Cell(
        model=model,
        machine=machine.name,
        workload=name,
        policies=policies,
        auto=plan.prediction.seconds,
        auto_policy=plan.policy,
        auto_knobs=dict(plan.knobs),
        tokens=plan.prediction.tokens,
        bound=plan.bound.seconds,
        bound_resource=plan.bound.resource,
        planning_seconds=time.process_time() - begin,
        proved_gap=max((c.gap for c in plan.certificates if c.name == NAME), default=None),
        period_gap=max((c.gap for c in plan.certificates if "period" in c.name), default=None),
    )


def table(cells: list[Cell]) -> str:
    """The cells in Markdown: tokens/s of every policy, best one's share of the bound."""
    names = list(dict.fromkeys(n for c in cells for n in c.policies))
    head = ["model", "machine", "workload", *names, "auto", "bound", "gap", "set by"]
    head += ["proved gap", "layer gap", "planned in"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for c in cells:
        if c.auto is None or c.bound is None:
            lines.append(f"| {c.model} | {c.machine} | {c.workload} | does not fit |")
            continue
        rates = [_rate(c.tokens, c.policies.get(name)) for name in names]
        worse = [n for n, s in c.policies.items() if s is not None and s < c.auto * (1 - 1e-9)]
        assert not worse, f"auto is predicted worse than {worse} on {c.model}, {c.machine}"
        row = [c.model, c.machine, c.workload, *rates, f"**{_rate(c.tokens, c.auto)}**"]
        row += [_rate(c.tokens, c.bound), f"{1 - c.bound / c.auto:.0%}", c.bound_resource]
        row += [_share(c.proved_gap), _share(c.period_gap), f"{c.planning_seconds:.1f} s"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _share(gap: float | None) -> str:
    return "-" if gap is None else f"{gap:.1%}"


def _rate(tokens: int, seconds: float | None) -> str:
    return "-" if not seconds else f"{tokens / seconds:.3g}"


def graphs(names: list[str]) -> Iterator[tuple[str, TaskGraph]]:
    """Task graphs from configs alone."""
    from transformers import AutoConfig

    from dovetail.capture.capture import capture_config

    for name in names:
        yield name, capture_config(AutoConfig.from_pretrained(CONFIGS / name)).graph


def main() -> int:
    """Print the table and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--machines", default=",".join(MACHINES))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--measured", type=Path, metavar="RESULT.json")
    options = parser.parse_args()
    if options.measured:
        print(agreement_table(options.measured))
        return 0
    cells: list[Cell] = []
    for model, graph in graphs(options.models.split(",")):
        pairs = itertools.product(options.machines.split(","), options.workloads.split(","))
        for machine, name in pairs:
            cells.append(cell(model, graph, load_machine(machine), name, WORKLOADS[name]))
            print(f"{model} {machine} {name}: {cells[-1].planning_seconds:.1f} s", file=sys.stderr)
    print(table(cells))
    if options.out:
        text = json.dumps([asdict(c) for c in cells], indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
