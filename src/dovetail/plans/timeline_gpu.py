"""Timelines of plans for a GPU: the loop over layers, predicted, from its first layer to its last.

Nothing has run such a plan, so there is no recording beside it. Layers that are placed alike follow
each other here, whatever their places in the model: that is how their time is predicted.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from dovetail.ir.plan import Plan
from dovetail.ir.timeline import Span, Timeline
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout
from dovetail.passes.gpu.buffers import heaviest, pool_sizes
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.predict import GpuPredictor, alike_layers
from dovetail.passes.loop.body import StepWork
from dovetail.passes.loop.simulate import held, timeline
from dovetail.plans.timeline_panel import ALL, Panel

SHOWN = 3
"""Layers of the first and the last panel of a picture."""
WARM = 6
"""Layers before and after the one whose buffers are looked at."""
Intervals = Mapping[str, list[tuple[float, float]]]


def gpu_timeline(plan: Plan, layout: Layout) -> Timeline:
    """One step of each kind that the plan has (prefill, decode or both), all layers of it, one
    after the other; a span's step is its number in this order, its layer that of the model."""
    predictor = _predictor(plan, layout)
    spans: list[Span] = []
    for number, work in enumerate(_works(predictor, plan.workload)):
        for layers in alike_layers(layout):
            begin = max((span.end for span in spans), default=0.0)
            for span in timeline(predictor.loop(work, layers[0]), len(layers)).spans:
                moved = replace(span, start=span.start + begin, end=span.end + begin, step=number)
                spans.append(replace(moved, layer=layers[span.layer]))
    return Timeline("predicted", tuple(spans))


def gpu_panels(plan: Plan, layout: Layout) -> list[Panel]:
    """The first layers, the steady state and the last layers of the step that takes most of the
    time, of the layers that most are like."""
    predictor = _predictor(plan, layout)
    works = _works(predictor, plan.workload)
    layers = max(alike_layers(layout), key=len)
    spans = timeline(predictor.loop(works[0], layers[0]), len(layers)).spans
    starts = [_begin(spans, i) for i in range(len(layers))]
    end, kind = max(span.end for span in spans), works[0].kind
    if len(layers) < 2 * SHOWN + 1:
        return [_panel(spans, layers, 0.0, end, ALL, f"all {len(layers)} layers of a {kind} step")]
    middle = len(layers) // 2
    first, last = f"the first {SHOWN} layers", f"the last {SHOWN} layers"
    steady = f"steady state: a layer of a {kind} step"
    return [
        _panel(spans, layers, 0.0, starts[SHOWN], ALL, f"{first} of a {kind} step"),
        _panel(spans, layers, starts[middle], starts[middle + 1], middle, steady),
        _panel(spans, layers, starts[-SHOWN], end, ALL, f"{last} of a {kind} step"),
    ]


def gpu_rings(
    predictor: GpuPredictor, workload: Workload
) -> tuple[Intervals, dict[str, tuple[int, int]]]:
    """For every pool of buffers, from when to when a layer's units are held in steady state, times
    folded into one layer; and how many there are and their bytes."""
    work, layer = heaviest(predictor, workload)
    loop = predictor.loop(work, layer)
    count = 2 * WARM + 1
    spans = timeline(loop, count).spans
    begin, end = _begin(spans, WARM), _begin(spans, WARM + 1)
    found = {
        pool: [piece for span in some for piece in _folded(*span, begin, end - begin)]
        for pool, some in held(loop, count, WARM).items()
    }
    sizes = pool_sizes(predictor, loop)
    return {pool: found[pool] for pool in found if pool in sizes}, sizes


def window(spans: Iterable[Span], begin: float, end: float) -> Iterator[Span]:
    """The spans between two times, cut there and counted from the first."""
    for span in spans:
        if span.start < end and span.end > begin:
            start, stop = max(span.start, begin) - begin, min(span.end, end) - begin
            yield replace(span, start=start, end=stop)


def _predictor(plan: Plan, layout: Layout) -> GpuPredictor:
    costs = GpuCosts(plan.machine, layout.graph.dtype, plan.workload.routing)
    return GpuPredictor(layout, costs)


def _works(predictor: GpuPredictor, workload: Workload) -> list[StepWork]:
    """The step of each kind that takes longest in all, the longest kind first."""
    found = predictor.longest(workload)
    return sorted(found, key=lambda work: -found[work])


def _begin(spans: Iterable[Span], iteration: int) -> float:
    """When a layer begins to compute."""
    return min(s.start for s in spans if s.step == iteration and s.kind == "run")


def _panel(
    spans: Iterable[Span], layers: list[int], begin: float, end: float, at: int, title: str
) -> Panel:
    inside = tuple(replace(s, layer=layers[s.layer]) for s in window(spans, begin, end))
    return Panel("predicted", ALL if at < 0 else layers[at], -1, end - begin, inside, title)


def _folded(start: float, end: float, begin: float, period: float) -> Iterator[tuple[float, float]]:
    """An interval as pieces no longer than the period, that begin within it."""
    start, end = start - begin, end - begin
    while start < end:
        stop, turns = min(end, start + period), start // period
        yield start - turns * period, stop - turns * period
        start = stop
