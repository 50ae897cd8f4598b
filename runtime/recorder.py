"""The recorder: what ran when, kept in full for some steps and as totals for all."""

import time
from collections import defaultdict, deque

from dovetail.ir.timeline import Span, Timeline

KEEP_STEPS = 8
"""Steps whose spans are kept: the latest ones."""
clock = time.perf_counter


class Recorder:
    """Collects spans from all engines; every engine writes to a list of its own, so no lock."""

    def __init__(self, engines: list[str]) -> None:
        self._open: dict[str, list[Span]] = {engine: [] for engine in engines}
        self._kept: deque[tuple[Span, ...]] = deque(maxlen=KEEP_STEPS)
        self._totals: dict[str, float] = defaultdict(float)
        self.step = 0
        self.step_seconds: list[float] = []
        self._origin = clock()

    def add(self, engine: str, kind: str, name: str, layer: int, start: float, end: float) -> None:
        """One finished instruction, ``start`` and ``end`` by ``clock``."""
        zero = self._origin
        span = Span(engine, kind, name, layer, start - zero, end - zero, self.step)
        self._open[engine].append(span)

    def end_step(self, seconds: float) -> None:
        """Close the current step, which took ``seconds``."""
        self.step_seconds.append(seconds)
        spans: list[Span] = []
        for engine, done in self._open.items():
            spans += done
            self._open[engine] = []
        for span in spans:
            self._totals[f"{span.kind}:{span.name}"] += span.seconds
        self._kept.append(tuple(spans))
        self.step += 1

    def timeline(self) -> Timeline:
        """The latest steps in full."""
        return Timeline("measured", tuple(span for spans in self._kept for span in spans))

    @property
    def totals(self) -> dict[str, float]:
        """Busy seconds of the whole run by task class, over all engines."""
        return dict(self._totals)
