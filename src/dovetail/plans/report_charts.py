"""Charts of amounts: memory, candidates, what more of a resource gives, and its curves."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dovetail.ir.plan import Candidate, Plan
from dovetail.ir.units import format_bytes, format_duration
from dovetail.passes.engine_use import EngineUse
from dovetail.passes.sensitivity import Effect, Sensitivity
from dovetail.plans.report_lanes import LEFT, RIGHT, WIDTH, figure, fill, legend, place
from dovetail.plans.report_svg import colour, hint
from dovetail.plans.words import (
    amount_text,
    engine_name,
    knobs_text,
    more_text,
    resource_name,
    wait_text,
)

ROW = 34
LETTER = 6.6
"""Pixels of an average letter at the size of labels."""


def engines(uses: Sequence[EngineUse]) -> Figure:
    """Shares of the time after set-up that every engine works and waits."""
    whole = figure(ROW * len(uses) + 52)
    axes = place(whole, LEFT, 6, RIGHT, ROW * len(uses))
    axes.set_xlim(0, 1)
    axes.set_ylim(len(uses) - 0.5, -0.5)
    axes.set_yticks(range(len(uses)), [u.engine for u in uses], color=colour("ink"), fontsize=12.5)
    for y, use in enumerate(uses):
        waits = sorted(use.waits.items(), key=lambda item: -item[1])
        parts = [("accent", f"works {use.share:.0%} of the time", use.share)]
        parts += [
            ("wait", f"waits for {wait_text(what)}: {s / use.seconds:.0%}", s / use.seconds)
            for what, s in waits
        ]
        left = 0.0
        for look, text, share in parts:
            axes.add_patch(_part(left, y, share, look, text))
            left += share
        axes.text(1.012, y, f"{use.share:.0%} busy", va="center", fontsize=12, clip_on=False)
        if waits and waits[0][1] / use.seconds * (WIDTH - LEFT - RIGHT) > 200:
            middle = use.share + waits[0][1] / use.seconds / 2
            box = {"facecolor": colour("page"), "edgecolor": "none", "pad": 2.5}
            text = f"waits for {wait_text(waits[0][0])}"
            axes.text(middle, y, text, ha="center", va="center", fontsize=11, bbox=box)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(axis="x", color=colour("line"), linewidth=0.8)
    axes.set_axisbelow(True)
    waits_known = any(use.waits for use in uses)
    legend(whole, [("accent", "works"), *([("wait", "waits")] if waits_known else [])])
    return whole


def _part(left: float, y: float, size: float, look: str, text: str) -> Rectangle:
    bar = Rectangle(
        (left, y - 0.3),
        size,
        0.6,
        facecolor=fill(look),
        edgecolor=colour("wait" if look == "wait" else "page"),
        linewidth=0 if look == "wait" else 1,
        hatch="////" if look == "wait" else None,
    )
    hint(bar, text)
    return bar


def memory(tiers: Mapping[str, Mapping[str, int]], budget: Mapping[str, int]) -> Figure:
    """Peak bytes of every tier by what they hold, against its budget."""
    kinds = list(dict.fromkeys(what for parts in tiers.values() for what in parts))
    shades = {what: f"p{number % 8}" for number, what in enumerate(kinds)}
    row = 62
    whole = figure(row * len(tiers) + 46)
    axes = place(whole, LEFT, 10, 30, row * len(tiers))
    axes.set_xlim(0, 1.02)
    axes.set_ylim(len(tiers) - 0.5, -0.5)
    axes.set_yticks(range(len(tiers)), list(tiers), color=colour("ink"), fontsize=12.5)
    axes.set_xticks([])
    for y, (tier, parts) in enumerate(tiers.items()):
        size, used = budget.get(tier, sum(parts.values())), sum(parts.values())
        scale = max(size, used)
        left = 0.0
        axes.add_patch(
            _part(0, y, size / scale, "faint", f"budget of {tier}: {format_bytes(size)}")
        )
        for what, n in sorted(parts.items(), key=lambda item: -item[1]):
            if n:
                axes.add_patch(
                    _part(left, y, n / scale, shades[what], f"{what}: {format_bytes(n)}")
                )
                left += n / scale
        at = size / scale
        axes.plot((at, at), (y - 0.38, y + 0.38), color=colour("budget"), linewidth=2)
        text = f"{format_bytes(used)} of {format_bytes(size)}, {used / size:.0%}"
        axes.text(0, y - 0.36, text, fontsize=12, va="bottom")
    used_kinds = [what for what in kinds if any(parts.get(what) for parts in tiers.values())]
    legend(whole, [(shades[what], what) for what in used_kinds])
    return whole


def candidates(plan: Plan, best: Sequence[Candidate]) -> Figure:
    """Predicted time of every policy's best candidate as a bar, of its others as dots."""
    row = 36
    left = 24 + LETTER * max(len(c.policy) for c in best)
    whole = figure(row * len(best) + 60)
    axes = place(whole, left, 26, RIGHT + 50, row * len(best))
    axes.set_xlim(0, 1.06 * max(map(_seconds, best)))
    axes.set_ylim(len(best) - 0.5, -0.5)
    axes.set_yticks(range(len(best)), [c.policy for c in best], color=colour("ink"), fontsize=12.5)
    for y, candidate in enumerate(best):
        won = candidate.policy == plan.policy
        bar = _part(0, y, _seconds(candidate), "accent", _candidate_text(candidate))
        bar.set_alpha(1.0 if won else 0.5)
        axes.add_patch(bar)
        for other in plan.candidates:
            took = other.seconds if other.policy == candidate.policy else None
            if took is not None and _seconds(candidate) < took < axes.get_xlim()[1]:
                _dot(axes, took, y, 6.5, _candidate_text(other))
        slower = _seconds(candidate) / plan.prediction.seconds - 1
        note = "" if won or slower < 0.0005 else f"  {slower:+.1%}"
        axes.annotate(
            f"{format_duration(_seconds(candidate))}{note}",
            (1, y),
            (8, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=12,
            fontweight="bold" if won else "normal",
            annotation_clip=False,
        )
    _bound_line(axes, plan)
    ticks = time_ticks(axes.get_xlim()[1])
    axes.set_xticks(ticks, [format_duration(t) for t in ticks])
    axes.grid(axis="x", color=colour("line"), linewidth=0.8)
    axes.set_axisbelow(True)
    return whole


def time_ticks(longest: float) -> list[float]:
    """Round times from 0 to ``longest`` seconds, at most seven."""
    steps = [digit * 10.0**power for power in range(-9, 1) for digit in (1, 2, 5)]
    steps += [10, 15, 30, *(60 * m for m in (1, 2, 5, 10, 15, 30)), *(3600 * h for h in (1, 2, 6))]
    steps += [86400.0 * digit * 10**power for power in range(6) for digit in (1, 2, 5)]
    step = next(step for step in steps if longest / step <= 6)
    return [step * number for number in range(int(longest / step) + 1)]


def _candidate_text(candidate: Candidate) -> str:
    took = format_duration(_seconds(candidate))
    return f"{candidate.policy}: {took} with {knobs_text(candidate.knobs)}"


def _dot(axes: Axes, x: float, y: float, size: float, text: str) -> None:
    (mark,) = axes.plot(
        [x],
        [y],
        marker="o",
        markersize=size,
        color=colour("accent"),
        markeredgecolor=colour("page"),
        markeredgewidth=1.3,
        zorder=4,
    )
    hint(mark, text)


def _seconds(candidate: Candidate) -> float:
    assert candidate.seconds is not None
    return candidate.seconds


def _bound_line(axes: Axes, plan: Plan) -> None:
    """The time that no schedule can beat."""
    least = plan.bound.seconds
    axes.axvline(least, color=colour("budget"), linewidth=1.5)
    text = f"bound {format_duration(least)}, set by {engine_name(plan.bound.resource)}"
    axes.annotate(
        text,
        (least, 1),
        (3, 6),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=11.5,
        color=colour("budget"),
        annotation_clip=False,
    )


def gains(found: Sensitivity) -> Figure:
    """Seconds that one more unit of every resource saves."""
    base = found.base.seconds
    assert base is not None
    names = [more_text(effect) for effect in found.effects]
    left = 24 + LETTER * max(map(len, names))
    whole = figure(ROW * len(names) + 16)
    axes = place(whole, left, 6, RIGHT + 50, ROW * len(names))
    most = max([found.gain(effect) for effect in found.effects] + [base * 1e-6])
    axes.set_xlim(0, most)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names, color=colour("ink"), fontsize=12)
    for y, effect in enumerate(found.effects):
        gain = found.gain(effect)
        nothing = gain < 0.0005 * base
        text = "nothing" if nothing else f"{format_duration(gain)}, {gain / base:.1%}"
        if not nothing:
            axes.add_patch(_part(0, y, gain, "after", f"saves {text}"))
        axes.annotate(
            text,
            (0 if nothing else gain, y),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=12,
            annotation_clip=False,
        )
    axes.set_xticks([])
    return whole


