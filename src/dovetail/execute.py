"""Execute: `plan, captured model, prompts -> finished sequences`, and what it took."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dovetail.capture.captured import Captured
from dovetail.codegen.executor import emit_executor
from dovetail.ir.batching import Request, Step
from dovetail.ir.machine import LARGE_BLOCK
from dovetail.ir.plan import Plan
from dovetail.ir.program import Program
from dovetail.ir.timeline import Timeline
from dovetail.ir.units import format_bytes
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.lower import lower
from dovetail.runtime import memory
from dovetail.runtime.generate import Generator, Observer, StepReport
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.routing_sink import RoutingSink
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.sampling import Sampling

LEAST_KEPT, KEPT_SHARE = 64 << 10, 256
"""malloc keeps free memory of up to a 64th of the budget, between these bytes and ``LARGE_BLOCK``;
more goes back to the system, so that what is held is what is counted. Keeping more would be
faster: writing to memory that is new to the process costs several times a write."""


@dataclass(slots=True)
class Measured:
    """What a run took: seconds by the clock, bytes by the pools and by the system."""

    setup_seconds: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    pool_bytes: int = 0
    rss_bytes: int = 0
    classes: dict[str, float] = field(default_factory=dict)
    step_seconds: tuple[float, ...] = ()
    timeline: Timeline = field(default_factory=lambda: Timeline("measured", ()))


class Execution:
    """A plan at work on a checkpoint; a context manager.

    ``source`` is the emitted executor; it is written to ``executor_file`` and compiled from there,
    so that a traceback shows its lines. ``routing_sink`` is told which experts tokens choose.
    """

    def __init__(
        self,
        plan: Plan,
        captured: Captured,
        index: CheckpointIndex | MemoryWeights,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        executor_file: Path,
        routing_sink: RoutingSink | None = None,
    ) -> None:
        if not isinstance(index, MemoryWeights):
            # Beside a model in memory the process is not ours, and the budget not that tight.
            kept = min(LARGE_BLOCK, max(LEAST_KEPT, plan.budget["ram"] // KEPT_SHARE))
            memory.trim_allocator(kept, kept, arenas=1)
        self.layout = apply_moves(captured.graph, plan.moves)
        graph = self.layout.graph
        self.program: Program = lower(self.layout, plan.budget)
        self.source = emit_executor(graph, self.program, plan_title(plan))
        executor_file.write_text(self.source, encoding="utf-8")
        functions: dict[str, Any] = {}
        exec(compile(self.source, str(executor_file), "exec"), functions)
        self.measured = Measured()
        self.steps_run: list[Step] = []
        self._generator = Generator(
            graph, self.program, captured.constants, index, functions, sampling, stop_tokens
        )
        self._generator.runtime.routing_sink = routing_sink
        self._baseline = 0
        self._begin = 0.0

    def __enter__(self) -> Self:
        memory.malloc_trim()
        memory.reset_peak_rss()
        self._baseline = memory.rss_bytes()
        self._begin = time.perf_counter()
        self._generator.__enter__()
        self.measured.setup_seconds = time.perf_counter() - self._begin
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._take_stock()
        self._generator.__exit__(kind, error, trace)

    def configure(self, sampling: Sampling, stop_tokens: Sequence[int]) -> None:
        """Choose tokens like this from the next run of ``steps`` on."""
        self._generator.configure(sampling, stop_tokens)

    def observe(self, observer: Observer) -> None:
        """Show all logits to ``observer`` from now on."""
        self._generator.observer = observer

    def timeline(self) -> Timeline:
        """What the engines did in the last steps, as measured."""
        return self._generator.runtime.recorder.timeline()

    def steps(
        self, requests: Sequence[Request], prompt: Callable[[int], Sequence[int]]
    ) -> Iterator[StepReport]:
        """Run all requests; a report per step."""
        for report in self._generator.steps(requests, prompt):
            self.measured.steps += 1
            self.steps_run.append(report.step)
            self.measured.tokens += report.tokens
            yield report

    def _take_stock(self) -> None:
        runtime, measured = self._generator.runtime, self.measured
        measured.seconds = time.perf_counter() - self._begin
        measured.pool_bytes = runtime.budget.peak
        measured.rss_bytes = max(0, memory.peak_rss_bytes() - self._baseline)
        measured.classes = runtime.recorder.totals
        measured.step_seconds = tuple(runtime.recorder.step_seconds)
        measured.timeline = runtime.recorder.timeline()


def plan_title(plan: Plan) -> dict[str, str]:
    """What an emitted executor says that it was emitted for."""
    budget = ", ".join(f"{tier}={format_bytes(size)}" for tier, size in plan.budget.items())
    knobs = ", ".join(f"{name}={value}" for name, value in plan.knobs.items())
    return {
        "model": f"{plan.model['model_type']}, {plan.model['num_layers']} layers",
        "plan": plan.digest()[:16],
        "policy": f"{plan.policy} ({knobs})",
        "budget": budget,
    }
