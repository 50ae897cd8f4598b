"""The sections of a report's page: `findings -> HTML`."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from math import inf

from dovetail.ir.notation import move_text
from dovetail.ir.plan import Candidate, Plan
from dovetail.ir.units import format_bytes, format_duration
from dovetail.passes.sensitivity import Effect
from dovetail.plans import report_charts as charts
from dovetail.plans import report_lanes as timed
from dovetail.plans.explain import best_of_policies
from dovetail.plans.explain_text import (
    again_text,
    binding_text,
    changed_text,
    reason_rows,
    second_text,
)
from dovetail.plans.report import Findings, tiers
from dovetail.plans.report_page import Child, chart, grid, hidden, page, section, tag, tile
from dovetail.plans.report_svg import draw
from dovetail.plans.timeline_panel import Panel
from dovetail.plans.words import (
    amount_text,
    engine_name,
    engine_order,
    grouped,
    knobs_text,
    more_text,
    resource_name,
    wait_texts,
)


def html(found: Findings) -> str:
    """The page."""
    plan = found.plan
    sections = [_time(found), _memory(found), _candidates(found), _more(found), _details(plan)]
    children = [*_header(found), *sections, _footer(plan)]
    return page(f"{plan.model.get('model_type', 'model')}: dovetail plan", children)


def _header(found: Findings) -> Iterator[ET.Element]:
    plan, took, bound = found.plan, found.plan.prediction, found.plan.bound
    model, work = plan.model, plan.workload
    budget = ", ".join(f"{tier} {format_bytes(size)}" for tier, size in plan.budget.items())
    name = f"{model.get('model_type', 'model')}, {model.get('num_layers', '?')} layers"
    yield tag("p", f"dovetail plan {plan.digest()[:12]}", class_="kicker")
    yield tag("h1", f"{name}: {plan.policy}")
    yield tag(
        "p",
        f"{work.prompts} prompts of up to {work.longest} tokens, {work.new_tokens} new tokens "
        f"each, on {plan.machine.name} within {budget}.",
        class_="lead",
    )
    measured = found.run
    rate = "predicted"
    if measured:
        rate = f"predicted; {measured['tokens_per_second']:.1f} measured"
    share = bound.seconds / took.seconds
    tiles = [
        tile("Speed", f"{took.tokens_per_second:.1f}", f"tokens/s {rate}"),
        tile("Time", format_duration(took.seconds), _time_note(found)),
        tile("Of the bound", f"{share:.0%}", f"{format_duration(bound.seconds)}, set by "
             f"{engine_name(bound.resource)}"),
        *(_tier_tile(found, tier, sum(parts.values())) for tier, parts in tiers(plan).items()),
        tile("Read from disk", _size(took.disk_bytes), f"in {took.steps} steps and set-up"),
    ]  # fmt: skip
    yield tag("dl", *tiles, class_="tiles")


def _time_note(found: Findings) -> str:
    took = found.plan.prediction
    if found.run:
        error = took.seconds / found.run["seconds"] - 1
        return f"predicted; {format_duration(found.run['seconds'])} measured ({error:+.0%})"
    return f"predicted; {format_duration(took.setup_seconds)} of it set-up"


def _tier_tile(found: Findings, tier: str, peak: int) -> ET.Element:
    size = found.plan.budget.get(tier)
    note = f"of {format_bytes(size)}, predicted peak" if size else "predicted peak"
    if tier == "ram" and found.run:
        note += f"; {format_bytes(int(found.run['rss_bytes']))} measured"
    return tile(f"In {tier}", _size(peak), note)


def _size(size: int) -> str:
    """A size in three digits."""
    number, unit = format_bytes(size).split()
    return f"{float(number):.3g} {unit}" if float(number) < 1000 else f"{float(number):.0f} {unit}"


def _time(found: Findings) -> ET.Element:
    busiest = max(found.engines, key=lambda use: use.busy)
    children: list[Child] = [tag("p", binding_text(found.plan, busiest))]
    if found.explanation and (again := again_text(found.explanation)):
        children.append(tag("p", again))
    label = "; ".join(f"{use.engine} works {use.share:.0%} of the time" for use in found.engines)
    ordered = sorted(found.engines, key=lambda use: engine_order(use.engine))
    children.append(chart(draw(lambda: charts.engines(ordered), "engines", label)))
    rows = [
        (name, f"{sum(u.share for u in uses) / len(uses):.0%}", ", ".join(wait_texts(uses)))
        for name, uses in grouped(found.engines).items()
    ]
    children.append(hidden("As a table", grid(("engine", "works", "waits for"), rows, (1,))))
    if found.steady.panels:
        label = "; ".join(_panel_label(panel) for panel in found.steady.panels)
        steady = found.steady
        svg = draw(lambda: timed.lanes(steady.panels, steady.classes), "steady", label)
        caption = "One layer in the middle of the model, in the middle of the run."
        children += [tag("h3", "Steady state"), chart(svg, caption)]
    return section("time", "Where the time goes", *children)


def _panel_label(panel: Panel) -> str:
    names = sorted({span.engine for span in panel.spans})
    busy = ", ".join(f"{name} {panel.busy(name):.0%} busy" for name in names)
    return f"{panel.source}: a layer takes {format_duration(panel.seconds)}, {busy}"


def _memory(found: Findings) -> ET.Element:
    plan, held = found.plan, tiers(found.plan)
    rows = [
        (tier, what, format_bytes(size), f"{size / max(1, plan.budget.get(tier, size)):.1%}")
        for tier, parts in held.items()
        for what, size in parts.items()
        if size
    ]
    label = "; ".join(f"{tier} {what} {size}" for tier, what, size, _ in rows)
    children: list[Child] = [
        tag("p", "The most that every tier holds at a time, by what it is, against its budget."),
        chart(
            draw(lambda: charts.memory(held, plan.budget), "memory", label),
            "The line at the end of a bar is the budget.",
        ),
        hidden("As a table", grid(("tier", "what", "bytes", "of the budget"), rows, (2, 3))),
    ]
    steady = found.steady
    if steady.held:
        over = "layer" if "hbm" in held else "step"
        label = f"buffers in use over a {over} of {format_duration(steady.period)}"
        svg = draw(
            lambda: timed.rings(steady.held, steady.rings, steady.period, over), "rings", label
        )
        what = "weights or KV" if over == "layer" else "weights"
        caption = (
            f"Buffers that hold {what} which are being read or used, over one {over} in steady "
            "state; the line is what is set aside for them."
        )
        children += [tag("h3", "Rings over time"), chart(svg, caption)]
    return section("memory", "Memory", *children)


def _candidates(found: Findings) -> ET.Element:
    plan = found.plan
    best = best_of_policies(plan)
    label = "predicted time: " + "; ".join(f"{c.policy} {_seconds(c)}" for c in best)
    children: list[Child] = []
    if found.explanation:
        children.append(tag("p", second_text(found.explanation)))
        reasons = [tag("li", f"{a}: {t}") for a, t in reason_rows(found.explanation)]
        children += [tag("ul", *reasons, class_="reasons")] if reasons else []
    children.append(
        chart(
            draw(lambda: charts.candidates(plan, best), "candidates", label),
            "Predicted time of the best schedule of each policy; dots are others of it that were "
            "simulated. Rest the pointer on a bar or a dot for its knobs.",
        )
    )
    refused = [c for c in plan.candidates if c.seconds is None]
    if refused:
        items = [tag("li", tag("b", c.policy), f": {c.refused}") for c in refused]
        children += [tag("h3", "Refused"), tag("ul", *items, class_="reasons")]
    rows = [
        (c.policy, format_duration(c.seconds), knobs_text(c.knobs))
        for c in sorted(plan.candidates, key=lambda c: c.seconds or 0.0)
        if c.seconds is not None
    ]
    table = grid(("policy", "predicted", "knobs"), rows, (1,))
    return section("candidates", "Candidates", *children, hidden("As a table", table))


def _more(found: Findings) -> ET.Element:
    explanation = found.explanation
    if explanation is None:
        text = "Left out: this report was made with --fast, which solves nothing again."
        return section("sensitivity", "What more would give", tag("p", text))
    solved = explanation.sensitivity
    label = "; ".join(
        f"{more_text(e)} saves {format_duration(max(0.0, solved.gain(e)))}" for e in solved.effects
    )
    rows = [
        (more_text(e), format_duration(e.seconds or 0.0), changed_text(solved.base, e))
        for e in solved.effects
    ]
    children: list[Child] = [
        tag("p", "Time saved by one more unit of each resource, all else kept; each was checked by "
            "solving again."),
        chart(draw(lambda: charts.gains(solved), "gains", label)),
        hidden("As a table", grid(("more", "time", "schedule"), rows, (1,))),
    ]  # fmt: skip
    if found.curves:
        children += [tag("h3", "Curves"), *_curve_parts(found)]
    return section("sensitivity", "What more would give", *children)


def _curve_parts(found: Findings) -> Iterator[ET.Element]:
    label = "; ".join(
        f"{resource_name(points[0].resource)}: "
        + ", ".join(f"{amount_text(p.resource, p.amount)} {_seconds(p)}" for p in points)
        for points in found.curves
    )
    caption = "The best schedule found with half to twice as much; the large dot is this plan."
    if any(_seconds_or(p) < _seconds_or(b) for b, p in _with_less(found)):
        caption += (
            " Less gives a shorter time where the search, which proves nothing, came upon a better "
            "schedule there: plan again within that."
        )
    yield chart(draw(lambda: charts.curves(found.curves), "curves", label), caption)
    rows = [
        (resource_name(p.resource), amount_text(p.resource, p.amount), _seconds(p), p.policy)
        for points in found.curves
        for p in points
    ]
    yield hidden("As a table", grid(("resource", "amount", "time", "policy"), rows, (1, 2)))


def _with_less(found: Findings) -> Iterator[tuple[Effect, Effect]]:
    """The plan's own point of every curve and each point with less of the resource."""
    for points in found.curves:
        own = next(p for p in points if p.amount == p.resource.amount)
        yield from ((own, p) for p in points if p.amount < own.amount)


