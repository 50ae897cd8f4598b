"""The picture: one layer's steady state, predicted above measured, one lane per engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import wrap

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dovetail.ir.errors import InputError, OutputError
from dovetail.ir.plan import Plan
from dovetail.ir.timeline import Span
from dovetail.ir.units import format_bytes, format_duration
from dovetail.passes.lower import segments
from dovetail.plans.timeline_file import Compared
from dovetail.plans.timeline_panel import ALL, Panel, segment_classes, span_class

SUFFIXES = (".png", ".svg")
WIDTH, LANE, HEADING, BOTTOM, TOP, LINE = 11.0, 0.62, 0.42, 0.85, 0.48, 0.17
"""Inches: the picture, a lane, a panel's heading, the legend with the axis, the title, a line of
the subtitle."""
LEFT, RIGHT = 0.75, 0.95
SUBTITLE = 120
"""Characters in a line of the subtitle."""
BAR, DPI = 0.5, 160
INK, QUIET, HATCH = "#333333", "#767676", "#c4c4c4"


@dataclass(frozen=True, slots=True)
class Look:
    """How a class of spans is drawn; ``short`` stands in the picture, ``label`` in the legend."""

    label: str
    short: str
    colour: str
    hatch: str = ""


# A load has the light tint of what will use it.
LOOKS: Mapping[str, Look] = {
    "attention": Look("attention", "attention", "#3f74ad"),
    "experts": Look("experts", "experts", "#e8811a"),
    "after": Look("after the experts", "after", "#4f9d4b"),
    "layer": Look("layer without experts", "layer", "#5fa9a4"),
    "ends": Look("embedding, head", "head", "#9a6fb0"),
    "load dense": Look("read dense weights", "dense", "#a5c2e2"),
    "load experts": Look("read experts", "experts", "#fbcb94"),
    "load head": Look("read head", "head", "#d9c3e4"),
    "copy dense": Look("copy dense weights", "dense", "#a5c2e2"),
    "copy experts": Look("copy experts", "experts", "#fbcb94"),
    "copy kv": Look("copy KV", "KV", "#b9d8b4"),
    "copy hidden": Look("copy hidden states", "hidden", "#d9c3e4"),
    "wait": Look("wait", "", "#f7f7f7", "////"),
}


def draw(compared: Compared, path: Path, note: Callable[[str], None]) -> None:
    """Draw the middle layer of the compared step, predicted above measured, as PNG or SVG.

    Raises InputError for another kind of file and OutputError if it cannot be written.
    """
    _check_kind(path)
    layer = len(compared.layout.graph.layers) // 2
    panels = []
    for timeline in (compared.predicted(), compared.measured):
        panel = Panel.of(timeline, compared.step, layer) if timeline else None
        if panel is not None:
            panels.append(panel)
        elif timeline is not None:
            note(f"the {timeline.source} step {compared.step} has no layer {layer}; left out")
    save_panels(panels, segment_classes(segments(compared.layout)), compared.plan, path)


def save_panels(
    panels: Sequence[Panel], classes: Mapping[str, str], plan: Plan, path: Path
) -> None:
    """Draw panels below each other, titled with what the plan is for, as PNG or SVG.

    Raises InputError for another kind of file and OutputError if it cannot be written.
    """
    _check_kind(path)
    _save(panels, classes, *_titles(plan), path)


def _check_kind(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"--picture {path}: found the kind {path.suffix or 'none'!r}, expected one of "
            f"{', '.join(SUFFIXES)}; name the file such as layer.png"
        )


def _titles(plan: Plan) -> tuple[str, str]:
    knobs = ", ".join(f"{name}={value}" for name, value in plan.knobs.items())
    budget = ", ".join(f"{tier}={format_bytes(size)}" for tier, size in plan.budget.items())
    model = f"{plan.model['model_type']}, {plan.model['num_layers']} layers"
    return f"{model}: {plan.policy}", f"budget {budget}; {knobs}"


def _save(
    panels: Sequence[Panel], classes: Mapping[str, str], title: str, subtitle: str, path: Path
) -> None:
    with rc_context(
        {
            "font.size": 9,
            "hatch.linewidth": 0.5,
            "svg.fonttype": "none",
            "svg.hashsalt": "dovetail",
            "text.color": INK,
        }
    ):
        figure = _figure(panels, classes, title, subtitle)
        dated = {"Date": None} if path.suffix.lower() == ".svg" else None
        try:
            figure.savefig(path, dpi=DPI, metadata=dated)
        except OSError as error:
            raise OutputError(
                f"the picture {path} cannot be written: {error.strerror}; name another place"
            ) from error


def _figure(
    panels: Sequence[Panel], classes: Mapping[str, str], title: str, subtitle: str
) -> Figure:
    lanes = sorted({span.engine for panel in panels for span in panel.spans})
    lines = wrap(subtitle, SUBTITLE)
    top, each = TOP + LINE * len(lines), LANE * len(lanes)
    height = top + BOTTOM + len(panels) * (each + HEADING)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(LEFT / WIDTH, 1 - 0.32 / height, title, fontsize=13, fontweight="bold")
    below = 1 - 0.4 / height
    figure.text(LEFT / WIDTH, below, "\n".join(lines), fontsize=9, color=QUIET, va="top")
    longest = max(panel.seconds for panel in panels) * 1e3
    for number, panel in enumerate(panels):
        bottom = height - top - (number + 1) * (each + HEADING)
        axes = figure.add_axes(
            (LEFT / WIDTH, bottom / height, 1 - (LEFT + RIGHT) / WIDTH, each / height)
        )
        axes.set_xlim(0, longest)
        axes.set_ylim(len(lanes) - 0.45, -0.55)
        _panel(axes, panel, lanes, classes)
        _heading(axes, panel, panels[0])
    axes.tick_params(labelbottom=True)
    others = any(not _of_layer(span, panel.layer) for panel in panels for span in panel.spans)
    axes.set_xlabel(f"ms since the layer began{'; pale: other layers' * others}", color=QUIET)
    _legend(figure, panels, classes)
    return figure


def _heading(axes: Axes, panel: Panel, predicted: Panel) -> None:
    took = format_duration(panel.seconds)
    one = f"layer {panel.layer} of step {panel.step} takes {took}"
    text = f"{panel.title}: {took}" if panel.title else one
    if panel is not predicted and not panel.title:
        error = predicted.seconds / panel.seconds - 1
        text += f"; the prediction is {abs(error):.0%} {'above' if error > 0 else 'below'} that"
    for words, right, size, weight, colour in (
        (panel.source, 0, 10, "bold", INK),
        (text, 66, 9, "normal", QUIET),
    ):
        axes.annotate(
            words,
            (0, 1),
            (right, 5),
            xycoords="axes fraction",
            textcoords="offset points",
            annotation_clip=False,
            fontsize=size,
            fontweight=weight,
            color=colour,
        )


def _panel(axes: Axes, panel: Panel, lanes: Sequence[str], classes: Mapping[str, str]) -> None:
    axes.set_yticks(range(len(lanes)), lanes)
    axes.tick_params(axis="both", length=0, labelbottom=False, labelcolor=INK)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.axvline(panel.seconds * 1e3, color=QUIET, linewidth=0.8, linestyle=(0, (2, 2)))
    for y, engine in enumerate(lanes):
        spans = sorted((s for s in panel.spans if s.engine == engine), key=lambda s: s.start)
        _bars(axes, y, spans, panel, classes)
        _labels(axes, y, spans, classes)
        busy = f"{panel.busy(engine):.0%} busy" if spans else "idle"
        axes.text(1.008, y, busy, transform=axes.get_yaxis_transform(), va="center", color=QUIET)


def _bars(
    axes: Axes, y: int, spans: Sequence[Span], panel: Panel, classes: Mapping[str, str]
) -> None:
    pixel = (axes.get_xlim()[1] - axes.get_xlim()[0]) / (axes.get_window_extent().width)
    for kind, look in LOOKS.items():
        for own in (True, False):
            mine = [
                s
                for s in spans
                if span_class(s, classes) == kind and _of_layer(s, panel.layer) is own
            ]
            bars = [Rectangle((s.start * 1e3, y - BAR / 2), s.seconds * 1e3, BAR) for s in mine]
            # An outline would hide bars of a few pixels.
            outlined = [0.6 * (bar.get_width() > 5 * pixel) for bar in bars]
            axes.add_collection(
                PatchCollection(
                    bars,
                    facecolor=look.colour,
                    edgecolor=HATCH if look.hatch else "white",
                    hatch=look.hatch or None,
                    linewidths=0.0 if look.hatch else outlined,
                    alpha=1.0 if own else 0.35,
                )
            )


def _of_layer(span: Span, layer: int) -> bool:
    """Whether a span is drawn in full colour: loads for other layers are part of this one's
    steady state, other layers' compute is not."""
    return span.kind != "run" or layer in (span.layer, ALL)


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring spans of one class and layer, waits between them left out."""

    texts: tuple[str, ...]
    count: int
    start: float
    end: float


def _groups(spans: Sequence[Span], classes: Mapping[str, str]) -> Iterator[_Group]:
    """Groups of a lane in order of time, in milliseconds; the texts from long to short."""
    working = [span for span in spans if span.kind not in ("wait", "room")]
    for (kind, layer), members in groupby(working, key=lambda s: (span_class(s, classes), s.layer)):
        mine = list(members)
        short = LOOKS[kind].short
        counted = f"{len(mine)} × {short}" if len(mine) > 1 else short
        loads = kind in ("load dense", "load experts", "copy dense", "copy experts")
        texts = (f"{counted} of layer {layer}", counted, short) if loads else (counted, short)
        yield _Group(texts, len(mine), mine[0].start * 1e3, mine[-1].end * 1e3)


def _labels(axes: Axes, y: int, spans: Sequence[Span], classes: Mapping[str, str]) -> None:
    """Name the groups above their bars, each with the longest text that its width has room for."""
    top = y - BAR / 2
    inverse = axes.transData.inverted()
    for group in _groups(spans, classes):
        middle = (group.start + group.end) / 2
        for words in group.texts:
            text = axes.text(middle, top - 0.09, words, fontsize=7.5, ha="center")
            left, right = inverse.transform(text.get_window_extent())[:, 0]
            if right - left <= group.end - group.start:
                break
            text.remove()
        if group.count > 1:
            line = (top - 0.045, top - 0.045)
            axes.plot((group.start, group.end), line, color=QUIET, linewidth=0.6)


def _legend(figure: Figure, panels: Sequence[Panel], classes: Mapping[str, str]) -> None:
    present = {span_class(span, classes) for panel in panels for span in panel.spans}
    handles = [
        Patch(
            facecolor=look.colour,
            edgecolor=HATCH if look.hatch else look.colour,
            hatch=look.hatch or None,
            label=look.label,
        )
        for kind, look in LOOKS.items()
        if kind in present
    ]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(LEFT / WIDTH - 0.005, 0.0),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        handlelength=1.4,
        columnspacing=1.4,
        borderaxespad=0.4,
    )
