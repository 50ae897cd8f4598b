"""Charts over time: what every engine does during a layer, and how full the rings are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dovetail.ir.timeline import Span
from dovetail.ir.units import format_bytes, format_duration
from dovetail.plans.report_svg import colour, hint
from dovetail.plans.timeline_panel import Panel, span_class
from dovetail.plans.words import engine_order

WIDTH = 960
"""Pixels of a chart."""
INCH = 72
"""Pixels of an inch in SVG."""
LEFT, RIGHT, LANE, BAR = 66, 78, 38, 0.52
LOOKS: Mapping[str, tuple[str, str]] = {
    "attention": ("attention", "attention"),
    "experts": ("experts", "experts"),
    "after": ("after", "after the experts"),
    "layer": ("layer", "layer without experts"),
    "ends": ("ends", "embedding, head"),
    "load dense": ("dense", "read dense weights"),
    "load experts": ("experts-light", "read experts"),
    "load head": ("head", "read head"),
    "copy dense": ("dense", "copy dense weights"),
    "copy experts": ("experts-light", "copy experts"),
    "copy kv": ("copy", "copy KV"),
    "copy hidden": ("ends", "copy hidden states"),
    "wait": ("wait", "wait"),
}
"""The colour of a class of spans, and what it is called."""


def figure(height: float) -> Figure:
    """An empty figure of the page's width and so many pixels of height."""
    return Figure(figsize=(WIDTH / INCH, height / INCH), dpi=INCH)


def place(whole: Figure, left: float, top: float, right: float, height: float) -> Axes:
    """Axes ``left`` and ``right`` pixels from the sides and ``top`` from the top, without frame."""
    total = whole.get_figheight() * INCH
    box = (left / WIDTH, 1 - (top + height) / total, 1 - (left + right) / WIDTH, height / total)
    axes = whole.add_axes(box)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def lanes(panels: Sequence[Panel], classes: Mapping[str, str]) -> Figure:
    """What every engine does during one layer, a panel for each source."""
    engines = sorted({s.engine for panel in panels for s in panel.spans}, key=engine_order)
    heading, below = 38, 58
    each = LANE * len(engines)
    whole = figure(len(panels) * (each + heading) + below)
    longest = max(panel.seconds for panel in panels) * 1e3
    for number, panel in enumerate(panels):
        axes = place(whole, LEFT, number * (each + heading) + heading - 10, RIGHT, each)
        axes.set_xlim(0, longest)
        axes.set_ylim(len(engines) - 0.5, -0.5)
        _panel(axes, panel, engines, classes)
        _heading(axes, panel, panels[0])
        axes.tick_params(labelbottom=number == len(panels) - 1)
    axes.set_xlabel("milliseconds since the layer began", loc="left")
    present = {_class(span, classes) for panel in panels for span in panel.spans}
    labels: dict[str, str] = {}
    for kind, (look, label) in LOOKS.items():
        if kind in present:
            labels[look] = f"{labels[look]}, {label}" if look in labels else label
    legend(whole, list(labels.items()))
    return whole


def legend(whole: Figure, entries: Sequence[tuple[str, str]]) -> None:
    """A row of colours and their names at the bottom of a figure."""
    handles = [
        Patch(facecolor=fill(look), label=label, hatch="////" if look == "wait" else None)
        for look, label in entries
    ]
    whole.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(LEFT / WIDTH - 0.008, 0),
        ncols=len(handles),
        frameon=False,
        fontsize=11.5,
        handlelength=1.1,
        handleheight=0.9,
        columnspacing=1.3,
        borderaxespad=0.1,
        handletextpad=0.5,
    )


def fill(look: str) -> str:
    """The colour of a look."""
    return colour("faint" if look == "wait" else look)


def _class(span: Span, classes: Mapping[str, str]) -> str:
    found = span_class(span, classes)
    return found if found in LOOKS else "layer"


def _heading(axes: Axes, panel: Panel, first: Panel) -> None:
    what = f"layer {panel.layer} of step {panel.step}" if panel.step >= 0 else "one layer"
    text = f"{what}: {format_duration(panel.seconds)}"
    if panel is not first:
        error = first.seconds / panel.seconds - 1
        text += f"; the prediction is {abs(error):.0%} {'above' if error > 0 else 'below'} that"
    for words, x, weight, look in (
        (panel.source, 0, "bold", "ink"),
        (text, 76, "normal", "quiet"),
    ):
        axes.annotate(
            words,
            (0, 1),
            (x, 9),
            xycoords="axes fraction",
            textcoords="offset points",
            annotation_clip=False,
            fontsize=13,
            fontweight=weight,
            color=colour(look),
        )


def _panel(axes: Axes, panel: Panel, engines: Sequence[str], classes: Mapping[str, str]) -> None:
    axes.set_yticks(range(len(engines)), engines, color=colour("ink"), fontsize=12.5)
    axes.grid(axis="x", color=colour("line"), linewidth=0.8)
    axes.set_axisbelow(True)
    per_ms = (WIDTH - LEFT - RIGHT) / axes.get_xlim()[1]
    for y, engine in enumerate(engines):
        mine = sorted((s for s in panel.spans if s.engine == engine), key=lambda s: s.start)
        for block in _blocks(mine, classes, 1e3 / per_ms):
            axes.add_patch(_bar(y, block, panel))
        _names(axes, y, mine, classes, per_ms)
        busy = f"{panel.busy(engine):.0%} busy" if mine else "idle"
        axes.text(1.012, y, busy, transform=axes.get_yaxis_transform(), va="center", fontsize=12)