def _seconds_or(point: Effect) -> float:
    return inf if point.seconds is None else point.seconds


def _seconds(point: Effect | Candidate) -> str:
    return "does not fit" if point.seconds is None else format_duration(point.seconds)


def _details(plan: Plan) -> ET.Element:
    moves = "\n".join(move_text(move) for move in plan.moves)
    identity = [
        ("plan", plan.digest()),
        ("task graph", plan.graph),
        ("checkpoint", plan.checkpoint or "planned from its config alone"),
        ("machine", f"{plan.machine.name}: {', '.join(plan.machine.silicon.values()) or '-'}"),
        ("knobs", knobs_text(plan.knobs)),
    ]
    rows = [tag("tr", tag("th", name), tag("td", tag("code", text))) for name, text in identity]
    proved = [
        (c.name, f"{c.objective:.6g}", f"{c.bound:.6g}", c.unit or "seconds", c.status)
        for c in plan.certificates
    ]
    head = ("what was solved", "reached", "bound", "unit", "status")
    return section(
        "plan",
        "The plan",
        tag("table", tag("tbody", *rows)),
        *([hidden("What solvers proved", grid(head, proved, (1, 2)))] if proved else []),
        hidden(f"All {len(plan.moves)} moves", tag("pre", moves)),
    )


def _footer(plan: Plan) -> ET.Element:
    text = "Times are of dovetail's cost model unless they are said to be measured. "
    return tag("footer", tag("p", f"{text}This page needs no network."))
