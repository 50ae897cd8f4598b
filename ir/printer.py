"""The IR as text for people: task graphs, programs, moves and plans, at most 100 columns wide."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from dovetail.ir.expr import DIMS, Expr
from dovetail.ir.kernel_text import kernel_lines
from dovetail.ir.moves import Move, Place
from dovetail.ir.notation import instruction_text, move_text, ranges, table
from dovetail.ir.plan import Candidate, Certificate, Plan
from dovetail.ir.program import Instruction, Loop, Program, Segment
from dovetail.ir.task_graph import Body, Experts, Task, TaskGraph
from dovetail.ir.units import format_bytes, format_duration
from dovetail.ir.workload import Workload

WIDTH = 100
BAR = 30
"""Columns of the longest bar."""
_HARD_SPACE = "\N{NO-BREAK SPACE}"
"""Where a line is not broken; printed as a space."""
Flops = Callable[[Task, Body], Expr]
"""FLOPs of a task of a body, in the dims."""
Rows = list[tuple[str, ...]]


def print_moves(moves: Iterable[Move]) -> str:
    """One line a move: ``place(experts, ram, layers=0-15, count=7)``."""
    return "\n".join(move_text(move) for move in moves)


def print_graph(graph: TaskGraph, flops: Flops | None = None) -> str:
    """The task graph: every body once with the layers that run it, a line for each task and one
    for what it reads and writes. FLOPs are printed if ``flops`` gives them."""
    model = graph.model
    lines = _wrap(
        f"{model.get('model_type', 'model')} ({model.get('architecture', 'unknown')}), "
        f"{len(graph.layers)} layers, {graph.dtype}: hidden {graph.hidden}, vocab {graph.vocab}, "
        f"context {graph.context}, weights {format_bytes(graph.weight_bytes)}, "
        f"KV {format_bytes(graph.kv_bytes_per_token)} a token",
        "",
    )
    meanings = ("sequences of a group", "new tokens of each", "tokens already in the KV store")
    lines.append("dims: " + ", ".join(f"{d} ({m})" for d, m in zip(DIMS, meanings, strict=True)))
    if graph.constants:
        shapes = [f"{name} {_shape(value.shape)}" for name, value in graph.constants.items()]
        lines += _wrap(f"constants: {', '.join(shapes)}", "  ")
    for body in (graph.prologue, *graph.bodies, graph.epilogue):
        lines += ["", *_body_lines(graph, body, flops)]
    return "\n".join(lines)


def _body_lines(graph: TaskGraph, body: Body, flops: Flops | None) -> Iterator[str]:
    layers = [i for i in range(len(graph.layers)) if graph.body(i) is body]
    which = f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}" if layers else ""
    times = f" x {len(layers)} ({which})" if layers else ""
    yield from _wrap(f"{body.name}{times}: {_names(body, body.inputs)}", "    ")
    head = ("task", "splits along", "weights", "FLOPs" if flops else "")
    rows = [head, *(_task_row(task, body, flops) for task in body.tasks)]
    aligned = table(rows, right=(2,))
    yield aligned[0]
    for task, line in zip(body.tasks, aligned[1:], strict=True):
        yield from _wrap(line, " " * 8)
        if task.experts is not None:
            yield from _wrap("      " + _experts(task.experts), " " * 8)
        if task.kv is not None:
            kv = task.kv
            yield (
                f"      keys {kv.key_heads} x {kv.key_dim}, values {kv.value_heads} x "
                f"{kv.value_dim} {kv.dtype}, {format_bytes(kv.bytes_per_token)} a token"
            )
        reads = ", ".join(task.reads)
        yield from _wrap(f"      {reads} -> {_names(body, task.writes)}", " " * 8)


def _task_row(task: Task, body: Body, flops: Flops | None) -> tuple[str, ...]:
    name = task.name if task.name.startswith(task.role) else f"{task.name} ({task.role})"
    size = sum(weight.nbytes for weight in task.weights)
    if task.experts is not None:
        size += task.experts.count * task.experts.nbytes
    work = str(flops(task, body) or "-") if flops else ""
    return name, ", ".join(task.axes), format_bytes(size) if size else "-", work


def _experts(experts: Experts) -> str:
    parts = ", ".join(f"{t.part} {list(t.shape)}" for t in experts.tensors)
    return (
        f"{experts.count} experts, top {experts.top_k}, {experts.hidden} -> "
        f"{experts.intermediate} -> {experts.hidden}, {format_bytes(experts.nbytes)} each: {parts}"
    )


def _names(body: Body, names: Iterable[str]) -> str:
    """Values with their shapes; neighbours of one shape share it."""
    groups: list[tuple[list[str], str]] = []
    for name in names:
        shape = _shape(body.values[name].shape)
        if groups and groups[-1][1] == shape:
            groups[-1][0].append(name)
        else:
            groups.append(([name], shape))
    return ", ".join(f"{', '.join(group)} {shape}" for group, shape in groups)


def _shape(shape: Sequence[Expr]) -> str:
    return f"[{', '.join(map(str, shape))}]".replace(" ", _HARD_SPACE)


def print_program(program: Program) -> str:
    """The program: what every engine does in a step, its rings, and what the ram tier holds."""
    lines: list[str] = []
    for names, instructions in _same_lists(program):
        lines += [f"{', '.join(names)}:", *_instructions(instructions, 1, "", ""), ""]
    lines += _segment_lines(program.segments)
    lines += ["", *_ring_lines(program)]
    resident = _resident_text(program)
    lines += _wrap(f"resident: {resident}", "  ")
    rings = {f"ring {ring.name}": ring.slots * ring.slot_bytes for ring in program.rings}
    lines += ["", *_memory_lines({**rings, **program.reserved}, program.capacity.get("ram"))]
    return "\n".join(lines)


def _same_lists(program: Program) -> Iterator[tuple[list[str], tuple[Instruction, ...]]]:
    """Engines with equal lists together."""
    groups: dict[tuple[Instruction, ...], list[str]] = {}
    for name, instructions in program.engines.items():
        groups.setdefault(instructions, []).append(name)
    for instructions, names in groups.items():
        yield names, instructions


def _instructions(
    items: Iterable[Instruction], depth: int, layer: str, chunk: str
) -> Iterator[str]:
    for item in items:
        if not isinstance(item, Loop):
            yield "  " * depth + instruction_text(item, layer, chunk)
            continue
        by = f" by {item.step}" if item.step > 1 else ""
        yield "  " * depth + f"for {item.variable} in {item.start}..{item.stop - 1}{by}:"
        inner = {"layer": layer, "chunk": chunk} | {item.variable: item.variable}
        yield from _instructions(item.body, depth + 1, inner["layer"], inner["chunk"])


def _segment_lines(segments: Iterable[Segment]) -> Iterator[str]:
    yield "segments:"
    for segment in segments:
        yield from _wrap(
            f"  {segment.name} over {segment.over}: {', '.join(segment.tasks)}", "      "
        )
        reads, writes = (", ".join(names) for names in (segment.reads, segment.writes))
        yield from _wrap(f"    {reads} -> {writes}", "      ")


def _ring_lines(program: Program) -> list[str]:
    if not program.rings:
        return ["rings: none, nothing is streamed"]
    rows: Rows = [("ring", "buffers", "bytes each", "freed by")]
    for ring in program.rings:
        workers = f"{ring.consumers} worker{'s' if ring.consumers > 1 else ''}"
        rows.append((ring.name, str(ring.slots), format_bytes(ring.slot_bytes), workers))
    return table(rows, right=(1, 2), indent=0)


def _resident_text(program: Program) -> str:
    """Units in ram, layers of equal kind and count together."""
    groups: dict[tuple[str, int], list[int]] = {}
    for kind, layer, count in program.resident:
        groups.setdefault((kind, count), []).append(layer)
    parts = []
    for (kind, count), layers in groups.items():
        if layers == [-1]:
            parts.append(kind)
        else:
            many = f"{count} experts" if kind == "experts" else kind
            parts.append(f"{many} of layers {ranges(layers)}")
    return "; ".join(parts) or "nothing"


def _memory_lines(parts: Mapping[str, int], capacity: int | None, tier: str = "ram") -> list[str]:
    """Bytes by what they hold, with bars, and their sum."""
    total = sum(parts.values())
    of = f" of {format_bytes(capacity)}" if capacity is not None else ""
    most = max(parts.values(), default=0)
    rows = [(name, format_bytes(n), _bar(n, most)) for name, n in parts.items() if n]
    return [f"{tier}: {format_bytes(total)}{of}", *(table(rows, right=(1,)) if rows else [])]


def _bar(value: float, most: float) -> str:
    return "#" * max(1, round(BAR * value / most)) if value > 0 else ""


def print_plan(plan: Plan) -> str:
    """The plan: what for, the moves, what it is predicted to take, the bound, the candidates."""
    model, machine = plan.model, plan.machine
    budget = ", ".join(f"{tier} {format_bytes(size)}" for tier, size in plan.budget.items())
    kind = f"{model.get('architecture', 'unknown')}, {model.get('num_layers', '?')} layers"
    rows: Rows = [
        ("plan", plan.digest()[:12]),
        ("model", f"{model.get('model_type', 'unknown')} ({kind}), graph {plan.graph[:12]}"),
        ("machine", f"{machine.name}, {machine.workers} workers"),
        ("budget", budget),
        ("workload", _workload(plan.workload)),
        *(("routing", text) for text in _routing_lines(plan)),
        ("policy", f"{plan.policy}: {_knobs(plan.knobs)}"),
    ]
    if plan.tuning is not None:
        rows.append(("tuning", f"{plan.tuning.outcome}: {plan.tuning.reason}"))
    lines = [part for line in table(rows, indent=0) for part in _wrap(line, " " * 10)]
    lines += ["", "moves"]
    lines += [part for move in plan.moves for part in _wrap(f"  {move_text(move)}", " " * 6)]
    lines += ["", *_prediction_lines(plan), "", *_bound_lines(plan)]
    lines += [*_certificate_lines(plan), *kernel_lines(plan)]
    return "\n".join([*lines, "", *_candidate_lines(plan)])


def _workload(work: Workload) -> str:
    shortest = work.lengths[-1][0]
    lengths = f"{shortest}-{work.longest}" if shortest < work.longest else str(shortest)
    return (
        f"{work.prompts} prompts of {lengths} tokens ({work.prompt_tokens} together), "
        f"{work.new_tokens} new tokens each"
    )


def _routing_lines(plan: Plan) -> Iterator[str]:
    """For every trace, the share of its choices that fall on experts which a placement put in each
    tier."""
    for trace in plan.workload.routing:
        every, found = sum(map(sum, trace.loads)), dict.fromkeys(("hbm", "ram"), 0)
        for move in plan.moves:
            if isinstance(move, Place) and move.which and move.tier in found:
                found[move.tier] += sum(trace.loads[move.layers[0]][e] for e in move.which)
        shares = [f"{count / every:.1%} in {tier}" for tier, count in found.items() if count]
        where = f"expected hits {', '.join(shares)}" if shares else "no expert placed by it"
        yield f"{trace.name} ({trace.digest[:12]}, {trace.tokens} tokens): {where}"


def _knobs(knobs: Mapping[str, int | bool]) -> str:
    return " ".join(f"{name}={value}" for name, value in knobs.items()) or "no knobs"


def _prediction_lines(plan: Plan) -> Iterator[str]:
    found = plan.prediction
    setup = format_duration(found.setup_seconds)
    rows: Rows = [
        ("time", f"{format_duration(found.seconds)} ({setup} of it set-up, {found.steps} steps)"),
        ("tokens/s", f"{found.tokens_per_second:.1f} ({found.tokens} tokens)"),
        ("disk reads", format_bytes(found.disk_bytes)),
        *((name, format_bytes(n)) for name, n in found.link_bytes.items()),
    ]
    yield "prediction"
    yield from table(rows)
    for tier, parts in {"ram": found.bytes, **found.tiers}.items():
        memory = _memory_lines(parts, plan.budget.get(tier), tier)
        yield from (f"  {line}" for line in memory)
    most = max(found.classes.values(), default=0.0)
    if most:
        yield "  busy seconds, all engines"
        busy = sorted(found.classes.items(), key=lambda item: -item[1])
        cells = [(name, format_duration(s), _bar(s, most)) for name, s in busy]
        yield from table(cells, right=(1,), indent=4)


def _bound_lines(plan: Plan) -> Iterator[str]:
    least = plan.bound
    share = least.seconds / plan.prediction.seconds
    yield (
        f"bound: {format_duration(least.seconds)}, set by {least.resource}; the prediction reaches "
        f"{share:.0%} of it"
    )
    rows = [(name, format_duration(s), _bar(s, least.seconds)) for name, s in least.parts.items()]
    yield from table(rows, right=(1,)) if rows else ()


def _certificate_lines(plan: Plan) -> Iterator[str]:
    """What the solvers proved."""
    if plan.certificates:
        yield from ("", "proved")
        yield from table(
            [
                (
                    c.name,
                    _proved(c, c.objective),
                    f"bound {_proved(c, c.bound)}",
                    f"{c.status}, gap {c.gap:.1%}",
                )
                for c in plan.certificates
            ],
            right=(1, 2),
        )


def _proved(certificate: Certificate, value: float) -> str:
    """An objective or a bound in the unit of its certificate."""
    return format_bytes(round(value)) if certificate.unit else format_duration(value)


def _candidate_lines(plan: Plan) -> Iterator[str]:
    """What was considered, fastest first, the chosen one marked."""
    yield f"candidates ({len(plan.candidates)})"
    ordered = sorted(plan.candidates, key=lambda c: (c.seconds is None, c.seconds or 0.0))
    rows: Rows = [("", "policy", "predicted", "knobs")]
    for candidate in ordered:
        chosen = (candidate.policy, candidate.knobs) == (plan.policy, plan.knobs)
        rows.append(("*" if chosen else "", *_candidate_row(candidate)))
    indent = sum(max(len(row[i]) for row in rows) + 2 for i in range(3)) + 1
    for line in table(rows, right=(2,), indent=1):
        yield from _wrap(line, " " * indent)


def _candidate_row(candidate: Candidate) -> tuple[str, str, str]:
    if candidate.seconds is None:
        return candidate.policy, "refused", candidate.refused
    return candidate.policy, format_duration(candidate.seconds), _knobs(candidate.knobs)


def _wrap(text: str, indent: str) -> list[str]:
    """A line in at most ``WIDTH`` columns; what does not fit goes on, indented."""
    lines = textwrap.wrap(
        text,
        WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_HARD_SPACE, " ") for line in lines]
