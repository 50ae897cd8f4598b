"""Executing: what a plan at work does alike, whatever runs its steps."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self

from dovetail.ir.batching import Request, Step
from dovetail.ir.timeline import Timeline
from dovetail.runtime import memory
from dovetail.runtime.generate import Generation, Observer, R, StepReport
from dovetail.runtime.sampling import Sampling


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


class Executing(ABC, Generic[R]):
    """A plan at work on a checkpoint, by the steps of a ``generator``; a context manager that takes
    stock in ``measured`` as it ends. ``steps_run`` are the steps so far."""

    def __init__(self, generator: Generation[R]) -> None:
        self._generator = generator
        self.measured = Measured()
        self.steps_run: list[Step] = []
        self._begin, self._baseline = 0.0, 0

    @property
    @abstractmethod
    def pool_bytes(self) -> int:
        """Most bytes of ram that the pools ever held."""

    def __enter__(self) -> Self:
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
        recorder, measured = self._generator.runtime.recorder, self.measured
        measured.seconds = time.perf_counter() - self._begin
        measured.pool_bytes = self.pool_bytes
        measured.rss_bytes = max(0, memory.peak_rss_bytes() - self._baseline)
        measured.classes = recorder.totals
        measured.step_seconds = tuple(recorder.step_seconds)
        measured.timeline = recorder.timeline()
