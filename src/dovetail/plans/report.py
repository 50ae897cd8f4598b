"""`dovetail plan report`: what a report shows, found before anything is drawn.

``plan_report_sections`` puts it down as one page that needs nothing but a browser.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.ir.errors import OutputError
from dovetail.ir.plan import Plan
from dovetail.ir.record_file import write_whole
from dovetail.ir.task_graph import TaskGraph
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.engine_use import EngineUse, engine_use
from dovetail.passes.expert_precision import settled
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.lower import lower, segments
from dovetail.passes.replay import buffers_held
from dovetail.passes.sensitivity import Effect, Note, curve, resources
from dovetail.plans.explain import Explanation, explain
from dovetail.plans.timeline_file import REPORT_FILE, Compared, compare
from dovetail.plans.timeline_gpu import gpu_rings, window
from dovetail.plans.timeline_panel import Panel, segment_classes

FACTORS = (0.5, 0.75, 1.5, 2.0)
"""Multiples of a tier's budget and of the disk's bandwidth at which the plan is solved again."""
STEADY_LAYERS = 9


@dataclass(frozen=True, slots=True)
class Steady:
    """The steady state: panels, the class of every segment, and how long buffers are held."""

    panels: tuple[Panel, ...]
    classes: Mapping[str, str]
    held: Mapping[str, list[tuple[float, float]]]
    rings: Mapping[str, tuple[int, int]]
    period: float


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a report shows. What takes solving again is missing from a fast one; ``run`` is the
    report of a run of this plan, if one lies beside it."""

    plan: Plan
    steady: Steady
    engines: tuple[EngineUse, ...]
    run: Mapping[str, Any] | None
    explanation: Explanation | None
    curves: tuple[tuple[Effect, ...], ...]


def findings(graph: TaskGraph, plan: Plan, folder: Path, fast: bool, note: Note) -> Findings:
    """Find what a report of a plan shows; ``folder`` may hold a run of it."""
    layout = apply_moves(graph, plan.moves)
    explanation, curves = None, []
    if not fast:
        explanation = explain(graph, plan, note)
        solvable = settled(graph, plan)
        for resource in resources(*solvable):
            if resource.kind == "tier" or resource.name == "disk":
                base = explanation.sensitivity.base
                curves.append(curve(*solvable, base, resource, FACTORS, note))
    return Findings(
        plan=plan,
        steady=_gpu_steady(layout, plan) if layout.device else _steady(layout, plan, folder, note),
        engines=explanation.sensitivity.engines if explanation else engine_use(graph, plan),
        run=_run(plan, folder),
        explanation=explanation,
        curves=tuple(curves),
    )


def _run(plan: Plan, folder: Path) -> Mapping[str, Any] | None:
    """The report of a run of this very plan."""
    try:
        found = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        figures = {key: float(found[key]) for key in ("tokens_per_second", "seconds", "rss_bytes")}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return figures if found.get("plan") == plan.digest() else None


def _steady(layout: Layout, plan: Plan, folder: Path, note: Note) -> Steady:
    compared = compare(plan, layout, folder, note)
    program = lower(layout, plan.budget)
    begin = min(s.start for s in compared.steady.spans if s.kind == "run")
    held = {
        ring: [(start - begin, end - begin) for start, end in spans]
        for ring, spans in buffers_held(program, compared.steady).items()
    }
    return Steady(
        panels=tuple(_panels(compared)),
        classes=segment_classes(segments(layout)),
        held=held,
        rings={ring.name: (ring.slots, ring.slot_bytes) for ring in program.rings},
        period=compared.period,
    )


def _panels(compared: Compared) -> Iterator[Panel]:
    layer = len(compared.layout.graph.layers) // 2
    for timeline in (compared.predicted(), compared.measured):
        panel = Panel.of(timeline, compared.step, layer) if timeline else None
        if panel is not None:
            yield panel


def _gpu_steady(layout: Layout, plan: Plan) -> Steady:
    """A few layers in the middle of the step that takes most of the time."""
    costs = GpuCosts(plan.machine, layout.graph.dtype, plan.workload.routing)
    predictor = GpuPredictor(layout, costs)
    spans = predictor.steady(plan.workload, STEADY_LAYERS).spans
    middle = STEADY_LAYERS // 2
    begin, end = (min(s.start for s in spans if s.step == i) for i in (middle, middle + 1))
    panel = Panel("predicted", middle, -1, end - begin, tuple(window(spans, begin, end)))
    held, rings = gpu_rings(predictor, plan.workload)
    return Steady((panel,), {}, held, rings, panel.seconds)


def tiers(plan: Plan) -> dict[str, Mapping[str, int]]:
    """Predicted peak bytes of every tier by what they hold, fast tiers first."""
    found = plan.prediction
    return {**found.tiers, "ram": found.bytes}


def write_report(text: str, out: Path) -> None:
    """Write the page; a crash leaves the old file or the new one. Raises OutputError."""
    try:
        write_whole(text, out)
    except OSError as error:
        raise OutputError(
            f"the report {out} cannot be written: {error.strerror}; name another place with -o"
        ) from error
