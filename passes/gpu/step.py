"""GPU step: `predictor, a step's work -> the operations of every layer, and every engine's queue`.

Loop bodies are of one kind of layer and repeat for ever; a step has its layers in the model's
order, whatever their kinds, something before the first and something after the last.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dovetail.ir.errors import VerifyError
from dovetail.ir.gpu_program import GpuOp, Instance, Ref
from dovetail.ir.placement import embed_weights
from dovetail.ir.task_graph import ITEMSIZE
from dovetail.passes.gpu.cost import Shape
from dovetail.passes.gpu.memory import unit_sizes
from dovetail.passes.gpu.predict import GpuPredictor, alike_layers
from dovetail.passes.loop.body import TICK, Loop, StepWork, loop_body
from dovetail.solvers.loop_problem import Hold

CPU_READS = "cpu_experts"
"""The pool of what the disk brings for the CPU's experts, which no loop body holds."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A body whose operations belong to the layer that they serve: weights that are copied a layer
    ahead are the next layer's. ``carry`` has the operations that begin a layer with those of
    the layer before that they wait for."""

    ops: tuple[GpuOp, ...]
    seconds: Mapping[str, float]
    order: Mapping[str, tuple[tuple[str, int], ...]]
    carry: Mapping[str, tuple[Ref, ...]]

    @property
    def ends(self) -> tuple[Ref, ...]:
        """All that the next layer waits for."""
        return tuple(dict.fromkeys(ref for refs in self.carry.values() for ref in refs))


NOTHING = Kind((), {}, {}, {})
"""A layer that nothing passes in a step."""


@dataclass(frozen=True, slots=True)
class GpuStep:
    """All operations of a step, ``layers`` of them from -1 on, with references that are there.

    ``queues`` has every engine's operations in order, each with its turn: the layer that is
    computed then; ``seconds`` the predicted duration of each."""

    work: StepWork
    layers: tuple[tuple[GpuOp, ...], ...]
    queues: Mapping[str, tuple[tuple[int, Instance], ...]]
    seconds: Mapping[Instance, float]


def gpu_step(predictor: GpuPredictor, work: StepWork, group: int = 0) -> GpuStep:
    """The step that does ``work``; in layered prefill, that in which prompts pass the layers of
    ``group`` and the other layers only decode. Raises VerifyError for a head or an embedding that
    is neither in hbm nor in ram."""
    kinds: list[Kind] = [_prologue(predictor, work)]
    of_layer: dict[int, Kind] = {}
    for layers in alike_layers(predictor.layout):
        parts: dict[StepWork, list[int]] = {}
        for layer in layers:
            parts.setdefault(work_of(predictor, work, group, layer), []).append(layer)
        for does, part in parts.items():
            if does.decode or does.prefill:
                loop = loop_body(predictor.layout, predictor.costs, does, part[0], fine=True)
                of_layer |= dict.fromkeys(part, _kind(loop))
            else:
                of_layer |= dict.fromkeys(part, NOTHING)
    kinds += [of_layer[layer] for layer in sorted(of_layer)]
    kinds.append(_epilogue(predictor, work))
    layers_ops = tuple(
        tuple(_placed(op, kinds, number) for op in kind.ops) for number, kind in enumerate(kinds)
    )
    seconds = {
        (name, number - 1): value
        for number, kind in enumerate(kinds)
        for name, value in kind.seconds.items()
    }
    return GpuStep(work, layers_ops, _queues(kinds), seconds)


def work_of(predictor: GpuPredictor, work: StepWork, group: int, layer: int) -> StepWork:
    """What a step does in ``layer``."""
    if work.groups:
        return StepWork.of(tuple(each for each in work.groups if each.takes(layer)))
    return work if layer in layers_of(predictor, work, group) else StepWork(work.decode, None)


def layers_of(predictor: GpuPredictor, work: StepWork, group: int) -> range:
    """The layers that a step's prompts pass: all of them, but in layered prefill."""
    cuts = predictor.layout.admission.cuts
    if work.layer_groups > 1 and work.decode and cuts:
        return range(cuts[group], cuts[group + 1])
    return range(len(predictor.layout.graph.layers))


def _kind(loop: Loop) -> Kind:
    """A loop body, retimed: an operation counts as of the layer that it serves (Leiserson and Saxe,
    Retiming synchronous circuitry, 1991)."""
    lead = _leads(loop.problem.holds)
    readers: dict[str, list[Ref]] = {}
    for hold in loop.problem.holds:
        for name, distance in hold.last:
            back = distance + lead.get(name, 0) - lead.get(hold.first, 0)
            readers.setdefault(name, []).append((hold.first, back))
    pools = {hold.first: hold.pool for hold in loop.problem.holds}
    ops: list[GpuOp] = []
    carry: dict[str, tuple[Ref, ...]] = {}
    for op in loop.problem.ops:
        refs = [(u, d + lead.get(op.name, 0) - lead.get(u, 0)) for u, d in op.after]
        ordered = _is_barrier(op.name)
        after = [ref for ref in refs if ordered or _is_barrier(ref[0])]
        reads = dict.fromkeys([*(r for r in refs if r not in after), *readers.get(op.name, ())])
        carried = tuple(ref for ref in refs if ref[1] > 0)
        if carried and not lead.get(op.name):
            carry[op.name] = carried
        takes = pools.get(op.name, CPU_READS if op.engine == "disk" else "")
        nbytes = round(loop.sizes.get(op.name, 0.0))
        work = loop.classes[op.name]
        ops.append(GpuOp(op.name, op.engine, work, tuple(reads), tuple(after), takes, nbytes))
    return Kind(
        ops=tuple(ops),
        seconds={op.name: op.duration * TICK for op in loop.problem.ops},
        order={
            engine: tuple((name, shift + lead.get(name, 0)) for name, shift in items)
            for engine, items in loop.order.items()
        },
        carry=carry,
    )