def curves(found: Sequence[Sequence[Effect]]) -> Figure:
    """Predicted time against the amount of each resource, one panel each."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    gap, each = 58, 190
    wide = (WIDTH - LEFT - 20 - (columns - 1) * 52) / columns
    whole = figure(rows * (each + gap) + 46)
    seconds = [e.seconds for points in found for e in points if e.seconds is not None]
    top = max(seconds) * 1.08
    for number, points in enumerate(found):
        row, column = divmod(number, columns)
        left = LEFT + column * (wide + 52)
        axes = place(whole, left, row * (each + gap) + 40, WIDTH - left - wide, each)
        _curve(axes, points, top)
        if column == 0:
            axes.set_ylabel("predicted time")
    return whole


def _curve(axes: Axes, points: Sequence[Effect], top: float) -> None:
    resource = points[0].resource
    fits = [(p.amount, p.seconds, p) for p in points if p.seconds is not None]
    x, y = [p[0] for p in fits], [p[1] for p in fits]
    axes.plot(x, y, color=colour("accent"), linewidth=2.2, zorder=3)
    for amount, seconds, point in fits:
        now = amount == resource.amount
        text = f"{amount_text(resource, amount)}: {format_duration(seconds)} with {point.policy}"
        _dot(axes, amount, seconds, 9 if now else 6, f"{text}{' (the plan)' if now else ''}")
    refused = [p.amount for p in points if p.seconds is None]
    if refused:
        axes.axvspan(points[0].amount, max(refused), color=colour("faint"), linewidth=0)
        axes.annotate("does not fit", (points[0].amount, 0), (4, 6), textcoords="offset points",
                      fontsize=11, color=colour("quiet"))  # fmt: skip
    axes.axvline(resource.amount, color=colour("line"), linewidth=1.2)
    axes.set_title(resource_name(resource), loc="left", fontsize=12.5, color=colour("ink"), pad=9)
    axes.set_xscale("log", base=2)
    low, high = points[0].amount, points[-1].amount
    axes.set_xlim(low * 0.95, high * 1.05)
    axes.set_ylim(0, top)
    ticks = [low, resource.amount, high]
    axes.set_xticks(ticks, [amount_text(resource, t) for t in ticks])
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="x", pad=9)
    heights = time_ticks(top)
    axes.set_yticks(heights, [format_duration(t) for t in heights])
    axes.grid(axis="y", color=colour("line"), linewidth=0.8)
    axes.set_axisbelow(True)
