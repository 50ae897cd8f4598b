"""Published throughputs next to what the planner predicts for the same policy and machine.

    python bench/published.py --out bench/results/published.json

Nothing is fitted: machines are the described ones, the policy is the paper's, and so are its batch
sizes where the source prints them; other knobs are chosen by our search. ``decode`` cells compare
decode steps alone, ``all`` cells count prefill too, as the source does.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dovetail.ir.errors import DovetailError
from dovetail.ir.machine import Curve, Machine
from dovetail.ir.plan import Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.machine_files import load_machine
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.memory import RAM_SHARE
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.policies.common import Knobs
from dovetail.passes.policies.gpu import DEFAULTS, GPU_POLICIES

CONFIGS = Path(__file__).parent / "configs"
PROMPTS = 4096
"""Prompts at most of a cell whose source does not say how many."""
MOST_TOKENS = 1 << 15
"""Prompt tokens of a step at most where a source prints its groups: as many groups of prompts as
that pass a layer while its weights are there."""
MTBENCH = (
    "MoE-Lightning, MTBench table and artefact (arXiv 2411.11217, github.com/caoshiyi/artifacts)"
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One published figure: tokens/s of ``system`` as ``policy``; ``counts`` what it is measured
    over (decode or all). ``batch`` is the sequences of a group and the number of groups, ``flying``
    all sequences together where the last groups were not full, and ``printed`` other knobs, where
    the source prints them: then they are not searched. What is not ``pinned`` is copied within ram
    before it goes to the GPU."""

    source: str
    system: str
    policy: str
    machine: str
    model: str
    prompt: int
    new: int
    counts: str
    published: float
    batch: tuple[int, int] | None = None
    flying: int = 0
    printed: tuple[tuple[str, int], ...] = ()
    pinned: bool = True


def cells() -> Iterator[Cell]:
    """The figures, with where they were printed."""
    yield from _mtbench()
    yield from _helm()
    yield from _moe_gen()


def _mtbench() -> Iterator[Cell]:
    """Prompts have 77 tokens on the mean and 418 at most: FlexGen, DeepSpeed and MoE-Lightning(p)
    pad to that.

    From the artefact: FlexGen's batches (scripts in benchmarks/flexgen, which run it with
    ``pin_weight=False``), the sequences of MoE-Lightning's recorded runs (benchmarks/mtbench:
    seconds x tokens/s over new tokens), and its groups, which its planner
    (fastmoe/backend/optimizer.py) gives for as many sequences."""
    lengths = (32, 64, 128, 256)
    figures: dict[tuple[str, str, str, int], tuple[float, ...]] = {
        ("t4-192gb", "MoE-Lightning", "cgopipe", 77): (63.0, 101.3, 97.7, 96.9),
        ("l4-192gb", "MoE-Lightning", "cgopipe", 77): (203.0, 294.5, 217.5, 167.9),
        ("t4-192gb", "MoE-Lightning(p)", "cgopipe", 418): (15.6, 24.0, 30.1, 33.9),
        ("l4-192gb", "MoE-Lightning(p)", "cgopipe", 418): (53.7, 67.4, 79.0, 78.6),
        ("t4-192gb", "FlexGen", "zigzag", 418): (12.1, 12.3, 9.5, 9.6),
        ("l4-192gb", "FlexGen", "zigzag", 418): (29.2, 34.9, 37.2, 28.8),
        ("t4-192gb", "DeepSpeed", "model_batch", 418): (7.1, 7.6, 7.8, 6.7),
        ("l4-192gb", "DeepSpeed", "model_batch", 418): (12.7, 13.3, 12.1, 11.8),
    }
    flying: dict[tuple[str, str], tuple[int, ...]] = {
        ("t4-192gb", "MoE-Lightning"): (3097, 3097, 2296, 1485),
        ("l4-192gb", "MoE-Lightning"): (4494, 3616, 2608, 1560),
    }
    batches: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {
        ("t4-192gb", "MoE-Lightning"): ((164, 19), (164, 19), (164, 14), (100, 15)),
        ("l4-192gb", "MoE-Lightning"): ((324, 14), (228, 16), (164, 16), (164, 10)),
        ("t4-192gb", "MoE-Lightning(p)"): ((36, 14), (36, 14), (36, 14), (36, 14)),
        ("l4-192gb", "MoE-Lightning(p)"): ((68, 16), (68, 15), (68, 13), (68, 11)),
        ("t4-192gb", "FlexGen"): ((32, 40), (16, 78), (8, 139), (8, 113)),
        ("l4-192gb", "FlexGen"): ((64, 21), (64, 20), (64, 18), (32, 30)),
    }
    for (machine, system, policy, prompt), row in figures.items():
        seqs, groups = flying.get((machine, system)), batches.get((machine, system))
        for i, new in enumerate(lengths):
            cell = Cell(
                MTBENCH, system, policy, machine, "Mixtral-8x7B", prompt, new, "all", row[i]
            )
            yield replace(
                cell,
                batch=groups[i] if groups else None,
                flying=seqs[i] if seqs else 0,
                pinned=system != "FlexGen",
            )


