"""How moves, instructions and numbers are written for people: ``split(attention, seqs, 8)``.

One spelling for plans, programs and the verifier's messages.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from dovetail.ir.moves import Fuse, Move, Place
from dovetail.ir.program import Flat, Free, Load, Run, Signal, Wait
from dovetail.ir.units import format_bytes, parse_bytes

_OPTIONAL = ("by", "chunk_tokens", "layer_groups", "product", "readers")
"""Parts of a move that are left out where they are what they are without being given."""


def move_text(move: Move) -> str:
    """A move as a call: names by position, numbers by keyword."""
    if isinstance(move, Fuse):
        return f"fuse({move.body}, {span_text(move.tasks)})"
    if isinstance(move, Place):
        return _call("place", _place_parts(move))
    parts = []
    for field in dataclasses.fields(move):
        value = getattr(move, field.name)
        if field.name in _OPTIONAL and value == field.default:
            continue
        if isinstance(value, str):
            parts.append(f"by {value}" if field.name == "by" else value)
        elif field.name == "block":
            parts.append(f"block={short_bytes(value)}")
        elif field.name == "refill":
            parts.append("refill" if value else "no refill")
        else:
            parts.append(f"{field.name}={value}")
    return _call(type(move).__name__.lower(), parts)


def _place_parts(move: Place) -> list[str]:
    parts: list[str] = [move.unit, move.tier]
    if move.layers:
        parts.append(f"layers={ranges(move.layers)}")
    if move.unit == "experts":
        parts.append(f"which={ranges(move.which)}" if move.which else f"count={move.count}")
    return parts


def _call(name: str, parts: Iterable[str]) -> str:
    return f"{name}({', '.join(parts)})"


def span_text(names: Sequence[str]) -> str:
    """Consecutive tasks of a body: ``norm_0..router_0``."""
    return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}" if names else "nothing"


def instruction_text(item: Flat, layer: str = "", chunk: str = "") -> str:
    """An instruction as a call; ``layer`` and ``chunk`` are the loop variables around it."""
    match item:
        case Wait(what, name) | Signal(what, name):
            return f"{type(item).__name__.lower()}({what}, {name})"
        case Load(ring, at, part) | Free(ring, at, part):
            unit = unit_text(ring, offset(layer, at), offset(chunk, part))
            return f"{type(item).__name__.lower()}({unit})"
        case Run(segment, at, unit, part):
            where = f"{segment}[{offset(layer, at)}]" if at >= 0 else segment
            place = unit_text(unit, offset(layer, at), offset(chunk, part))
            return f"run({where}, {place})" if unit else f"run({where})"


def unit_text(kind: str, layer: int | str, chunk: int | str = 0) -> str:
    """A unit of weights: ``dense[3]``, ``experts[3, 0]`` (layer and chunk), ``head``."""
    if kind == "dense":
        return f"dense[{layer}]"
    return f"experts[{layer}, {chunk}]" if kind == "experts" else kind


def offset(variable: str, number: int) -> str:
    """``variable + number`` as it is written, the number alone without a variable."""
    if not variable:
        return str(number)
    return f"{variable} + {number}" if number > 0 else variable


def ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers in short: ``0-15``, ``0-22 by 2``, ``[0-3, 8]``."""
    left, parts = sorted(set(numbers)), []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        length = 1
        while length < len(left) and left[length] == left[0] + length * step:
            length += 1
        if length < 3 and step > 1:
            length, step = 1, 1
        first, last = left[0], left[length - 1]
        by = f" by {step}" if step > 1 else ""
        parts.append(f"{first}-{last}{by}" if length > 1 else str(first))
        left = left[length:]
    if len(parts) == 1:
        return parts[0]
    return f"[{', '.join(parts)}]" if parts else "none"


def short_bytes(size: int) -> str:
    """A size as one types it: ``8MiB``, or plain bytes where that would not be exact."""
    text = format_bytes(size).replace(" ", "").replace(".00", "")
    return text if parse_bytes(text) == size else str(size)


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = (), indent: int = 2) -> list[str]:
    """Lines of aligned columns; ``right`` names the columns that are aligned to the right."""
    to_right = set(right)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in to_right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return lines
