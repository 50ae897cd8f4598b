"""Loop body: `layout, machine, a step's sequences -> what every engine does for one layer`.

On a machine with a GPU a step is a loop over layers that is pipelined over engines: ``gpu0``
computes, ``h2d`` and ``d2h`` copy between ram and hbm, ``disk`` reads into ram, ``cpu`` computes
what is assigned to it. A body is a ``LoopProblem`` of the overlap solver, in ticks, with the order
in which each engine takes its operations: the policy's order here, the solver's if it finds a
better one.
"""

from collections.abc import Sequence

from dovetail.ir.placement import experts_of
from dovetail.passes.apply_moves import Layout
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.loop.builder import After, Builder
from dovetail.passes.loop.experts import experts_ends, tail_ends
from dovetail.passes.loop.groups import Bundle, bundle, dense, shapes
from dovetail.passes.loop.work import TICK, Loop, Order, StepWork

__all__ = ["TICK", "Loop", "Order", "StepWork", "loop_body"]


def loop_body(
    layout: Layout, costs: GpuCosts, work: StepWork, layer: int, *, fine: bool = False
) -> Loop:
    """The loop body of layer ``layer`` in a step that does ``work``; a ``fine`` one has every group
    and load by itself."""
    b = Builder(layout, costs, work, layer, fine)
    weights = dense(b)
    bundles: list[Bundle] = []
    made: list[list[str]] = []
    for i, (kind, shape) in enumerate(shapes(b)):
        before = len(b.ops)
        bundles.append(bundle(b, i, kind, shape, weights))
        made.append([op.name for op in b.ops[before:]])
    experts = experts_of(layout.graph, layer)
    ends = experts_ends(b, experts, bundles) if experts else tail_ends(b, bundles)
    if weights:
        readers = [*(each.last for each in bundles), *(name for some in ends for name in some)]
        b.hold("dense", weights[0], readers, int(layout.barrier))
    if layout.barrier:
        _barriers(b, bundles, ends)
    else:
        _carry(b, bundles, ends)
        b.turns = _turns(bundles, ends)
    b.contend()
    if not layout.barrier:
        _chain_alike(b, made, ends)
    return Loop(b.problem(), b.order(), dict(b.classes), dict(b.nbytes), dict(b.sizes))


def _carry(b: Builder, bundles: Sequence[Bundle], ends: list[list[str]]) -> None:
    """The next layer's groups begin when this layer has their hidden states."""
    own = len(ends) == len(bundles)
    for i, each in enumerate(bundles):
        before = ends[i] if own else [name for some in ends for name in some]
        for start in each.starts:
            b.after(start, [(name, 1) for name in before])


def _chain_alike(b: Builder, made: Sequence[list[str]], ends: list[list[str]]) -> None:
    """Bundles whose operations take equally long may as well go first in, first out, in every one
    of their stages: whichever way a schedule has them, what starts first at a stage can be called
    the first bundle there, since it is also what ends there first."""
    table = {op.name: op for op in b.ops}
    own = len(ends) == len(made)
    lines: dict[tuple[tuple[str, int], ...], list[list[str]]] = {}
    for i, names in enumerate(made):
        last = ends[i] if own else []
        line = [*names, *(name for name in last if sum(name in some for some in ends) == 1)]
        key = tuple((table[name].engine, table[name].duration) for name in line)
        lines.setdefault(key, []).append(line)
    for found in lines.values():
        for stage in zip(*found, strict=True):
            b.chain(stage)


def _turns(bundles: Sequence[Bundle], ends: list[list[str]]) -> list[tuple[str, int]]:
    """The GPU's order where attention is partly elsewhere: it begins a bundle before it ends the
    one before, so that there is something to do meanwhile (CGOPipe's order, arXiv 2411.11217;
    NanoFlow's nano-batches, arXiv 2408.12757). Where a bundle ends a layer by itself, the next
    layer's first ones begin beside the last ones of this."""
    split = [bool(each.follow) for each in bundles]
    if not any(split):
        return []
    count = len(bundles)
    # What the CPU does for all bundles ends the layer for each of them.
    own = len(ends) == count > 1 and not set(ends[0]) & set(ends[1])
    turns: list[tuple[str, int]] = []
    if not own:
        turns += [(each.starts[0], 0) for each, two in zip(bundles[:2], split, strict=False) if two]
    for i, each in enumerate(bundles):
        turns += [(name, 0) for name in each.follow or each.starts[:1]]
        if own:
            turns += [(name, 0) for name in ends[i]]
        lap, following = divmod(i + 2, count)
        if split[following] and (own or not lap):
            turns.append((bundles[following].starts[0], lap))
    return turns


def _barriers(b: Builder, bundles: Sequence[Bundle], ends: list[list[str]]) -> None:
    """Two stages of a layer for every bundle, first the attention of each and then the experts of
    each, as in FlexGen, whose attention and feed-forward blocks are layers of their own
    (``sep_layer``): nothing of a stage begins before all of the one before has ended.

    Beside the first bundle's attention the layer's experts come, beside its experts the next
    layer's other weights, and beside each attention the next bundle's KV."""
    count = 2 * len(bundles)
    stage = _stages(b, bundles, ends)
    for name, at in stage.items():
        b.stages[name] = at
    copies = {name for each in bundles for name in (each.kv_in, each.kv_more, each.kv_out)}
    begins = copies | {name for each in bundles for name in each.starts}
    begins |= {name for some in ends for name in some}
    begins |= {op.name for op in b.ops if op.engine == "disk" or op.name.startswith("copy_")}
    for number in range(count):
        needs: list[After] = [(name, 0) for name, at in stage.items() if at == number]
        barrier = b.op(f"barrier{number}", "gpu0", 0.0, needs, "run:other")
        b.stages[barrier] = number
    for name in begins:
        if name:
            before, lap = divmod(stage[name] - 1, count)
            b.after(name, [(f"barrier{lap}", -before)])


def _stages(b: Builder, bundles: Sequence[Bundle], ends: list[list[str]]) -> dict[str, int]:
    """The stage of every operation: those of a bundle in its own, its KV in the stage before, and
    what it stores in the stage after."""
    count = len(bundles)
    found = {op.name: count if op.name.endswith("_dense") else 0 for op in b.ops}
    named = {each.kv_in: i for i, each in enumerate(bundles)}
    named |= {each.kv_out: i for i, each in enumerate(bundles)}
    at = -1
    starts = {each.starts[0]: i for i, each in enumerate(bundles)}
    lasts = {each.last for each in bundles}
    # A bundle's operations follow each other from its first to its last.
    for op in b.ops:
        at = starts.get(op.name, at)
        if at >= 0 and op.name not in named:
            found[op.name] = at
        if op.name in lasts:
            at = -1
    for i, each in enumerate(bundles):
        found |= dict.fromkeys(ends[i if len(ends) == count else 0], count + i)
        if each.kv_in:
            found[each.kv_in] = (i - 1) % (2 * count)
        if each.kv_more:
            found[each.kv_more] = i
        if each.kv_out:
            found[each.kv_out] = i + 1
    return found
