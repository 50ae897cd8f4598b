"""What a run reports: prediction against the clock, memory against the budget, time against the
bound."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dovetail.executing import Measured
from dovetail.ir import codec
from dovetail.ir.batching import Step
from dovetail.ir.plan import Plan
from dovetail.ir.timeline import Timeline, chrome_trace
from dovetail.ir.units import format_bytes, format_duration
from dovetail.passes.apply_moves import Layout
from dovetail.passes.bound import bound_of_steps
from dovetail.passes.cost import Costs
from dovetail.passes.simulate import Simulator

REPORT_FILE, TIMELINE_FILE = "report.json", "timeline.json"


@dataclass(frozen=True, slots=True)
class Report:
    """A finished run. ``predicted_seconds`` is for the steps that ran, sequences that ended early
    included; the plan's own prediction lets every sequence reach its full length. ``bound`` is for
    the same tokens."""

    policy: str
    plan: str
    budget: int
    tokens: int
    steps: int
    setup_seconds: float
    seconds: float
    predicted_seconds: float
    planned_seconds: float
    bound_seconds: float
    bound_resource: str
    predicted_bytes: dict[str, int]
    pool_bytes: int
    rss_bytes: int
    predicted_classes: dict[str, float]
    measured_classes: dict[str, float]
    step_seconds: tuple[float, ...]
    predicted_timeline: Timeline
    measured_timeline: Timeline
    hbm: dict[str, int] = field(default_factory=dict)
    """Bytes of a GPU's memory: measured and predicted peak, and budget."""

    @classmethod
    def of(cls, plan: Plan, layout: Layout, steps: Sequence[Step], measured: Measured) -> "Report":
        """Set the measured run against what the cost model says of the same steps."""
        simulator = Simulator(layout, plan.machine, Costs(plan.machine))
        predicted = simulator.predict_steps(steps)
        least = bound_of_steps(layout.graph, plan.machine, plan.budget["ram"], steps)
        return cls(
            policy=plan.policy,
            plan=plan.digest(),
            budget=plan.budget["ram"],
            tokens=measured.tokens,
            steps=measured.steps,
            setup_seconds=measured.setup_seconds,
            seconds=measured.seconds,
            predicted_seconds=predicted.seconds,
            planned_seconds=plan.prediction.seconds,
            bound_seconds=least.seconds,
            bound_resource=least.resource,
            predicted_bytes=dict(plan.prediction.bytes),
            pool_bytes=measured.pool_bytes,
            rss_bytes=measured.rss_bytes,
            predicted_classes=dict(predicted.classes),
            measured_classes=measured.classes,
            step_seconds=measured.step_seconds,
            predicted_timeline=simulator.steady(steps[len(steps) // 2]),
            measured_timeline=measured.timeline,
        )

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, set-up included."""
        return self.tokens / self.seconds

    @property
    def predicted_peak(self) -> int:
        """Predicted peak of the ram tier in bytes."""
        return sum(self.predicted_bytes.values())

    @property
    def roof_fraction(self) -> float:
        """Bound over measured time."""
        return self.bound_seconds / self.seconds

    def as_dict(self) -> dict[str, object]:
        """The report as JSON data, timelines left out."""
        data = codec.encode(self)
        assert isinstance(data, dict)
        for name in ("kind", "predicted_timeline", "measured_timeline"):
            data.pop(name)
        extra = {
            "tokens_per_second": self.tokens_per_second,
            "predicted_peak_bytes": self.predicted_peak,
            "roof_fraction": self.roof_fraction,
        }
        return {**data, **extra}


def save_run(report: Report, place: Path) -> None:
    """Write the report and both timelines (Chrome trace format) into the run's folder."""
    (place / REPORT_FILE).write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    trace = chrome_trace([report.predicted_timeline, report.measured_timeline])
    (place / TIMELINE_FILE).write_text(json.dumps(trace) + "\n")


def table(report: Report, prompts: int, before: int, out: Path, place: Path) -> str:
    """The closing table of `dovetail run`."""
    error = report.predicted_seconds / report.seconds - 1
    done = f"{prompts}" + (f" ({before} by an earlier run)" if before else "")
    rows = [
        ("prompts done", done),
        ("tokens", f"{report.tokens} in {format_duration(report.seconds)}"),
        ("throughput", f"{report.tokens_per_second:.1f} tokens/s"),
        ("policy", report.policy),
        ("time", f"measured {report.seconds:.2f} s, predicted {report.predicted_seconds:.2f} s "
                 f"({error:+.0%}) for {report.steps} steps"),
        ("peak RAM", f"measured {format_bytes(report.rss_bytes)} (pools "
                     f"{format_bytes(report.pool_bytes)}), predicted "
                     f"{format_bytes(report.predicted_peak)}, "
                     f"budget {format_bytes(report.budget)}"),
        ("bound", f"{report.bound_seconds:.2f} s, set by {report.bound_resource}; "
                  f"{report.roof_fraction:.0%} of it reached"),
        *_hbm_row(report),
        ("results", str(out)),
        ("plan", str(place / "plan.json")),
        ("executor", str(place / ("executor_*.py" if report.hbm else "executor.py"))),
        ("timeline", str(place / TIMELINE_FILE)),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _hbm_row(report: Report) -> list[tuple[str, str]]:
    if not report.hbm:
        return []
    measured, predicted, budget = (
        format_bytes(report.hbm[name]) for name in ("measured", "predicted", "budget")
    )
    return [("peak hbm", f"set aside {measured}, predicted {predicted}, budget {budget}")]