def _helm() -> Iterator[Cell]:
    """All three pad; batch sizes are in the paper's table."""
    helm = {
        ("t4-192gb", 256, 50): ((22.7, 32, 61), (26.3, 36, 26), (11.8, 102, 1)),
        ("l4-192gb", 256, 50): ((50.1, 64, 33), (105.3, 100, 15), (18.6, 156, 1)),
        ("t4-192gb", 1984, 64): ((3.87, 3, 92), (4.52, 4, 19), (0.965, 8, 1)),
        ("l4-192gb", 1984, 64): ((7.14, 8, 36), (12.39, 8, 36), (1.45, 12, 1)),
    }
    padded = (("FlexGen", "zigzag"), ("MoE-Lightning(p)", "cgopipe"), ("DeepSpeed", "model_batch"))
    for (machine, prompt, new), found in helm.items():
        for (system, policy), (figure, group, groups) in zip(padded, found, strict=True):
            source = "MoE-Lightning, HELM table with batch sizes (arXiv 2411.11217)"
            cell = Cell(source, system, policy, machine, "Mixtral-8x7B", prompt, new, "all", figure)
            yield replace(cell, batch=(group, groups), pinned=system != "FlexGen")


def _moe_gen() -> Iterator[Cell]:
    """Of the batch sizes, the paper prints those of one of its own plans."""
    moe_gen = {
        "Mixtral-8x7B": (27, 33, 89, 469),
        "Mixtral-8x22B": (4, 5, 9, 91),
        "DeepSeek-V2": (1, 1, 1, 31),
    }
    systems = (
        ("DeepSpeed", "model_batch"),
        ("FlexGen*", "zigzag"),
        ("MoE-Lightning*", "cgopipe"),
        ("MoE-Gen", "module_batch"),
    )
    plan = (("seqs", 3640), ("rows", 75), ("expert_rows", 150), ("attention_cpu", 60))
    for model, figures in moe_gen.items():
        for (system, policy), figure in zip(systems, figures, strict=True):
            source = "MoE-Gen, table 6 (arXiv 2503.09716)"
            cell = Cell(source, system, policy, "a5000-512gb", model, 512, 256, "decode", figure)
            own = model == "Mixtral-8x7B" and system == "MoE-Gen"
            yield replace(cell, printed=plan if own else ())


@dataclass(frozen=True, slots=True)
class Row:
    """A cell with our predictions in tokens/s, and how long planning took."""

    cell: Cell
    predicted: float | None
    auto: float | None
    auto_policy: str
    seconds: float


def row(cell: Cell, graph: TaskGraph, machine: Machine, auto: bool) -> Row:
    """Predict a cell's own policy and, if wanted, ``auto``."""
    workload = _workload(cell, graph, machine)
    budget = {name: machine.tiers[name] for name in ("hbm", "ram")}
    begin = time.perf_counter()
    own = _own(cell, graph, machine, budget, workload)
    best = _planned(graph, machine, budget, workload, "auto") if auto else None
    return Row(
        cell,
        _rate(own, graph, cell) if own else None,
        _rate(best, graph, cell) if best else None,
        best.policy if best else "-",
        time.perf_counter() - begin,
    )


def _workload(cell: Cell, graph: TaskGraph, machine: Machine) -> Workload:
    """As many prompts as are in flight, where printed: such runs are one batch. Else no more
    than have their KV in ram beside all weights, as MoE-Gen's constraint on the host's memory says
    (arXiv 2503.09716): none of these systems reads weights from disk again."""
    prompts = _prompts(cell)
    if not prompts:
        free = machine.tiers["ram"] * RAM_SHARE - graph.weight_bytes
        held = graph.kv_bytes_per_token * (cell.prompt + cell.new)
        prompts = max(1, min(PROMPTS, int(free / held)))
    return Workload(((cell.prompt, prompts),), cell.new)


def _prompts(cell: Cell) -> int:
    """Sequences in flight where they are printed, else 0."""
    if cell.batch:
        return cell.flying or math.prod(cell.batch)
    return dict(cell.printed).get("seqs", 0)


def _own(
    cell: Cell, graph: TaskGraph, machine: Machine, budget: dict[str, int], workload: Workload
) -> Plan | None:
    """The cell's own policy with what its source prints."""
    if not cell.pinned:
        machine = _relayed(machine)
    printed = list(_printed(cell))
    if not printed:
        return _planned(graph, machine, budget, workload, cell.policy)
    made = [_planned(graph, machine, budget, workload, cell.policy, knobs) for knobs in printed]
    return min((p for p in made if p), key=lambda p: p.prediction.seconds, default=None)


