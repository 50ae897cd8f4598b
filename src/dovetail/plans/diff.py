"""The difference of two plans: moves, knobs, predictions, and what they were made for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher

from dovetail.ir.moves import Move
from dovetail.ir.plan import Plan
from dovetail.ir.printer import print_moves
from dovetail.ir.units import format_bytes, format_duration
from dovetail.ir.workload import Workload

SAME = "the plans are the same"
Row = tuple[str, str, str]
"""What, before and after."""


def diff_text(before: Plan, after: Plan) -> str:
    """What distinguishes ``after`` from ``before``, in sections; ``SAME`` if nothing does."""
    if before.digest() == after.digest():
        return SAME
    sections = [
        ("made for", _table(_made_for(before, after))),
        ("schedule", _table(_schedule(before, after))),
        ("moves", move_lines(before.moves, after.moves)),
        ("prediction", _table(_prediction(before, after))),
    ]
    shown = [(title, lines) for title, lines in sections if lines]
    if not shown:
        shown = [("other", ["only what was measured of the machine or considered differs"])]
    return "\n\n".join("\n".join([title, *(f"  {x}" for x in lines)]) for title, lines in shown)


def move_lines(before: Sequence[Move], after: Sequence[Move]) -> list[str]:
    """Removed moves with ``-`` and added ones with ``+``, in order."""
    lines: list[str] = []
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            continue
        removed = [f"- {print_moves([move])}" for move in before[a:b]]
        added = [f"+ {print_moves([move])}" for move in after[c:d]]
        # As many as before are most likely the same moves with other sizes.
        together = zip(removed, added, strict=False) if len(removed) == len(added) else ()
        lines += [line for pair in together for line in pair] or removed + added
    return lines


def _made_for(before: Plan, after: Plan) -> Iterator[Row]:
    yield "model", _model(before), _model(after)
    yield "machine", before.machine.name, after.machine.name
    yield "workload", _workload(before.workload), _workload(after.workload)
    for tier in _keys(before.budget, after.budget):
        sizes = (plan.budget.get(tier) for plan in (before, after))
        a, b = ("-" if size is None else format_bytes(size) for size in sizes)
        yield f"budget {tier}", a, b


def _schedule(before: Plan, after: Plan) -> Iterator[Row]:
    yield "policy", before.policy, after.policy
    for knob in _keys(before.knobs, after.knobs):
        yield knob, str(before.knobs.get(knob, "-")), str(after.knobs.get(knob, "-"))


def _prediction(before: Plan, after: Plan) -> Iterator[Row]:
    a, b = before.prediction, after.prediction
    yield _figure("time", format_duration, a.seconds, b.seconds)
    yield _figure("tokens/s", lambda rate: f"{rate:.1f}", a.tokens_per_second, b.tokens_per_second)
    yield "steps", str(a.steps), str(b.steps)
    yield _figure("disk reads", _size, a.disk_bytes, b.disk_bytes)
    yield _figure("peak ram", _size, a.peak_bytes, b.peak_bytes)
    for name in _keys(a.bytes, b.bytes):
        yield f"  {name}", _size(a.bytes.get(name, 0)), _size(b.bytes.get(name, 0))
    yield _figure("bound", format_duration, before.bound.seconds, after.bound.seconds)
    yield "bound by", before.bound.resource, after.bound.resource


def _figure(name: str, text: Callable[[float], str], a: float, b: float) -> Row:
    change = f" ({b / a - 1:+.1%})" if a and text(a) != text(b) else ""
    return name, text(a), text(b) + change


def _size(size: float) -> str:
    return format_bytes(int(size))


def _keys(*mappings: Mapping[str, object]) -> list[str]:
    """The keys of all mappings, each once, in order."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _model(plan: Plan) -> str:
    kind, layers = plan.model.get("model_type", "?"), plan.model.get("num_layers", "?")
    return f"{kind}, {layers} layers, graph {plan.graph[:12]}"


def _workload(work: Workload) -> str:
    return f"{work.prompts} prompts, {work.prompt_tokens} tokens, {work.new_tokens} new each"


def _table(rows: Iterable[Row]) -> list[str]:
    """Only the rows that differ, in columns."""
    different = [row for row in rows if row[1] != row[2]]
    width = max((len(name) for name, _, _ in different), default=0)
    return [f"{name:<{width}}  {a} -> {b}" for name, a, b in different]
