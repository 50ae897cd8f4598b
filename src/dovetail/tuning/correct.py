"""Corrections of the cost model: by how much measured seconds exceed predicted ones.

The machine's curves are measured one at a time and at their best, so what they predict is too short
and always to the same side. Every schedule that a tuning runs says by how much, for each class of
work; the medians over the schedules become factors of the machine for this model, and the ratios
are kept beside them. A factor is never below 1, so that the bound stays a bound.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dovetail.ir.machine import Machine
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout
from dovetail.passes.cost import Costs
from dovetail.passes.simulate import Simulator
from dovetail.tuning_db.facts import Correction

MOST = 4.0
"""A larger factor says that something else was at work than what the cost model describes."""
LEAST_SHARE = 0.002
"""Classes that take less of the time than this are left as they are: mostly the clock's noise."""
STEP = "step"
"""The class of what is left of a step once the classes of work are corrected."""

Work = Mapping[str, tuple[float, float]]
"""Measured and predicted seconds by class of work."""


def factors(found: Sequence[Work]) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """The factor of every class, and the ratios that it is the median of."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for work in found:
        total = sum(measured for measured, _ in work.values())
        for name, (measured, predicted) in work.items():
            if predicted > 0 and measured >= LEAST_SHARE * total:
                ratios[name].append(measured / predicted)
    evidence = {name: tuple(sorted(each)) for name, each in sorted(ratios.items())}
    return {name: _factor(each) for name, each in evidence.items()}, evidence


def step_factor(
    machine: Machine,
    corrected: Mapping[str, float],
    workload: Workload,
    timed: Sequence[tuple[Layout, float]],
) -> tuple[float, tuple[float, ...]]:
    """What is left of the measured seconds (set-up aside) of these layouts on the workload when the
    classes are corrected: its factor, and the ratios."""
    better = replace(machine, corrections=dict(corrected))
    costs = Costs(better)
    ratios = []
    for layout, seconds in timed:
        predicted = Simulator(layout, better, costs).predict(workload)
        ratios.append(seconds / (predicted.seconds - predicted.setup_seconds))
    evidence = tuple(sorted(ratios))
    return _factor(evidence), evidence


def correct(
    machine: Machine,
    silicon: Mapping[str, str],
    software: Mapping[str, str],
    graph: str,
    workload: Workload,
    found: Sequence[Work],
    timed: Sequence[tuple[Layout, float]],
) -> Correction:
    """The correction that these runs of ``workload`` speak for."""
    by_class, evidence = factors(found)
    factor, ratios = step_factor(machine, by_class, workload, timed)
    return Correction(
        silicon, software, graph, by_class | {STEP: factor}, evidence | {STEP: ratios}
    )


def _factor(ratios: Sequence[float]) -> float:
    return min(MOST, max(1.0, statistics.median(ratios))) if ratios else 1.0
