"""An explanation in plain words, at most 100 columns wide."""

import textwrap

from dovetail.ir.notation import table
from dovetail.ir.plan import Plan
from dovetail.ir.units import format_bytes, format_duration
from dovetail.kernels.planned import kernel_seconds
from dovetail.passes.engine_use import EngineUse
from dovetail.passes.sensitivity import Effect, Sensitivity
from dovetail.plans.explain import Explanation, Facts, Reason
from dovetail.plans.words import (
    SAME,
    engine_kind,
    engine_name,
    grouped,
    knobs_text,
    more_text,
    wait_texts,
)

WIDTH = 100
BUSY = 0.9
"""Share of the time from which an engine is said to be busy throughout."""


def explanation_text(found: Explanation) -> str:
    """The explanation, for people."""
    sections = [
        _winner(found),
        _engines(found.sensitivity),
        _effects(found.sensitivity),
        _second(found),
        _others(found),
        _kernels(found.plan),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _kernels(plan: Plan) -> list[str]:
    """What the kernels of a GPU plan are expected to take, or why it has none."""
    if plan.no_kernels and not plan.kernels:
        return _wrap(f"Its experts run as torch's products, without kernels: {plan.no_kernels}.")
    if not plan.kernels:
        return []
    lines = _wrap(
        "Tiles of the experts' kernels are the cost model's fastest of all that fit the "
        "GPU; predicted for one layer with all its experts in hbm:"
    )
    rows = [("experts of", "tokens", "up", "down")]
    for bodies, tokens, up, down in kernel_seconds(plan):
        rows.append((bodies, f"{tokens}", format_duration(up), format_duration(down)))
    lines += table(rows, right=(1, 2, 3))
    for ladder in plan.ladders:
        for rung in ladder.rungs:
            if (found := rung.measured) is not None:
                lines += _wrap(
                    f"Those for {rung.bucket[1]} tokens were measured: with sort and sum "
                    f"{format_duration(found.seconds)}, where the cost model's choice takes "
                    f"{format_duration(found.default_seconds)} ({found.ratio:.3f}, between "
                    f"{found.low:.3f} and {found.high:.3f})."
                )
    return lines


def _winner(found: Explanation) -> list[str]:
    return _wrap(" ".join(filter(None, (binding_text(found.plan, found.sensitivity.busiest),
                                        again_text(found)))))  # fmt: skip


def binding_text(plan: Plan, use: EngineUse) -> str:
    """How fast the plan is, what binds it, and how near it is to its bound."""
    took, bound = plan.prediction, plan.bound
    name = _upper(engine_name(use.engine))
    text = (
        f"{plan.policy} wins with {format_duration(took.seconds)} predicted, "
        f"{took.tokens_per_second:.1f} tokens/s. "
    )
    if use.share >= BUSY:
        text += f"{name} binds: it works {use.share:.0%} of the time after set-up. "
    else:
        text += (
            f"{name} is the busiest, but works only {use.share:.0%} of the time after set-up; in "
            "the rest it waits for others. "
        )
    return text + (
        f"No schedule can take less than {format_duration(bound.seconds)} on this machine, a bound "
        f"set by {engine_name(bound.resource)}; the plan reaches "
        f"{bound.seconds / took.seconds:.0%} of it."
    )


def again_text(found: Explanation) -> str:
    """A remark where solving the plan's own problem again gave another time, else nothing."""
    took = found.plan.prediction.seconds
    base = found.sensitivity.base.seconds or took
    if abs(base / took - 1) <= SAME:
        return ""
    return (
        f"Solved again now, the same problem takes {format_duration(base)}: the plan is of another "
        "version of dovetail, or its schedule was given."
    )


def _engines(found: Sensitivity) -> list[str]:
    rows = [("engine", "works", "waits for")]
    for name, uses in grouped(found.engines).items():
        share = sum(use.share for use in uses) / len(uses)
        many = f"{name} (mean of {len(uses)})" if len(uses) > 1 else name
        rows.append((many, f"{share:.0%}", ", ".join(wait_texts(uses))))
    return ["what every engine does after set-up", *table(rows, right=(1,))]


def _effects(found: Sensitivity) -> list[str]:
    rows = [("", "time", "saved", "", "with")]
    for effect in found.effects:
        assert effect.seconds is not None and found.base.seconds is not None
        gain = found.gain(effect)
        same = gain < SAME * found.base.seconds
        rows.append(
            (
                more_text(effect),
                format_duration(effect.seconds),
                "nothing" if same else format_duration(gain),
                "" if same else f"{gain / found.base.seconds:.1%}",
                changed_text(found.base, effect),
            )
        )
    title = "what one more unit of each resource would give, each checked by solving again"
    lines = table(rows, right=(1, 2, 3))
    indent = " " * (lines[0].index("with") if "with" in lines[0] else 4)
    return [title, *(part for line in lines for part in _wrap(line, indent))]


def changed_text(base: Effect, effect: Effect) -> str:
    """In what the schedule differs: another policy, or the knobs that do."""
    if effect.policy != base.policy:
        return effect.policy
    before, after = base.knobs or {}, effect.knobs or {}
    changed = {name: value for name, value in after.items() if before.get(name) != value}
    return knobs_text(changed) if changed else "the same knobs"


def _second(found: Explanation) -> list[str]:
    lines = _wrap(second_text(found), "  ")
    for amount, text in reason_rows(found):
        lines += _wrap(f"  {amount:>8}  {text}", " " * 12)
    return lines


def second_text(found: Explanation) -> str:
    """Which policy came second and by how much."""
    second, plan = found.second, found.plan
    if second is None:
        return f"No other policy was considered or fits: {plan.policy} stands alone."
    took = format_duration(second.seconds)
    if second.same:
        return (
            f"Second: {second.policy} with {took}, as fast, because its best schedule is the same "
            "one: all moves are equal."
        )
    slower = second.seconds / plan.prediction.seconds - 1
    text = f"Second: {second.policy} with {took}, "
    if slower > SAME:
        gap = format_duration(second.seconds - plan.prediction.seconds)
        text += f"{gap} ({slower:.1%}) slower, with {knobs_text(second.knobs)}."
    elif slower < -SAME:
        text += (
            f"{-slower:.1%} faster once its engines' order is solved for too, which the choice did "
            f"not wait for; with {knobs_text(second.knobs)}."
        )
    else:
        text += f"as fast within {SAME:.1%}, with {knobs_text(second.knobs)}."
    facts, first = second.facts, found.facts
    if facts is None:
        return text + " Its schedule cannot be made again from its knobs."
    if (first.seqs, first.steps) != (facts.seqs, facts.steps):
        text += (
            f" It has {facts.seqs} sequences in flight and takes {facts.steps} steps; "
            f"{plan.policy} has {first.seqs} and takes {first.steps}."
        )
    return text


def reason_rows(found: Explanation) -> list[tuple[str, str]]:
    """Where the second loses and saves time: seconds with their sign, and the reason. Nothing if
    it is as fast."""
    second = found.second
    if second is None or second.facts is None:
        return []
    if abs(second.seconds / found.facts.seconds - 1) <= SAME:
        return []
    return [
        (
            f"{'+' if reason.seconds > 0 else '-'}{format_duration(abs(reason.seconds))}",
            reason_text(reason, found.facts, second.facts),
        )
        for reason in second.reasons
    ]


def reason_text(reason: Reason, first: Facts, second: Facts) -> str:
    """A reason in words."""
    more = reason.seconds > 0
    if reason.kind == "set-up":
        what = "longer" if more else "shorter"
        return (
            f"{what} set-up: it first reads {format_bytes(second.setup_bytes)} of weights that "
            f"stay, not {format_bytes(first.setup_bytes)}"
        )
    if reason.kind == "work":
        what = "more" if more else "less"
        text = f"{what} work for {engine_name(second.busiest)}, its busiest engine: "
        if first.busiest != second.busiest:
            text = f"{what} work: its busiest engine is {engine_name(second.busiest)}, not "
            text += f"{engine_name(first.busiest)}: "
        text += f"{format_duration(second.work)}, not {format_duration(first.work)}"
        link = engine_kind(second.busiest)
        a, b = first.step_bytes.get(link), second.step_bytes.get(link)
        if a is not None and b is not None and a != b:
            text += f" (it moves {format_bytes(b)} in each step, not {format_bytes(a)})"
        return text
    what = "less" if more else "more"
    return (
        f"{what} overlap: {engine_name(second.busiest)} works {second.share:.0%} of the time "
        f"after set-up, not {first.share:.0%}"
        if first.busiest == second.busiest
        else f"{what} overlap: its busiest engine works {second.share:.0%} of the time after "
        f"set-up, not {first.share:.0%}"
    )


def _others(found: Explanation) -> list[str]:
    best = found.plan.prediction.seconds
    shown = {found.plan.policy, found.second.policy if found.second else ""}
    rows = [
        (c.policy, format_duration(c.seconds or 0.0), f"{(c.seconds or 0.0) / best - 1:+.1%}")
        for c in found.best
        if c.policy not in shown
    ]
    lines = ["the others", *table(rows, right=(1, 2))] if rows else []
    for candidate in found.refused:
        lines += _wrap(f"refused: {candidate.policy}: {candidate.refused}", "  ")
    return lines


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
