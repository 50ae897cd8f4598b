"""What the picture shows of a timeline: one layer of one step, and all that overlaps it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dovetail.ir.program import Segment
from dovetail.ir.timeline import Span, Timeline

ALL = -1
"""Instead of a layer's number: the panel is of several layers."""
GPU_CLASSES = {
    "attention": "attention",
    "kv_attention": "attention",
    "cpu_attention": "attention",
    "cpu_linears": "attention",
    "experts": "experts",
    "cpu_experts": "experts",
}
"""The classes of what runs in a loop body of a machine with a GPU."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One timeline and the layer of one step that is looked at; ``spans`` are within ``seconds``
    after the layer began, and times are counted from there. ``title`` says what is shown where it
    is not one layer of one step."""

    source: str
    layer: int
    step: int
    seconds: float
    spans: tuple[Span, ...]
    title: str = ""

    @classmethod
    def of(cls, timeline: Timeline, step: int, layer: int) -> "Panel | None":
        """The spans that overlap the layer in step ``step``; None if it did not run there."""
        mine = [s for s in timeline.spans if s.step == step and _computes(s) and s.layer == layer]
        if not mine:
            return None
        begin, end = _begin(timeline, mine), max(span.end for span in mine)
        inside = (s for s in timeline.spans if s.start < end and s.end > begin)
        spans = tuple(
            replace(s, start=max(s.start, begin) - begin, end=min(s.end, end) - begin)
            for s in inside
        )
        return cls(timeline.source, layer, step, end - begin, spans)

    def busy(self, engine: str) -> float:
        """Share of the time in which the engine does not wait."""
        mine = (
            s.seconds for s in self.spans if s.engine == engine and s.kind not in ("wait", "room")
        )
        return sum(mine) / self.seconds


def _computes(span: Span) -> bool:
    return span.kind == "run" and span.engine.startswith("cpu")


def _begin(timeline: Timeline, mine: Sequence[Span]) -> float:
    """When the layer begins: where the one before it ended, so that what is waited for first
    belongs to the layer."""
    begin = min(span.start for span in mine)
    before = []
    for engine in {span.engine for span in mine}:
        first = min(span.start for span in mine if span.engine == engine)
        ends = [s.end for s in timeline.spans if s.engine == engine and _computes(s)]
        before.append(max((end for end in ends if end <= first), default=first))
    return min(begin, *before)


def segment_classes(segments: Sequence[Segment]) -> dict[str, str]:
    """The class of every segment of a program, by the name that it has in the emitted executor."""
    found: dict[str, str] = {}
    ends = (segments[0].body, segments[-1].body)
    for segment in segments:
        body = [s for s in segments if s.body == segment.body]
        at = next((i for i, s in enumerate(body) if s.over == "experts"), -1)
        kind = "layer" if at < 0 else "attention" if body.index(segment) < at else "after"
        kind = "ends" if segment.body in ends else kind
        found[_plain(segment.name)] = "experts" if segment.over == "experts" else kind
    return found


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name)


def span_class(span: Span, classes: Mapping[str, str]) -> str:
    """The class of a span: that of its segment, ``load`` or ``copy`` with what it brings, or
    ``wait``. On a machine with a GPU a span is called by its class."""
    if span.kind == "run":
        found = classes.get(_plain(span.name))
        return found or GPU_CLASSES.get(span.name, "layer")
    if span.kind == "copy":
        return f"copy {span.name}"
    return f"load {span.name}" if span.kind == "load" else "wait"
