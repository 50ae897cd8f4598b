"""A compiled module's plan in words: three lines, and the whole explanation."""

from typing import TYPE_CHECKING

from torch import nn

from dovetail.doors.region_choice import EAGER, Choice, ModulePlan
from dovetail.ir.units import format_bytes, format_duration

if TYPE_CHECKING:
    from dovetail.doors.compiled_generate import CompiledGenerate


def three_lines(module: nn.Module, plan: ModulePlan, generation: "CompiledGenerate | None") -> str:
    """What `repr` says of a compiled module."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    first = (
        f"{type(module).__name__}(compiled by dovetail, {format_bytes(size)} of weights in memory"
    )
    regions = len(plan.regions)
    kinds = len(set(plan.regions.values()))
    second = f"  plan {plan.digest()[:12]}: {regions} regions of {kinds} kinds scheduled"
    if not regions:
        second = "  plan: nothing to schedule, the module runs as it is"
    return f"{first}\n{second}\n  {_decided(plan, generation)})"


def _decided(plan: ModulePlan, generation: "CompiledGenerate | None") -> str:
    choices = [*plan.choices, *(generation.choices.values() if generation else ())]
    if not choices:
        return "nothing has run yet: the first call of every workload bucket measures"
    best: dict[str, int] = {}
    for choice in choices:
        best[choice.winner] = best.get(choice.winner, 0) + 1
    shown = ", ".join(f"{name} in {count}" for name, count in sorted(best.items()))
    return f"{len(choices)} workload buckets measured: {shown}"


def explain_module(plan: ModulePlan, generation: "CompiledGenerate | None") -> str:
    """Every choice with what was measured, what was refused, and what runs as it is."""
    parts = [f"{plan.module}: {len(plan.regions)} regions, {len(plan.choices)} choices"]
    for kind in sorted(set(plan.regions.values())):
        paths = [path for path, own in plan.regions.items() if own == kind]
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        parts.append(f"{paths[0] or 'the module itself'}{more}: {kind}")
        parts += _choices([c for c in plan.choices if c.region.startswith(kind)], "tokens")
    for note in plan.notes:
        parts.append(note)
    if generation is not None:
        parts += _generation(generation)
    if not plan.regions and generation is None:
        parts.append("no routed experts were found, so the module runs as it is")
    return "\n\n".join(parts)


def _generation(generation: "CompiledGenerate") -> list[str]:
    if generation.why_not:
        return [f"generate runs as it is: {generation.why_not}"]
    found = list(generation.choices.values())
    if not found:
        return ["generate has not been called with enough prompts to be scheduled"]
    plan = generation.plan
    text = "generate"
    if plan is not None:
        expected = plan.prediction
        text += (
            f", scheduled by {plan.policy} (plan {plan.digest()[:12]}): predicted "
            f"{format_duration(expected.seconds)}, {format_bytes(expected.peak_bytes)} of ram"
        )
    return [text, *_choices(found, "prompts")]


def _choices(choices: list[Choice], unit: str) -> list[str]:
    if not choices:
        return ["  nothing measured yet"]
    rows = [[unit, "used", "implementation", "median of its ratio to eager", ""]]
    for choice in choices:
        for name in sorted(choice.samples, key=choice.ratio):
            used = "*" if name == choice.winner else ""
            ratio = "" if name == EAGER else f"{choice.ratio(name):.2f}"
            source = choice.source if name == choice.winner else ""
            rows.append([f"up to {choice.tokens}", used, name, ratio, source])
        for name, why in choice.refused.items():
            rows.append([f"up to {choice.tokens}", "", name, "refused", why])
    return [_aligned(rows)]


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)
