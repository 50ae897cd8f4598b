"""Emit the executor of a GPU program: `program -> Python source`, one line an instruction.

The source is a pure function of the program: same plan, same text. Every engine is a function whose
lines enqueue on its stream, or run on its thread, in order. Loads and groups that follow each other
in the same way become loops over their number.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dovetail.ir.gpu_program import (
    HOST_ENGINES,
    Do,
    GpuFlat,
    GpuOp,
    GpuProgram,
    Layers,
    Record,
    Take,
    Wait,
    layer_text,
)
from dovetail.ir.units import format_bytes

MAX_PATTERN, LEAST_REPEATS = 6, 3
"""Most instructions of a load or group that are recognised as a loop, and fewest repetitions."""
_NUMBERED = re.compile(r"(.*?)([0-9]+)")


def emit_gpu_executor(program: GpuProgram, title: Mapping[str, str]) -> str:
    """The executor's source. ``title`` says what it was emitted for (policy, model, budget) and
    becomes the docstring."""
    lines = ['"""Executor emitted by dovetail. Read it; edits are not read back.', ""]
    lines += [f"{key}: {value}" for key, value in title.items()]
    lines += [f"note: {text}" for text in program.notes]
    lines += ["", "e is an engine: what it is told to do it does in order.", '"""', ""]
    lines += [
        f"# {p.tier}: pool {p.name}, {p.slots} buffers of {format_bytes(p.slot_bytes)}"
        for p in program.pools
    ]
    ops = {op.name: op for body in program.bodies for op in body}
    for engine, items in program.engines.items():
        what = "A thread of the host" if engine in HOST_ENGINES else "A stream of the GPU"
        lines += ["", "", f"def {engine}(e):", f'    """{what}."""']
        straight: list[GpuFlat] = []
        for item in items:
            if not isinstance(item, Layers):
                straight.append(item)
                continue
            lines += _block(straight, "", ops, 1)
            straight = []
            step = f", {item.step}" if item.step > 1 else ""
            lines.append(f"    for layer in range({item.start}, {item.stop}{step}):")
            lines += _block(item.body, "layer", ops, 2)
        lines += _block(straight, "", ops, 1)
    return "\n".join(lines) + "\n"


def _block(
    items: Sequence[GpuFlat], variable: str, ops: Mapping[str, GpuOp], depth: int
) -> list[str]:
    """Instructions as lines, repetitions as loops over ``n``."""
    lines, at, indent = [], 0, "    " * depth
    while at < len(items):
        period, repeats = _pattern(items, at, ops)
        body = items[at : at + period]
        if repeats > 1:
            first = next(number for item in body if (number := _number(item.op)) is not None)
            lines.append(f"{indent}for n in range({first}, {first + repeats}):")
            lines += [f"{indent}    {_line(item, variable, ops, first)}" for item in body]
        else:
            lines.append(indent + _line(items[at], variable, ops, None))
        at += period * repeats
    return lines


def _pattern(items: Sequence[GpuFlat], at: int, ops: Mapping[str, GpuOp]) -> tuple[int, int]:
    """How many instructions repeat from a place on, and how often, with numbers rising by one."""
    best = (1, 1)
    for period in range(1, MAX_PATTERN + 1):
        body = [_next(item) for item in items[at : at + period]]
        if not any(_number(item.op) is not None for item in body):
            continue
        repeats = 1
        while body == list(items[at + repeats * period : at + (repeats + 1) * period]) and all(
            _remark(item, ops) == _remark(first, ops)
            for item, first in zip(body, items[at : at + period], strict=True)
        ):
            body, repeats = [_next(item) for item in body], repeats + 1
        if repeats >= LEAST_REPEATS and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def _next(item: GpuFlat) -> GpuFlat:
    """The instruction of the next load or group."""
    if isinstance(item, Take):
        # New buffers are numbered like what takes them.
        slot = item.slot if item.of else item.slot + 1
        return replace(item, op=_following(item.op), of=_following(item.of), slot=slot)
    return replace(item, op=_following(item.op))


def _following(name: str) -> str:
    parts = _NUMBERED.fullmatch(name)
    return f"{parts[1]}{int(parts[2]) + 1}" if parts else name


def _number(name: str) -> int | None:
    parts = _NUMBERED.fullmatch(name)
    return int(parts[2]) if parts else None


def _line(item: GpuFlat, variable: str, ops: Mapping[str, GpuOp], first: int | None) -> str:
    """An instruction; in a loop over ``n`` that begins with ``first``, names have it in them."""
    at, name = layer_text(item.layer, variable), _name(item.op, first)
    match item:
        case Wait():
            text = f"e.wait({name}, {at})"
        case Take(_, _, "", _, slot):
            number = str(slot) if first is None else layer_text(slot - first, "n")
            text = f"e.take({name}, {at}, slot={number})"
        case Take(_, _, of, of_layer):
            text = (
                f"e.take({name}, {at}, of=({_name(of, first)}, {layer_text(of_layer, variable)}))"
            )
        case Do():
            text = f"e.do({name}, {at})"
        case Record():
            text = f"e.record({name}, {at})"
    remark = _remark(item, ops)
    return f"{text}  # {remark}" if remark else text


def _remark(item: GpuFlat, ops: Mapping[str, GpuOp]) -> str:
    op = ops[item.op]
    if isinstance(item, Take) and not item.of:
        return f"pool {op.takes}"
    if isinstance(item, Do):
        return f"{op.work}, {format_bytes(op.nbytes)}" if op.nbytes else op.work
    return ""


def _name(op: str, first: int | None) -> str:
    parts = _NUMBERED.fullmatch(op)
    if first is None or parts is None:
        return f'"{op}"'
    return f'f"{parts[1]}{{{layer_text(int(parts[2]) - first, "n")}}}"'
