"""The timeline: when every instruction ran on every engine, predicted or recorded, in one form."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One instruction on one engine, in seconds since the step began.

    ``kind`` is ``run``, ``load``, ``wait`` (for a load or a phase) or ``room`` (for a free buffer);
    ``name`` the segment, ring or phase.
    """

    engine: str
    kind: str
    name: str
    layer: int
    start: float
    end: float
    step: int = 0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans of some steps; ``source`` is ``predicted`` or ``measured``."""

    source: str
    spans: tuple[Span, ...]

    def step(self, number: int) -> "Timeline":
        """The spans of one step."""
        return Timeline(self.source, tuple(s for s in self.spans if s.step == number))

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        if not self.spans:
            return 0.0
        return max(s.end for s in self.spans) - min(s.start for s in self.spans)


def seconds_by_class(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds of all engines together by task class: ``run:segment``, ``load:ring``,
    ``wait:name``, ``room:ring``."""
    totals: dict[str, float] = defaultdict(float)
    for span in spans:
        totals[f"{span.kind}:{span.name}"] += span.seconds
    return dict(totals)


def chrome_trace(timelines: Iterable[Timeline]) -> dict[str, object]:
    """The timelines in Chrome's trace event format (opens in Perfetto): one process per source,
    one thread per engine, microseconds."""
    events: list[Mapping[str, object]] = []
    for process, timeline in enumerate(timelines):
        name = {"name": timeline.source}
        events.append({"ph": "M", "pid": process, "name": "process_name", "args": name})
        engines = sorted({span.engine for span in timeline.spans})
        for thread, engine in enumerate(engines):
            meta = {"ph": "M", "pid": process, "tid": thread, "name": "thread_name"}
            events.append({**meta, "args": {"name": engine}})
        for span in timeline.spans:
            # Whole microseconds: a viewer drops an event that overlaps another by a rounding.
            start, end = round(span.start * 1e6), round(span.end * 1e6)
            events.append(
                {
                    "ph": "X",
                    "pid": process,
                    "tid": engines.index(span.engine),
                    "name": f"{span.name}[{span.layer}]" if span.layer >= 0 else span.name,
                    "cat": span.kind,
                    "ts": start,
                    "dur": end - start,
                    "args": {"step": span.step, "layer": span.layer},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
