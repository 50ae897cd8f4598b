"""Predictions against measurements, over policies, budgets and batch sizes."""

import shutil
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from dovetail_run import Run, Task
from harness import SHORT, Bench, weight_bytes
from workloads import random_prompts

from dovetail.checkpoint import ModelFolder
from dovetail.ir.plan import load_plan
from dovetail.planning import PLAN_FILE, plan_apart

_SHARES = (0.25, 0.5)
"""Budgets, as shares of the weights."""
POLICIES = (
    "weight_stream", "model_batch", "module_batch", "zigzag", "chunked_prefill", "layered_prefill",
)  # fmt: skip
"""Policies that are measured beside `auto`."""


@dataclass(frozen=True, slots=True)
class Point:
    """A prediction and what was measured: seconds, bytes of memory, bytes read from disk."""

    checkpoint: str
    policy: str
    workers: int
    budget: int
    batch: int
    prompts: str
    seconds: tuple[float, float]
    memory: tuple[int, int]
    disk: tuple[int, int]
    other_cores: float

    @classmethod
    def of(cls, done: Run) -> "Point":
        """The point of a finished run."""
        report = done.report
        return cls(
            checkpoint=done.checkpoint,
            policy=done.policy,
            workers=done.workers,
            budget=report["budget"],
            batch=int(done.knobs["seqs"]),
            prompts=done.prompts,
            seconds=(report["predicted_seconds"], done.seconds),
            memory=(report["predicted_peak_bytes"], done.peak_bytes),
            disk=(done.predicted_disk_bytes, done.read_bytes),
            other_cores=done.other_cores,
        )

    def errors(self) -> dict[str, float]:
        """Predicted over measured, less one."""
        pairs = {"seconds": self.seconds, "memory": self.memory, "disk": self.disk}
        return {name: a / b - 1 if b else 0.0 for name, (a, b) in pairs.items()}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Predictions against measurements."""

    points: list[Point]

    def medians(self) -> dict[str, float]:
        """Median size of the errors."""
        errors = [point.errors() for point in self.points]
        return {name: statistics.median([abs(e[name]) for e in errors]) for name in errors[0]}

    def as_dict(self) -> dict[str, Any]:
        """The section as JSON data."""
        points = [asdict(point) | {"errors": point.errors()} for point in self.points]
        return {"points": points, "medians": self.medians()}


def accuracy(bench: Bench) -> Accuracy:
    """Every policy at two budgets: with the knobs that the search chose at the smaller one, and
    with a quarter of its batch at the larger one; ``auto`` at both, and where everything fits. The
    runs of earlier sections count too, once for each plan."""
    points = {str(done.report["plan"]): Point.of(done) for done in bench.runs}
    count, new = bench.prompts["accuracy"], bench.new_tokens["accuracy"]
    weights = weight_bytes(bench.small)
    prompts = random_prompts(count, *SHORT, ModelFolder.open(bench.small).vocab)
    main = bench.threads[0]
    budgets = [int(weights * share) for share in _SHARES]
    cases = [("auto", budget, 1) for budget in (*budgets, 3 * weights)]
    for policy in POLICIES:
        cases += [(policy, budgets[0], 1), (policy, budgets[1], 4)]
    for policy, budget, part in cases:
        place, machine = bench.place(), bench.machines[main]
        task = Task(bench.small, prompts, new, budget, place, policy, machine=machine)
        knobs = _with_batch(task, part) if part > 1 else None
        done = bench.ours(bench.small, prompts, new, budget, main, policy, knobs)
        points[str(done.report["plan"])] = Point.of(done)
    return Accuracy(list(points.values()))


def _with_batch(task: Task, part: int) -> dict[str, int | bool]:
    """The knobs that the search chooses, but with a ``part``-th of its batch."""
    plan_apart(task.request(), task.place, lambda text: None)
    knobs = dict(load_plan(task.place / PLAN_FILE).knobs)
    shutil.rmtree(task.place)
    return knobs | {"seqs": max(1, int(knobs["seqs"]) // part)}
