"""Expert placement: balance, time, affinity, migration, scenarios and step time, against EPLB.

    python bench/placement.py --out bench/results/placement.md [--counts routing_counts.json]

Everything is computed here from seeds; ``--counts`` gives real routing counts by domain for the
sections on migration and scenarios. Times are CPU time of one thread, least of five.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from host import describe_machine
from placement_cases import (
    Floats,
    drifting_domains,
    lognormal_loads,
    problem,
    read_domains,
    zipf_loads,
)
from placement_measure import Rows, balances, checked, cpu_ms, spread, table
from placement_sections import (
    EXPERTS,
    LAYERS,
    affinity_section,
    drift_section,
    migration_section,
    scenario_section,
    step_section,
)

from dovetail.solvers.expert_eplb import eplb
from dovetail.solvers.expert_fill import fill

SEEDS = 3
CELLS = ((288, 32), (320, 64))
LOADS: dict[str, Callable[[int], Floats]] = {
    "Zipf 1.0": lambda seed: zipf_loads(1.0, LAYERS, EXPERTS, seed),
    "Zipf 1.2": lambda seed: zipf_loads(1.2, LAYERS, EXPERTS, seed),
    "Zipf 1.5": lambda seed: zipf_loads(1.5, LAYERS, EXPERTS, seed),
    "lognormal 0.5": lambda seed: lognormal_loads(0.5, LAYERS, EXPERTS, seed),
    "lognormal 1": lambda seed: lognormal_loads(1.0, LAYERS, EXPERTS, seed),
}


def balance_section() -> Iterator[str]:
    """Balance and planning time of EPLB and ours, cell by cell."""
    policies: tuple[tuple[str, str, dict[str, Any], dict[str, int]], ...] = (
        ("EPLB global", "eplb", {}, {}),
        ("EPLB hierarchical (8 groups, 4 nodes)", "eplb", {}, {"nodes": 4, "expert_groups": 8}),
        ("ours, weighted", "balance", {}, {}),
        ("ours, weighted, hierarchical", "balance", {}, {"nodes": 4, "expert_groups": 8}),
        ("ours, even shares", "balance", {"split": "even"}, {}),
        ("ours, even shares, 20 restarts", "balance", {"split": "even", "rounds": 20}, {}),
    )
    for slots, devices in CELLS:
        rows: Rows = []
        for title, policy, knobs, fields in policies:
            cells = []
            for make in LOADS.values():
                found, seconds = [], []
                for seed in range(SEEDS):
                    loads = make(seed)
                    asked = problem(loads, slots=slots, devices=devices, **fields)
                    answer, spent = checked(asked, policy, **knobs)
                    found += balances(answer, loads)
                    seconds.append(spent)
                cells.append(f"{spread(found)} ({min(seconds) * 1e3:.0f} ms)")
            rows.append((title, *cells))
        yield f"\n{slots} slots on {devices} devices:\n"
        yield table(("policy", *LOADS), rows)


def planner_section() -> Iterator[str]:
    """The two planners alone, array to array."""
    rows: Rows = []
    for slots, devices in CELLS:
        for name, make in LOADS.items():
            loads = make(0)
            capacity = np.full(devices, slots // devices)
            theirs = cpu_ms(lambda w=loads, g=devices, p=slots: eplb(w, p, 1, 1, g))  # type: ignore[misc]
            ours = cpu_ms(lambda w=loads, c=capacity: fill(w, c))  # type: ignore[misc]
            cell = f"{slots}/{devices}"
            rows.append((cell, name, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}x"))
    yield table(("cell", "loads", "EPLB, CPU ms", "weighted fill, CPU ms", "ratio"), rows)


def example_section() -> Iterator[str]:
    """The published README's example: what EPLB gets, what is best, and what is proved."""
    loads = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ],
        float,
    )
    asked = problem(loads, slots=16, devices=8)
    rows: Rows = []
    for title, policy, knobs in (
        ("EPLB global", "eplb", {}),
        ("ours, even shares", "balance", {"split": "even", "work": 8.0}),
        ("ours, weighted", "balance", {"work": 8.0}),
    ):
        answer, seconds = checked(asked, policy, **knobs)
        found = [f"{b:.4f}" for b in balances(answer, loads)]
        bound = [
            f"{w.sum() / 8 / c.bound:.4f}" for w, c in zip(loads, answer.certificates, strict=True)
        ]
        status = ", ".join(c.status for c in answer.certificates)
        rows.append((title, " / ".join(found), " / ".join(bound), status, f"{seconds:.1f}"))
    yield table(("policy", "balance by layer", "none above", "status", "CPU s"), rows)


def report(counts: Path | None) -> Iterator[str]:
    """All sections as Markdown."""
    facts = describe_machine()
    domains = read_domains(counts) if counts else drifting_domains(3, 64, 3, 0)
    source = f"`{counts.name}`" if counts else "synthetic domains"
    yield "# Expert placement"
    where = f"{str(facts['date'])[:10]}, on {facts['cores']} cores of {facts['cpu']}"
    yield f"\nMade by `python bench/placement.py`, {where}."
    yield "Times are CPU time of one thread. Every answer passed `verify_placement`."
    for title, text, lines in (
        (
            "Balance",
            f"Mean over heaviest device, mean / worst over {LAYERS} layers and {SEEDS} seeds; in "
            "brackets the CPU time of `place` for all layers, certificates included.",
            balance_section(),
        ),
        ("Planners alone", f"{LAYERS} layers of {EXPERTS} experts, numpy both.", planner_section()),
        ("The published example", "12 experts, 16 slots, 8 devices.", example_section()),
        (
            "Affinity",
            "32 layers, 64 experts, 8 devices; load limit 1.10 of the mean, or 1.02 of what is "
            "found without affinity.",
            affinity_section(),
        ),
        ("Migration", f"From {source}; balance 0.98 asked.", migration_section(domains)),
        ("Drift", "Zipf 1.0, then every load times lognormal 0.3.", drift_section()),
        ("Scenarios", f"From {source}, by layer and domain.", scenario_section(domains)),
        (
            "Step time",
            "Microseconds, mean over layers, modelled and not measured: DeepSeek-V3's experts in "
            "FP8 by an H100's data sheet, 256 experts in 288 slots on 32 devices.",
            step_section(),
        ),
    ):
        yield f"\n## {title}\n\n{text}\n"
        yield from lines


def main() -> None:
    """Print the report, and write it to ``--out``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--counts", type=Path, help="routing counts by domain (JSON)")
    arguments = parser.parse_args()
    lines = []
    for line in report(arguments.counts):
        print(line, flush=True)
        lines.append(line)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
