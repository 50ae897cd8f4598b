"""Do predicted and measured times put the policies in the same order?

Reads the points that section ``accuracy`` of ``offload_cpu.py`` measured: at every checkpoint and
budget, each policy's predicted and measured seconds.
"""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Point:
    """One policy's seconds, predicted and measured."""

    policy: str
    predicted: float
    measured: float


def agreement_table(result: Path) -> str:
    """The table, in Markdown."""
    data = json.loads(result.read_text(encoding="utf-8"))
    cells: dict[tuple[str, float, str], list[Point]] = {}
    for point in data["sections"]["accuracy"]["points"]:
        key = (point["checkpoint"], point["budget"], point["prompts"])
        predicted, measured = point["seconds"]
        cells.setdefault(key, []).append(Point(point["policy"], predicted, measured))
    lines = [
        "| checkpoint | budget GB | policies | Kendall's tau | auto ÷ best |",
        "|---|---|---|---|---|",
    ]
    for (checkpoint, budget, _), points in cells.items():
        if len(points) < 2:
            continue
        auto = next((p.measured for p in points if p.policy.startswith("auto")), None)
        others = [p.measured for p in points if not p.policy.startswith("auto")]
        ratio = f"{auto / min(others):.2f}" if auto and others else "-"
        names = ", ".join(p.policy for p in sorted(points, key=lambda p: p.measured))
        tau = f"{kendall_tau(points):.2f}"
        lines.append(f"| {checkpoint} | {budget / 1e9:.2f} | {names} | {tau} | {ratio} |")
    every = [p for points in cells.values() for p in points]
    lines.append(f"\nKendall's tau over all {len(every)} points: {kendall_tau(every):.2f}")
    return "\n".join(lines)


def kendall_tau(points: Iterable[Point]) -> float:
    """Share of pairs in the same order less share in the other; ties count as neither."""
    signs = [
        ((a.predicted > b.predicted) - (a.predicted < b.predicted))
        * ((a.measured > b.measured) - (a.measured < b.measured))
        for a, b in itertools.combinations(points, 2)
    ]
    return sum(signs) / len(signs) if signs else 0.0
