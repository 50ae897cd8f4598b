"""The picture of a placement: load of every device in every layer, before and after, and moves."""

from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from dovetail.ir.errors import InputError, OutputError
from dovetail.place.report import Floats, PlacementReport

SUFFIXES = (".png", ".svg")
COLOURS, INK, QUIET = "PuOr_r", "#333333", "#767676"
"""White is the mean, orange above it."""
CELL, LEAST, MOST = 0.17, 2.2, 7.0
"""Inches of a layer's row, and of the shortest and the highest map."""
HALF, MARGINS, TITLE, ROW = 3.6, 1.6, 0.5, 0.62
TICKS, WIDE = 12, 130


def check_picture(path: Path) -> None:
    """Raise InputError unless ``path`` is of a kind that can be drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"-o {path}: found the kind {path.suffix or 'none'!r}, expected one of "
            f"{', '.join(SUFFIXES)}; name the file such as placement.svg"
        )


def draw(report: PlacementReport, path: Path) -> None:
    """Draw the report as PNG or SVG: a row of maps for each scenario.

    Raises InputError for another kind of file and OutputError if it cannot be written.
    """
    check_picture(path)
    with rc_context({"svg.hashsalt": "dovetail", "svg.fonttype": "none", "font.size": 8}):
        figure = _figure(report)
        FigureCanvasAgg(figure)
        try:
            figure.savefig(path, dpi=150, metadata=_metadata(path))
        except OSError as error:
            raise OutputError(
                f"the picture {path} cannot be written: {error.strerror}; name another place"
            ) from error


def _metadata(path: Path) -> dict[str, None] | None:
    return {"Date": None} if path.suffix.lower() == ".svg" else None


def _figure(report: PlacementReport) -> Figure:
    layers = len(report.placement.layers)
    height = min(MOST, max(LEAST, CELL * layers))
    rows = len(report.balances)
    figure = Figure(figsize=(2 * HALF + MARGINS, rows * (height + ROW) + 2 * TITLE))
    axes = figure.subplots(
        rows, 3, squeeze=False, gridspec_kw={"width_ratios": [HALF, HALF, MARGINS]}
    )
    heaviest = max([2.0, *(float(max(b.before.max(), b.after.max())) for b in report.balances)])
    scale = TwoSlopeNorm(1, 0, heaviest)
    for number, balance in enumerate(report.balances):
        data = balance.as_dict()
        for axis, loads, name in zip(
            axes[number], (balance.before, balance.after), (report.before, "after"), strict=False
        ):
            key = "after" if name == "after" else "before"
            _map(axis, loads, scale, report.layers)
            axis.set_title(
                f"{balance.scenario}, {name}: balance {data[key]['mean']:.3f}, "
                f"worst {data[key]['worst']:.3f}",
                fontsize=8,
                color=INK,
            )
        _moves(axes[number][2], report)
    figure.suptitle(_title(report), fontsize=9, color=INK)
    figure.tight_layout(rect=(0, TITLE / figure.get_figheight(), 1, 1))
    _colour_bar(figure, scale)
    return figure


def _map(axis: Axes, loads: Floats, scale: TwoSlopeNorm, layers: tuple[int, ...]) -> None:
    """Layers downwards, devices to the right."""
    axis.imshow(loads, aspect="auto", interpolation="nearest", cmap=COLOURS, norm=scale)
    axis.set_xlabel("device")
    axis.set_ylabel("layer")
    axis.set_xticks(_ticks(loads.shape[1]))
    rows = _ticks(len(layers))
    axis.set_yticks(rows, [str(layers[row]) for row in rows])


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // TICKS))))


def _moves(axis: Axes, report: PlacementReport) -> None:
    """How many experts each layer copies."""
    copies = np.array(report.copies)
    axis.barh(np.arange(len(copies)), copies, color="#8a8a8a", height=0.8)
    axis.set_ylim(len(copies) - 0.5, -0.5)
    axis.set_yticks([])
    axis.set_xlim(0, max(1, int(copies.max())))
    axis.set_title(f"{int(copies.sum())} copies", fontsize=8, color=INK)
    axis.set_xlabel("experts copied")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _title(report: PlacementReport) -> str:
    placement = report.placement
    binds = report.binds[0].text() if report.binds else "every device carries the layer's mean"
    return (
        f"{placement.policy}: {placement.experts} experts, {sum(placement.slots)} slots, "
        f"{placement.devices} devices; load of each device in units of the layer's mean\n"
        + fill(binds, WIDE)
    )


def _colour_bar(figure: Figure, scale: TwoSlopeNorm) -> None:
    axis = figure.add_axes((0.08, 0.6 * TITLE / figure.get_figheight(), 0.6, 0.012))
    bar = figure.colorbar(ScalarMappable(scale, COLOURS), cax=axis, orientation="horizontal")
    bar.outline.set_visible(False)
    axis.tick_params(labelsize=6, color=QUIET, labelcolor=QUIET)
