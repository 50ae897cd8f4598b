"""Emit the executor: `program -> Python source`, one line an instruction.

The source is a pure function of the task graph and the program: same plan, same text. It is written
to be read, and the runtime runs exactly this text.
"""

from collections.abc import Iterable, Mapping

from dovetail.codegen.segments import MODULE, emit_expert, emit_segment, rounds_rows
from dovetail.ir.program import (
    Free,
    Instruction,
    Load,
    Loop,
    Program,
    Run,
    Signal,
    Wait,
)
from dovetail.ir.task_graph import Body, TaskGraph


def emit_executor(graph: TaskGraph, program: Program, title: Mapping[str, str]) -> str:
    """The executor's source. ``title`` says what it was emitted for (policy, model, budget, plan)
    and becomes the docstring."""
    lines = ['"""Executor emitted by dovetail. Read it; edits are not read back.', ""]
    lines += [f"{key}: {value}" for key, value in title.items()]
    lines += [
        "",
        "m is the runtime, g a group of sequences, v the group's values, w weights by name.",
        '"""',
        "",
        "import math",
        "",
        "import torch",
        "from torch.nn import functional as F",
        "",
        "from dovetail.runtime.linear import TiledLinear",
        *_module_imports(graph),
        *_quantised_imports(graph),
        "",
        "aten = torch.ops.aten",
        f"linear = TiledLinear({program.settings.buckets})",
    ]
    bodies = {body.name: body for body in (graph.prologue, *graph.bodies, graph.epilogue)}
    for segment in program.segments:
        lines += ["", ""]
        body = bodies[segment.body]
        if segment.over == "experts":
            lines += emit_expert(body, segment)
        else:
            lines += emit_segment(graph, body, segment)
    for names, instructions in _same_engines(program):
        lines += ["", ""]
        lines += _emit_engine(names, instructions, program, bodies)
    return "\n".join(lines) + "\n"


def _module_imports(graph: TaskGraph) -> list[str]:
    ops = (op for body in graph.bodies for task in body.tasks for op in task.ops)
    if all(op.target != MODULE for op in ops):
        return []
    return ["from dovetail.runtime.modules import Cache, Carried, Mask, Part"]


def _quantised_imports(graph: TaskGraph) -> list[str]:
    experts = (body.experts.experts for body in graph.bodies if body.experts)
    if not any(each is not None and rounds_rows(each) for each in experts):
        return []
    return ["from dovetail.runtime.quantised import rounded"]


def engine_function(engine: str, program: Program) -> str:
    """The emitted function that runs an engine: ``cpu`` for cpu0, cpu1, …, which do the same; of
    several disk engines each has its own part of the loads, and so a function of its own name."""
    kind = engine.rstrip("0123456789")
    alike = {items for name, items in program.engines.items() if name.startswith(kind)}
    return kind if len(alike) == 1 else engine


def _same_engines(program: Program) -> Iterable[tuple[list[str], tuple[Instruction, ...]]]:
    groups: dict[str, list[str]] = {}
    for name in program.engines:
        groups.setdefault(engine_function(name, program), []).append(name)
    for names in groups.values():
        yield names, program.engines[names[0]]


def _emit_engine(
    names: list[str],
    instructions: tuple[Instruction, ...],
    program: Program,
    bodies: Mapping[str, Body],
) -> list[str]:
    name = engine_function(names[0], program)
    what = "Compute workers" if name == "cpu" else "Disk reader"
    lines = [
        f"def {name}(m, worker):",
        f'    """{what}: what {", ".join(names)} does, step after step."""',
        "    for _ in m.steps(worker):",
    ]
    emitter = _Emitter(program, "" if name in ("cpu", "disk") else f', "{name}"')
    emitter.block(instructions, 2, layer="0", chunk="0", in_layers=False)
    return lines + (emitter.lines or ["        pass"])