def _leads(holds: tuple[Hold, ...]) -> dict[str, int]:
    """How many layers ahead of its readers each operation that brings something is."""
    lead: dict[str, int] = {}
    for hold in holds:
        if hold.pool != "staging":
            lead[hold.first] = min(distance for _, distance in hold.last)
    for hold in holds:
        if hold.pool == "staging":
            lead[hold.first] = max(lead.get(name, 0) for name, _ in hold.last)
    return lead


def _is_barrier(name: str) -> bool:
    return name.startswith("barrier")


def _placed(op: GpuOp, kinds: list[Kind], number: int) -> GpuOp:
    """An operation whose references name what the layers around it have."""
    reads = [ref for one in op.reads for ref in _there(op, one, kinds, number)]
    after = [ref for one in op.after for ref in _there(op, one, kinds, number)]
    return replace(op, reads=tuple(dict.fromkeys(reads)), after=tuple(dict.fromkeys(after)))


def _there(op: GpuOp, ref: Ref, kinds: list[Kind], number: int) -> list[Ref]:
    name, back = ref
    if not 0 <= number - back < len(kinds):
        return []
    own, other = kinds[number], kinds[number - back]
    if other is own or not back:
        return [ref]
    if ref in own.carry.get(op.name, ()):
        # A layer of another kind ends with other operations.
        ends = other.carry.get(op.name, other.ends)
        return [end for end in ends if _is_barrier(end[0]) == _is_barrier(name)] or list(ends)
    return [ref] if any(each.name == name for each in other.ops) else []


def _queues(kinds: list[Kind]) -> dict[str, tuple[tuple[int, Instance], ...]]:
    """Every engine's operations: by turn, and within one as the layer's kind orders them."""
    found: dict[str, list[tuple[int, int, int, str]]] = {}
    for number, kind in enumerate(kinds):
        layer = number - 1
        for engine, items in kind.order.items():
            for place, (name, shift) in enumerate(items):
                found.setdefault(engine, []).append((layer - shift, place, layer, name))
    return {
        engine: tuple((turn, (name, layer)) for turn, _, layer, name in sorted(items))
        for engine, items in found.items()
    }


def _prologue(predictor: GpuPredictor, work: StepWork) -> Kind:
    """The tokens' embeddings, their rows gathered by the host where hbm does not hold them."""
    layout, graph = predictor.layout, predictor.layout.graph
    assert layout.device is not None
    embed = GpuOp("embed", "gpu0", "run:embed", ())
    if layout.device.embed or not embed_weights(graph):
        return _straight([embed], {"embed": 0.0})
    if not layout.embed_resident:
        raise VerifyError(_nowhere("the embedding"))
    nbytes = work.tokens * graph.hidden * ITEMSIZE[graph.dtype]
    rows = GpuOp("embed_rows", "cpu", "run:embed", ())
    copy = GpuOp("copy_rows", "h2d", "copy:hidden", (("embed_rows", 0),), nbytes=nbytes)
    embed = replace(embed, reads=(("copy_rows", 0),))
    seconds = nbytes / predictor.costs.gpu.h2d.peak
    return _straight([rows, copy, embed], {"copy_rows": seconds})


def _epilogue(predictor: GpuPredictor, work: StepWork) -> Kind:
    """The head over the last hidden states, copied first where hbm does not hold it."""
    layout, costs = predictor.layout, predictor.costs
    assert layout.device is not None
    shape = Shape(max(1, -(-work.seqs // costs.gpu.count)), 1, 0)
    parts = costs.group(layout.graph.epilogue, shape)
    seconds = {"head": parts.before + parts.after + parts.tail}
    head = GpuOp("head", "gpu0", "run:head", (("head", 1),))
    if layout.device.head:
        return _straight([head], seconds)
    if not layout.head_resident:
        raise VerifyError(_nowhere("the head"))
    nbytes = unit_sizes(layout.graph).head
    copy = GpuOp("copy_head", "h2d", "copy:head", (), (), "head", nbytes)
    seconds["copy_head"] = nbytes / costs.gpu.h2d.peak
    return _straight([copy, replace(head, reads=(("head", 1), ("copy_head", 0)))], seconds)


def _nowhere(what: str) -> str:
    return f"{what} is on disk: a program for a GPU wants it in hbm or in ram; add a place move"


def _straight(ops: list[GpuOp], seconds: Mapping[str, float]) -> Kind:
    """Operations one after the other, of which the last ends what they are."""
    last = ops[-1].name
    order: dict[str, tuple[tuple[str, int], ...]] = {}
    for op in ops:
        order[op.engine] = (*order.get(op.engine, ()), (op.name, 0))
    times = {op.name: seconds.get(op.name, 0.0) for op in ops}
    return Kind(tuple(ops), times, order, {last: ((last, 1),)})
