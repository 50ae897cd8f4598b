"""Replay: `instructions, spans -> when every instruction of an engine happened`.

A timeline holds what took time. Laid beside the engine's instructions, it also says when buffers
were given back and what exactly was waited for.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dovetail.ir.load_order import LoadOrder
from dovetail.ir.program import Flat, Free, Load, Program, Run, Wait, unroll
from dovetail.ir.timeline import Span, Timeline


@dataclass(frozen=True, slots=True)
class Happened:
    """An instruction and when it began and ended, in seconds of the timeline."""

    item: Flat
    start: float
    end: float


def replay(items: Iterable[Flat], spans: Sequence[Span]) -> Iterator[Happened]:
    """Times of the instructions of one engine in one step; what has no span took no time."""
    left = sorted(spans, key=lambda span: span.start)
    now = left[0].start if left else 0.0
    at = 0
    for item in items:
        if at < len(left) and left[at].start <= now and _label(left[at]) == _name(item):
            yield Happened(item, left[at].start, left[at].end)
            now = left[at].end
            at += 1
        else:
            yield Happened(item, now, now)


def _label(span: Span) -> tuple[str, str, int]:
    return span.kind, span.name, span.layer


def _name(item: Flat) -> tuple[str, str, int] | None:
    """The span that an instruction leaves."""
    match item:
        case Wait(what, name):
            return "room" if what == "room" else "wait", name, -1
        case Load(ring, layer, _):
            return "load", ring, layer
        case Run(segment, layer, _, _):
            return "run", segment, layer
    return None


def replay_step(program: Program, step: Timeline) -> dict[str, list[Happened]]:
    """Every engine's instructions in a step that the simulator predicted."""
    return {
        name: list(replay(unroll(items), [s for s in step.spans if s.engine == name]))
        for name, items in program.engines.items()
    }


def buffers_held(program: Program, step: Timeline) -> dict[str, list[tuple[float, float]]]:
    """For every ring, from when to when each load of the step keeps its buffer: from the start of
    the load until the last worker that uses it gives it back."""
    order = LoadOrder({name: tuple(unroll(items)) for name, items in program.engines.items()})
    starts: dict[str, dict[int, float]] = {ring.name: {} for ring in program.rings}
    ends: dict[str, list[float]] = {ring.name: [] for ring in program.rings}
    for engine, done in replay_step(program, step).items():
        loads: Counter[str] = Counter()
        frees: Counter[str] = Counter()
        for each in done:
            if isinstance(each.item, Load):
                ring = each.item.ring
                starts[ring][order.number(engine, ring, loads[ring])] = each.start
                loads[ring] += 1
            elif isinstance(each.item, Free):
                ring = each.item.ring
                if frees[ring] == len(ends[ring]):
                    ends[ring].append(each.end)
                ends[ring][frees[ring]] = max(ends[ring][frees[ring]], each.end)
                frees[ring] += 1
    return {
        ring: [(starts[ring][number], end) for number, end in enumerate(found)]
        for ring, found in ends.items()
        if found
    }