def _relayed(machine: Machine) -> Machine:
    """The machine as pageable memory sees it: what goes to the GPU is copied into pinned memory
    first, on the thread that then starts the copy (FlexGen's ``general_copy``, pytorch_backend.py),
    so both take their time, one after the other. All cores copy, at the rate of memory."""
    gpu, memory = machine.accelerator, machine.workers * machine.memory_bandwidth
    assert gpu is not None
    rates = tuple(1 / (1 / rate + 2 / memory) for rate in gpu.h2d.y)
    return replace(machine, accelerator=replace(gpu, h2d=Curve(gpu.h2d.x, rates)))


def _printed(cell: Cell) -> Iterator[Knobs]:
    """The policy's knobs with what the source prints; as many groups of prompts a step as may be,
    and fewer."""
    fixed = {**DEFAULTS, **GPU_POLICIES[cell.policy].fixed, **dict(cell.printed)}
    if not cell.batch and not cell.printed:
        return
    if cell.batch:
        fixed |= {"seqs": _prompts(cell), "rows": cell.batch[0]}
    tokens = int(fixed["rows"]) * cell.prompt
    for groups in (max(1, MOST_TOKENS // tokens), 1):
        prefill = min(tokens * groups, MOST_TOKENS)
        yield {**fixed, "attn_tokens": tokens, "prefill_tokens": prefill}


def _planned(
    graph: TaskGraph,
    machine: Machine,
    budget: dict[str, int],
    workload: Workload,
    policy: str,
    knobs: Knobs | None = None,
) -> Plan | None:
    try:
        return choose(graph, machine, budget, workload, policy=policy, knobs=knobs)
    except DovetailError as error:
        print(f"{policy}: {error}", file=sys.stderr)
        return None


def _rate(plan: Plan, graph: TaskGraph, cell: Cell) -> float:
    if cell.counts == "all":
        work = plan.prediction.seconds - plan.prediction.setup_seconds
        return plan.prediction.tokens / work
    layout = apply_moves(graph, plan.moves)
    predictor = GpuPredictor(layout, GpuCosts(plan.machine, graph.dtype))
    phases = [p for p in predictor.phases(plan.workload) if p.work.decode]
    tokens = sum(p.steps * p.work.decode.seqs for p in phases if p.work.decode)
    return tokens / sum(p.steps * predictor.step(p.work)[0] for p in phases)


def table(rows: list[Row]) -> str:
    """The rows in Markdown, and the median ratio."""
    with_auto = any(r.auto for r in rows)
    titles = ["model", "machine", "prompt+new", "system", "policy", "published", "predicted"]
    titles += ["ratio", "auto", "by"] if with_auto else ["ratio"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    ratios: list[float] = []
    given: list[float] = []
    for r in rows:
        c = r.cell
        ratio = r.predicted / c.published if r.predicted else None
        ratios += [ratio] if ratio else []
        given += [ratio] if ratio and (c.batch or c.printed) else []
        figures = [f"{c.published:g}", _text(r.predicted), _text(ratio)]
        figures += [_text(r.auto), r.auto_policy] if with_auto else []
        batch = f" in {c.batch[1]} x {c.batch[0]}" if c.batch else ""
        batch = f" in {_prompts(c)}" if c.printed else batch
        head = [c.model, c.machine, f"{c.prompt}+{c.new}{batch} ({c.counts})", c.system, c.policy]
        lines.append("| " + " | ".join([*head, *figures]) + " |")
    if ratios:
        off = statistics.median(abs(r - 1) for r in ratios)
        lines.append(
            f"\nmedian of predicted ÷ published {statistics.median(ratios):.2f} over {len(ratios)} "
            f"cells; median distance from 1: {off:.0%}"
        )
    if given:
        off = statistics.median(abs(r - 1) for r in given)
        lines.append(
            f"where batch sizes are known: median {statistics.median(given):.2f} over "
            f"{len(given)} cells; median distance from 1: {off:.0%}"
        )
    return "\n".join(lines)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def captured(name: str) -> TaskGraph:
    """The task graph of a model from its config alone."""
    from transformers import AutoConfig

    from dovetail.capture.capture import capture_config

    return capture_config(AutoConfig.from_pretrained(CONFIGS / name)).graph


def main() -> int:
    """Print the table and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--own", action="store_true", help="leave auto out: a minute, not ten")
    parser.add_argument("--models", default="", help="only these, by comma")
    options = parser.parse_args()
    rows: list[Row] = []
    graphs: dict[str, TaskGraph] = {}
    for cell in cells():
        if options.models and cell.model not in options.models.split(","):
            continue
        graph = graphs.setdefault(cell.model, captured(cell.model))
        rows.append(row(cell, graph, load_machine(cell.machine), not options.own))
        print(
            f"{cell.model} {cell.machine} {cell.system} {rows[-1].seconds:.1f} s", file=sys.stderr
        )
    print(table(rows))
    options.out.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