_MEETINGS = {
    "tokens": "accumulate(experts, tokens)",
    "experts": "all experts have added up",
    "hidden": "last hidden states, then the head",
}
"""Why the workers meet at each phase."""


class _Emitter:
    """Instruction lists as indented lines; ``loader`` is a last argument of what concerns loads."""

    def __init__(self, program: Program, loader: str) -> None:
        self.lines: list[str] = []
        self._program, self._loader = program, loader

    def block(
        self,
        items: tuple[Instruction, ...],
        depth: int,
        *,
        layer: str,
        chunk: str,
        in_layers: bool,
    ) -> None:
        """Emit ``items``, merging a signal and the wait that follows it into one meeting."""
        skip = False
        for index, item in enumerate(items):
            if skip:
                skip = False
                continue
            following = items[index + 1] if index + 1 < len(items) else None
            if isinstance(item, Loop):
                self._loop(item, depth, layer=layer, chunk=chunk)
                continue
            if isinstance(item, Signal) and item.what == "phase":
                skip = following == Wait("phase", item.name)
                assert skip or item.name == "step", "workers wait where they signal"
                word = "meet" if skip else "signal"
                self._line(depth, f'm.{word}(worker, "{item.name}")', _MEETINGS.get(item.name, ""))
                continue
            self._line(depth, self._one(item, layer, chunk), self._move(item))

    def _loop(self, loop: Loop, depth: int, *, layer: str, chunk: str) -> None:
        step = f", {loop.step}" if loop.step > 1 else ""
        self._line(depth, f"for {loop.variable} in range({loop.start}, {loop.stop}{step}):")
        names = {"layer": layer, "chunk": chunk} | {loop.variable: loop.variable}
        self.block(loop.body, depth + 1, layer=names["layer"], chunk=names["chunk"], in_layers=True)

    def _one(self, item: Instruction, layer: str, chunk: str) -> str:
        match item:
            case Wait("room", name):
                return f'm.wait_room("{name}"{self._loader})'
            case Wait("ready", name):
                return f'm.wait_ready(worker, "{name}")'
            case Signal("ready", name):
                return f'm.signal_ready("{name}"{self._loader})'
            case Load(ring, at, part):
                place = f'"{ring}", {_plus(layer, at)}, {_plus(chunk, part)}'
                return f"m.load({place}{self._loader})"
            case Free(ring, _, _):
                return f'm.free(worker, "{ring}")'
            case Run():
                return self._run(item, layer, chunk)
        raise AssertionError(item)

    def _run(self, run: Run, layer: str, chunk: str) -> str:
        segment = self._program.segment(run.segment)
        at = "-1" if run.layer < 0 else _plus(layer, run.layer)
        if segment.over == "experts":
            part = "-1" if run.chunk < 0 else _plus(chunk, run.chunk)
            return f"m.run_experts(worker, {run.segment}, {at}, {part})"
        call = "run_head" if segment.over == "seqs" else "run_groups"
        return f'm.{call}(worker, {run.segment}, {at}, "{run.unit}")'

    def _move(self, item: Instruction) -> str:
        """The move that put an instruction there."""
        settings = self._program.settings
        match item:
            case Wait("room", name):
                return f"prefetch({name}, slots={self._program.ring(name).slots})"
            case Load(name, _, _):
                many = f", chunk of {settings.chunk}" if name == "experts" else ""
                return f"place({name}, disk{many})"
            case Run():
                over = self._program.segment(item.segment).over
                if over == "experts":
                    return f"split(experts, tokens, {settings.expert_rows})"
                if over == "seqs":
                    return f"split(head, seqs, {settings.head_rows})"
                return f"split(attention, seqs, {settings.admission.rows})"
        return ""

    def _line(self, depth: int, text: str, comment: str = "") -> None:
        line = "    " * depth + text
        self.lines.append(f"{line}  # {comment}" if comment else line)


def _plus(variable: str, offset: int) -> str:
    if variable == "0":
        return str(offset)
    return variable if not offset else f"{variable} + {offset}"
