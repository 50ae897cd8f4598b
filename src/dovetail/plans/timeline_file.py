"""Timelines beside a plan: what a run recorded is read back and set beside a fresh prediction."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dovetail.ir.batching import Step
from dovetail.ir.errors import InputError, OutputError
from dovetail.ir.plan import Plan
from dovetail.ir.record_file import write_whole
from dovetail.ir.timeline import Span, Timeline, chrome_trace
from dovetail.passes.apply_moves import Layout
from dovetail.passes.cost import Costs
from dovetail.passes.simulate import Simulator, workload_steps

TIMELINE_FILE, REPORT_FILE = "timeline.json", "report.json"
"""What `dovetail run` leaves beside its plan."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A plan's step as the simulator sees it in steady state, and what was recorded.

    ``steady`` holds the spans of step number ``step`` and ``period`` the seconds until the next
    step does the same; ``measured`` has several steps, that one among them.
    """

    plan: Plan
    layout: Layout
    step: int
    steady: Timeline
    period: float
    measured: Timeline | None

    def timelines(self) -> list[Timeline]:
        """The predicted step, moved in time to where it was recorded, and all that was."""
        first = min(span.start for span in self.steady.spans)
        if self.measured is None:
            return [_moved(self.steady, -first)]
        spans = self.measured.step(self.step).spans
        # Its loads run ahead of it, but nothing in a trace is before zero.
        by = max(_compute_start(spans) - _compute_start(self.steady.spans), -first)
        return [_moved(self.steady, by), self.measured]

    def predicted(self) -> Timeline:
        """The predicted step between its neighbours, whose loads overlap it."""
        around = [_moved(self.steady, self.period * shift, shift) for shift in (-1, 0, 1)]
        return Timeline(self.steady.source, tuple(span for t in around for span in t.spans))


def _moved(timeline: Timeline, seconds: float, steps: int = 0) -> Timeline:
    return Timeline(
        timeline.source,
        tuple(
            replace(s, start=s.start + seconds, end=s.end + seconds, step=s.step + steps)
            for s in timeline.spans
        ),
    )


def _compute_start(spans: Iterable[Span]) -> float:
    return min(span.start for span in spans if span.kind == "run")


def compare(plan: Plan, layout: Layout, folder: Path, note: Callable[[str], None]) -> Compared:
    """Simulate a step in the middle of what a run recorded in ``folder``, or of the workload.

    A decode step is preferred. Raises InputError if the folder's timeline cannot be read.
    """
    measured = _measured(plan, folder, note)
    steps = list(workload_steps(layout, plan.workload))
    numbers: Sequence[int] = range(len(steps))
    if measured is not None:
        numbers = sorted({span.step for span in measured.spans if span.kind == "run"})
    number = _middle(numbers, steps)
    step = _at(steps, number)
    simulator = Simulator(layout, plan.machine, Costs(plan.machine))
    spans = tuple(replace(span, step=number) for span in simulator.steady(step).spans)
    period, _ = simulator.step_seconds(step)
    return Compared(plan, layout, number, Timeline("predicted", spans), period, measured)


def _middle(numbers: Sequence[int], steps: Sequence[Step]) -> int:
    """The number nearest to the middle whose step is decode alone, which most are; else the
    middle."""
    middle = len(numbers) // 2
    near = sorted(range(len(numbers)), key=lambda place: abs(place - middle))
    for place in near:
        if not any(group.prefill for group in _at(steps, numbers[place]).groups):
            return numbers[place]
    return numbers[middle]


def _at(steps: Sequence[Step], number: int) -> Step:
    """That step of the workload, or the last one if there are fewer."""
    return steps[min(number, len(steps) - 1)]


def _measured(plan: Plan, folder: Path, note: Callable[[str], None]) -> Timeline | None:
    """What a run of this plan recorded; a run of another plan is not comparable."""
    measured = read_measured(folder / TIMELINE_FILE)
    if measured is None or not any(span.kind == "run" for span in measured.spans):
        return None
    ran = _plan_of_run(folder / REPORT_FILE)
    if ran is not None and ran != plan.digest():
        note(f"{folder / TIMELINE_FILE} is left out: it is of a run of another plan ({ran[:12]})")
        return None
    return measured


def _plan_of_run(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["plan"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_trace(path: Path, timelines: Iterable[Timeline]) -> None:
    """Write the timelines in Chrome's trace event format; a crash leaves the old file or the new
    one. Raises OutputError."""
    text = json.dumps(chrome_trace(timelines), allow_nan=False)
    try:
        write_whole(text + "\n", path)
    except OSError as error:
        raise OutputError(
            f"the timeline {path} cannot be written: {error.strerror}; name another place"
        ) from error


def read_measured(path: Path) -> Timeline | None:
    """What a run recorded, from the trace at ``path``; None if there is no such file or it holds
    nothing measured. Raises InputError if it is no trace of dovetail."""
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        return _process(trace["traceEvents"], "measured")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{path} does not hold a timeline of dovetail ({type(error).__name__}: {error}); "
            "delete it, or run again to record another"
        ) from None


def _process(events: list[dict[str, Any]], source: str) -> Timeline | None:
    """The spans of the process called ``source``."""
    number, engines = None, {}
    for event in events:
        if event["ph"] == "M" and event["name"] == "process_name":
            if event["args"]["name"] == source:
                number = event["pid"]
        elif event["ph"] == "M" and event["name"] == "thread_name":
            engines[event["pid"], event["tid"]] = str(event["args"]["name"])
    if number is None:
        return None
    mine = [event for event in events if event["ph"] == "X" and event["pid"] == number]
    return Timeline(source, tuple(_span(e, engines[e["pid"], e["tid"]]) for e in mine))


def _span(event: Mapping[str, Any], engine: str) -> Span:
    layer, start = int(event["args"]["layer"]), float(event["ts"]) / 1e6
    return Span(
        engine=engine,
        kind=str(event["cat"]),
        name=str(event["name"]).removesuffix(f"[{layer}]"),
        layer=layer,
        start=start,
        end=start + float(event["dur"]) / 1e6,
        step=int(event["args"]["step"]),
    )
