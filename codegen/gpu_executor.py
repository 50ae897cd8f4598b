"""Emit the executor of a GPU program: `program -> Python source`, one line an instruction.

The source is a pure function of the program: same plan, same text. Every engine is a function whose
lines enqueue on its stream, or run on its thread, in order.
"""

from collections.abc import Mapping

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


def emit_gpu_executor(program: GpuProgram, title: Mapping[str, str]) -> str:
    """The executor's source. ``title`` says what it was emitted for (policy, model, budget) and
    becomes the docstring."""
    lines = ['"""Executor emitted by dovetail. Read it; edits are not read back.', ""]
    lines += [f"{key}: {value}" for key, value in title.items()]
    lines += [f"note: {text}" for text in program.notes]
    lines += ["", "e is an engine: what it is told to do it does in order.", '"""', ""]
    lines += _pools(program)
    ops = {op.name: op for body in program.bodies for op in body}
    for engine, items in program.engines.items():
        what = "A thread of the host" if engine in HOST_ENGINES else "A stream of the GPU"
        lines += ["", "", f"def {engine}(e):", f'    """{what}."""']
        for item in items:
            if isinstance(item, Layers):
                step = f", {item.step}" if item.step > 1 else ""
                lines.append(f"    for layer in range({item.start}, {item.stop}{step}):")
                lines += [f"        {_line(each, 'layer', ops)}" for each in item.body]
            else:
                lines.append(f"    {_line(item, '', ops)}")
    return "\n".join(lines) + "\n"


def _pools(program: GpuProgram) -> list[str]:
    return [
        f"# {p.tier}: pool {p.name}, {p.slots} buffers of {format_bytes(p.slot_bytes)}"
        for p in program.pools
    ]


def _line(item: GpuFlat, variable: str, ops: Mapping[str, GpuOp]) -> str:
    at = layer_text(item.layer, variable)
    match item:
        case Wait(op, _):
            return f'e.wait("{op}", {at})'
        case Take(op, _, "", _, slot):
            return f'e.take("{op}", {at}, slot={slot})  # pool {ops[op].takes}'
        case Take(op, _, of, of_layer):
            return f'e.take("{op}", {at}, of=("{of}", {layer_text(of_layer, variable)}))'
        case Do(op, _):
            size = f", {format_bytes(ops[op].nbytes)}" if ops[op].nbytes else ""
            return f'e.do("{op}", {at})  # {ops[op].work}{size}'
        case Record(op, _):
            return f'e.record("{op}", {at})'
