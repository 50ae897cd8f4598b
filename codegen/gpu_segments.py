"""Emit what a GPU executor computes: `task graph -> Python source`, a few functions for each body.

The functions are those that a CPU executor has, cut at the attention too, since that may run on
another stream or on the CPU: ``before`` it, the ``core`` (the KV store's update and all that reads
it, up to the attention itself), ``after`` it up to the experts, and the ``tail`` behind them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dovetail.codegen.segments import emit_expert, emit_segment
from dovetail.ir.errors import VerifyError
from dovetail.ir.program import Segment
from dovetail.ir.task_graph import Body, Op, Task, TaskGraph

PARTS = ("before", "core", "after", "tail")


def emit_gpu_segments(graph: TaskGraph) -> str:
    """The source: for every body ``NAME_before``, ``NAME_core``, ``NAME_after``, ``NAME_tail`` and
    ``NAME_expert``, those that it has; ``prologue`` and ``epilogue``."""
    lines = ["import math", "", "import torch", "from torch.nn import functional as F", ""]
    lines += ["aten = torch.ops.aten", "linear = F.linear"]
    bodies = [gpu_parts(body) for body in graph.bodies]
    lines += ["", "# What the core reads, and the weights of core and tail, by body.", "CORES = {"]
    lines += [f"    {cut.name!r}: {_outside(cut, parts, 'core')}," for cut, parts in bodies]
    lines += ["}", "TAILS = {"]
    lines += [f"    {cut.name!r}: {_outside(cut, parts, 'tail')[1]}," for cut, parts in bodies]
    lines += ["}", "", "", *emit_segment(graph, graph.prologue, _whole(graph.prologue, graph))]
    for (cut, parts), body in zip(bodies, graph.bodies, strict=True):
        for part in parts:
            lines += ["", "", *emit_segment(graph, cut, part)]
        if body.experts is not None:
            name = f"{body.name}_expert"
            segment = Segment(name, body.name, (body.experts.name,), (), (), "experts")
            lines += ["", "", *emit_expert(body, segment)]
    lines += ["", "", *emit_segment(graph, graph.epilogue, _whole(graph.epilogue, graph))]
    # Captured on the CPU, a model names that as the place of what it makes.
    text = "\n".join(lines).replace("device='cpu'", "device=m.device")
    return text + "\n"


def _whole(body: Body, graph: TaskGraph) -> Segment:
    """All of a body that layers do not repeat."""
    written = {name for task in body.tasks for name in task.writes}
    reads = dict.fromkeys(n for t in body.tasks for n in t.reads if n not in written)
    writes = [n for n in written if n in graph.shared or n in body.outputs]
    over = "seqs" if body is graph.epilogue else "groups"
    names = tuple(task.name for task in body.tasks)
    return Segment(body.name, body.name, names, tuple(reads), tuple(sorted(writes)), over)  # type: ignore[arg-type]


def _outside(
    cut: Body, parts: Sequence[Segment], part: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The values and the weights that a part reads."""
    segment = next((s for s in parts if s.name.endswith(part)), None)
    if segment is None:
        return (), ()
    weights = (w.fqn for t in cut.tasks if t.name in segment.tasks for w in t.weights)
    return segment.reads, tuple(dict.fromkeys(weights))


def gpu_parts(body: Body) -> tuple[Body, tuple[Segment, ...]]:
    """A body with its tasks cut at the attention, and its segments. Raises VerifyError where the
    experts' inputs are not made behind the attention."""
    tasks = {part: _tasks(body, part, ops) for part, ops in _ops_by_part(body).items()}
    experts = (body.experts,) if body.experts is not None else ()
    ordered = (*tasks["before"], *tasks["core"], *tasks["after"], *experts, *tasks["tail"])
    cut = replace(body, tasks=ordered)
    found = []
    for part in PARTS:
        if tasks[part]:
            found.append(_segment(cut, part, tasks[part]))
    if body.experts is not None:
        after = next((s for s in found if s.name.endswith("after")), None)
        if after is None or not set(body.experts.reads) <= set(after.writes):
            raise VerifyError(
                f"{body.name}: the experts read {', '.join(body.experts.reads)}, which are not all "
                "made between the attention and the experts; the GPU executor wants them there"
            )
    return cut, tuple(found)


def _ops_by_part(body: Body) -> dict[str, list[tuple[Task, Op]]]:
    """Every operator with its task, by part."""
    every = [(task, op) for task in body.tasks if task.experts is None for op in task.ops]
    at = body.tasks.index(body.experts) if body.experts is not None else len(body.tasks)
    behind = {task.name for task in body.tasks[at:]}
    ends = [i for i, (_, op) in enumerate(every) if op.target == "dovetail.attention"]
    last = max(ends, default=-1)
    stored: set[str] = set()
    found: dict[str, list[tuple[Task, Op]]] = {part: [] for part in PARTS}
    for index, (task, op) in enumerate(every):
        if task.name in behind:
            part = "tail"
        elif index > last:
            part = "after"
        elif op.target == "dovetail.kv_update" or stored & set(op.uses()):
            part = "core"
            stored |= set(op.outs)
        else:
            part = "before"
        found[part].append((task, op))
    return found


def _tasks(body: Body, part: str, ops: Sequence[tuple[Task, Op]]) -> list[Task]:
    """The tasks of a part: its operators by the task that they come from."""
    by_task: dict[str, list[Op]] = {}
    for task, op in ops:
        by_task.setdefault(task.name, []).append(op)
    owners = {task.name: task for task in body.tasks}
    tasks = []
    for name, mine in by_task.items():
        owner, written = owners[name], {out for op in mine for out in op.outs}
        used = {use for op in mine for use in op.uses()}
        tasks.append(
            replace(
                owner,
                name=f"{name}_{part}",
                ops=tuple(mine),
                reads=tuple(n for n in _values(body, mine) if n not in written),
                writes=tuple(sorted(written)),
                weights=tuple(w for w in owner.weights if w.fqn in used),
            )
        )
    return tasks


def _values(body: Body, ops: Iterable[Op]) -> Iterable[str]:
    """The values that operators read, each once."""
    weights = {w.fqn for task in body.tasks for w in task.weights}
    made = {out for task in body.tasks for op in task.ops for out in op.outs}
    known = made | set(body.inputs)
    return dict.fromkeys(n for op in ops for n in op.uses() if n in known and n not in weights)


def _segment(body: Body, part: str, tasks: Sequence[Task]) -> Segment:
    mine = {task.name for task in tasks}
    written = {name for task in tasks for name in task.writes}
    reads = dict.fromkeys(n for task in tasks for n in task.reads if n not in written)
    needed = {n for task in body.tasks if task.name not in mine for n in task.reads}
    writes = sorted(written & (needed | set(body.outputs)))
    names = tuple(task.name for task in tasks)
    return Segment(f"{body.name}_{part}", body.name, names, tuple(reads), tuple(writes), "groups")