@dataclass(frozen=True, slots=True)
class _Block:
    """Spans of one class and layer that are drawn as one bar."""

    kind: str
    layer: int
    name: str
    start: float
    end: float


def _blocks(spans: Sequence[Span], classes: Mapping[str, str], apart: float) -> Iterator[_Block]:
    """The bars of a lane; spans nearer than ``apart`` milliseconds share one."""
    last: _Block | None = None
    for span in spans:
        kind, start, end = _class(span, classes), span.start * 1e3, span.end * 1e3
        joined = last and (last.kind, last.layer) == (kind, span.layer)
        if (
            last
            and joined
            and start - last.end < apart / 1e3
            and end - last.start < 4 * apart / 1e3
        ):
            last = _Block(kind, span.layer, span.name, last.start, end)
            continue
        if last:
            yield last
        last = _Block(kind, span.layer, span.name, start, end)
    if last:
        yield last


def _bar(y: int, block: _Block, panel: Panel) -> Rectangle:
    look, label = LOOKS[block.kind]
    other = block.layer >= 0 and block.layer != panel.layer and block.kind not in ("wait",)
    bar = Rectangle(
        (block.start, y - BAR / 2),
        block.end - block.start,
        BAR,
        facecolor=fill(look),
        edgecolor=colour("wait") if look == "wait" else colour("page"),
        linewidth=0 if look == "wait" else 0.7,
        hatch="////" if look == "wait" else None,
        alpha=0.45 if other and block.kind in ("attention", "experts", "after", "layer") else None,
    )
    where = f" of layer {block.layer}" if block.layer >= 0 else ""
    what = f"wait ({block.name})" if block.kind == "wait" else label
    hint(bar, f"{what}{where}: {format_duration((block.end - block.start) / 1e3)}")
    return bar


def _names(
    axes: Axes, y: int, spans: Sequence[Span], classes: Mapping[str, str], per_ms: float
) -> None:
    """Name runs of bars above them, where the name has room."""
    working = [span for span in spans if span.kind not in ("wait", "room")]
    for (kind, layer), members in groupby(working, key=lambda s: (_class(s, classes), s.layer)):
        mine = list(members)
        start, end = mine[0].start * 1e3, mine[-1].end * 1e3
        short = LOOKS[kind][1]
        count = f"{len(mine)} × " if len(mine) > 1 else ""
        texts = (f"{count}{short} of layer {layer}", f"{count}{short}", short)
        for text in texts if kind.startswith("load") else texts[1:]:
            if 6.2 * len(text) < (end - start) * per_ms:
                middle = (start + end) / 2
                axes.text(
                    middle,
                    y - BAR / 2 - 0.05,
                    text,
                    ha="center",
                    fontsize=10,
                    color=colour("quiet"),
                )
                break


def rings(
    held: Mapping[str, Sequence[tuple[float, float]]],
    sizes: Mapping[str, tuple[int, int]],
    period: float,
    began: str = "step",
) -> Figure:
    """How many bytes of every ring are in use during a step, or a layer, in steady state; ``held``
    has from when to when each load of it keeps its buffer, ``sizes`` how many buffers and bytes."""
    each, gap = 92, 34
    whole = figure(len(held) * (each + gap) + 44)
    for number, (name, spans) in enumerate(held.items()):
        slots, size = sizes[name]
        axes = place(whole, LEFT + 14, number * (each + gap) + gap, RIGHT, each)
        times, used = occupancy(spans, period)
        mib = [count * size / (1 << 20) for count in used]
        ms = [time * 1e3 for time in times]
        axes.fill_between(ms, mib, step="post", color=colour(RINGS.get(name, "p0")), linewidth=0)
        axes.axhline(slots * size / (1 << 20), color=colour("budget"), linewidth=1.4)
        axes.set_xlim(0, period * 1e3)
        axes.set_ylim(0, slots * size / (1 << 20) * 1.12)
        axes.grid(axis="y", color=colour("line"), linewidth=0.8)
        axes.set_axisbelow(True)
        axes.locator_params(axis="y", nbins=3)
        mean = _mean(times, used, period)
        text = f"{name}: {slots} buffers of {format_bytes(size)}, {mean:.1f} in use on average"
        axes.set_title(text, loc="left", fontsize=12.5, color=colour("ink"), pad=6)
        axes.tick_params(labelbottom=number == len(held) - 1)
        axes.set_ylabel("MiB")
    axes.set_xlabel(f"milliseconds since the {began} began", loc="left")
    return whole


RINGS = {"dense": "dense", "experts": "experts-light", "head": "head", "kv": "copy"}


def occupancy(spans: Sequence[tuple[float, float]], period: float) -> tuple[list[float], list[int]]:
    """Times from 0 to ``period`` and how many buffers are in use from each on, when every step
    does the same ``period`` seconds after the one before. Times of the step begin at 0."""
    changes: dict[float, int] = {}
    for shift in (-1, 0, 1):
        for start, end in spans:
            a, b = max(0.0, start + shift * period), min(period, end + shift * period)
            if a < b:
                changes[a] = changes.get(a, 0) + 1
                changes[b] = changes.get(b, 0) - 1
    times, used = [0.0], [changes.pop(0.0, 0)]
    for time in sorted(changes):
        times.append(time)
        used.append(used[-1] + changes[time])
    if times[-1] < period:
        times.append(period)
        used.append(used[-1])
    used[-1] = used[-2] if len(used) > 1 else used[-1]
    return times, used


def _mean(times: Sequence[float], used: Sequence[int], period: float) -> float:
    lengths = (b - a for a, b in pairwise(times))
    return sum(n * length for n, length in zip(used, lengths, strict=False)) / period
