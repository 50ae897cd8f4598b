"""Replay moves on a task graph: `graph, moves -> layout`.

The layout is the schedule with every decision resolved; lowering, costs and memory read it. A move
that does not fit the graph raises VerifyError with what was found and what is allowed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from dovetail.ir.batching import Admission
from dovetail.ir.errors import VerifyError
from dovetail.ir.gemm_tiles import LADDERS
from dovetail.ir.moves import (
    FORMATS,
    Accumulate,
    Assign,
    Bucket,
    Dispatch,
    ExpertFormat,
    Fuse,
    Move,
    Overlap,
    Pack,
    Pipeline,
    Place,
    Precision,
    Prefetch,
    Reorder,
    Split,
)
from dovetail.ir.placement import experts_of
from dovetail.ir.program import Settings
from dovetail.ir.task_graph import Body, Role, TaskGraph
from dovetail.passes import device as gpu
from dovetail.passes.expert_precision import with_precision

DEFAULT_BLOCK = 8 << 20
SPLITS = ("attention/seqs", "attention/tokens", "experts/experts", "experts/tokens", "head/seqs")
"""The axes along which a schedule may split a role."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A schedule with every decision resolved. ``experts_resident[i]`` of layer i's experts are in
    ram, ``chunk`` experts make one streamed load; ``rows`` and ``attn_tokens`` bound an attention
    group, ``expert_rows`` and ``head_rows`` the rows of one expert GEMM and of one head GEMM;
    ``buckets`` are the tile sizes of 16-bit products. ``accumulated`` experts run once over all
    groups' tokens, ``paged`` ones are copied page by page; with a ``barrier`` engines wait for each
    other after every group. Experts in turn with at most ``pack`` rows together run as one, their
    products ``grouped`` in one call.
    ``ram_which[i]`` names the experts in ram where a placement chose them.
    Without ``device`` the CPU computes. ``graph`` has experts in ``precision``, "" for the
    model's own."""

    graph: TaskGraph
    dispatch: Dispatch
    embed_resident: bool
    head_resident: bool
    dense_resident: tuple[bool, ...]
    experts_resident: tuple[int, ...]
    chunk: int
    rows: int
    attn_tokens: int
    expert_rows: int
    head_rows: int
    prefetch: dict[str, Prefetch]
    workers: int
    threads: int
    readers: int
    resident_first: bool
    buckets: tuple[int, ...]
    accumulated: bool
    paged: bool
    barrier: bool
    ram_which: tuple[tuple[int, ...], ...]
    pipelines: tuple[Pipeline, ...]
    device: gpu.Device | None
    fused: dict[str, tuple[tuple[str, ...], ...]]
    pack: int = 0
    grouped: bool = False
    precision: ExpertFormat | Literal[""] = ""

    def chunks(self, layer: int) -> int:
        """How many streamed loads the layer's experts take."""
        experts = experts_of(self.graph, layer)
        if experts is None:
            return 0
        return (experts.count - self.experts_resident[layer]) // self.chunk

    @property
    def admission(self) -> Admission:
        """How the batcher admits sequences."""
        return Admission(
            seqs=self.dispatch.seqs,
            kv_tokens=self.dispatch.kv_tokens,
            rows=min(self.rows, self.dispatch.seqs),
            attn_tokens=self.attn_tokens,
            prefill_tokens=self.dispatch.prefill_tokens,
            refill=self.dispatch.refill,
            chunk_tokens=self.dispatch.chunk_tokens,
            cuts=self._cuts(),
        )

    def _cuts(self) -> tuple[int, ...]:
        """The layers at which layered prefill cuts the model, in groups as equal as can be."""
        groups, layers = self.dispatch.layer_groups, len(self.graph.layers)
        return tuple(layers * i // groups for i in range(groups + 1)) if groups > 1 else ()

    @property
    def settings(self) -> Settings:
        """What the executor needs beside the program's instructions."""
        tokens = self.dispatch.step_tokens
        return Settings(
            admission=self.admission,
            experts_resident=self.experts_resident,
            chunk=self.chunk,
            expert_rows=min(self.expert_rows, tokens),
            head_rows=min(self.head_rows, self.dispatch.seqs),
            step_tokens=tokens,
            block=max((p.block for p in self.prefetch.values()), default=DEFAULT_BLOCK),
            threads=self.threads,
            buckets=self.buckets,
            pack=min(self.pack, self.expert_rows),
            grouped=self.grouped,
        )


def apply_moves(graph: TaskGraph, moves: Iterable[Move]) -> Layout:
    """The layout that replaying ``moves`` on ``graph`` gives. Without moves everything is on disk,
    nothing is split and one worker computes. Raises VerifyError."""
    moves = tuple(moves)
    precision = _precision(moves)
    if precision is not None:
        graph = with_precision(graph, precision)
    dispatches = [move for move in moves if isinstance(move, Dispatch)]
    if len(dispatches) != 1:
        raise VerifyError(f"a schedule needs exactly one dispatch move, found {len(dispatches)}")
    layers = len(graph.layers)
    unlimited = 1 << 30
    layout = Layout(
        graph=graph,
        dispatch=dispatches[0],
        embed_resident=False,
        head_resident=False,
        dense_resident=(False,) * layers,
        experts_resident=(0,) * layers,
        chunk=1,
        rows=unlimited,
        attn_tokens=unlimited,
        expert_rows=unlimited,
        head_rows=unlimited,
        prefetch={},
        workers=1,
        threads=1,
        readers=1,
        resident_first=False,
        buckets=LADDERS[0],
        accumulated=False,
        paged=False,
        barrier=False,
        ram_which=((),) * layers,
        pipelines=(),
        device=None,
        fused={body.name: tuple((t.name,) for t in body.tasks) for body in _bodies(graph)},
        precision=precision or "",
    )
    for move in moves:
        layout = _apply(layout, move)
    _check(layout)
    return layout


def _precision(moves: tuple[Move, ...]) -> ExpertFormat | None:
    """The format that the moves ask for, first of all."""
    asked = [at for at, move in enumerate(moves) if isinstance(move, Precision)]
    if not asked:
        return None
    first = moves[0]
    if asked != [0] or not isinstance(first, Precision):
        raise VerifyError(
            f"precision: found it as move {', '.join(str(at + 1) for at in asked)}; it says what "
            "there is to place, so it comes once, and first"
        )
    if first.format not in FORMATS:
        raise VerifyError(f"precision: {first.format!r} is not one of {', '.join(FORMATS)}")
    return first.format


def _apply(layout: Layout, move: Move) -> Layout:
    match move:
        case Precision():
            return layout  # the graph is in it already
        case Dispatch():
            _positive(
                move,
                seqs=move.seqs,
                kv_tokens=move.kv_tokens,
                prefill_tokens=move.prefill_tokens,
                longest=move.longest,
            )
            if move.chunk_tokens < 0:
                raise VerifyError(
                    f"dispatch: chunk_tokens must be >= 0, found {move.chunk_tokens}; 0 leaves "
                    "prompts whole"
                )
            layers = len(layout.graph.layers)
            if not 0 <= move.layer_groups <= layers:
                raise VerifyError(
                    f"dispatch: layer_groups must be from 0 to the {layers} layers, found "
                    f"{move.layer_groups}"
                )
            if move.layer_groups > 1 and move.chunk_tokens:
                raise VerifyError(
                    f"dispatch: found layer_groups={move.layer_groups} with "
                    f"chunk_tokens={move.chunk_tokens}; prompts are cut into pieces or layers into "
                    "groups, not both: leave one out"
                )
            return layout
        case Place():
            return _place(layout, move)
        case Split():
            return _split(layout, move)
        case Accumulate():
            if (move.role, move.axis) != ("experts", "tokens"):
                raise VerifyError(
                    f"accumulate {move.role} along {move.axis}: only experts gain from it, along "
                    "tokens"
                )
            return replace(layout, accumulated=True)
        case Prefetch():
            _positive(move, slots=move.slots, block=move.block)
            return replace(layout, prefetch=layout.prefetch | {move.unit: move})
        case Reorder():
            if move.order == "paged":
                return replace(layout, paged=True)
            if move.order == "barrier":
                _device(layout, move)
                return replace(layout, barrier=True)
            return replace(layout, resident_first=True)
        case Pipeline():
            _device(layout, move)
            if len(move.ops) != len(move.ahead) or any(n < 0 for n in move.ahead):
                raise VerifyError(
                    f"pipeline {move.engine}: needs one ahead >= 0 for every operation"
                )
            return replace(layout, pipelines=(*layout.pipelines, move))
        case Assign(role="all") if layout.precision:
            raise VerifyError(
                f"experts in {layout.precision} on a GPU: its executor has none; leave the "
                "precision move out"
            )
        case Assign(role="all"):
            return replace(layout, device=gpu.empty(layout.graph))
        case Assign():
            return replace(layout, device=gpu.assign(_device(layout, move), move))
        case Overlap():
            _positive(move, workers=move.workers, threads=move.threads, readers=move.readers)
            return replace(layout, workers=move.workers, threads=move.threads, readers=move.readers)
        case Bucket():
            if not move.sizes or list(move.sizes) != sorted(set(move.sizes)) or move.sizes[0] < 1:
                raise VerifyError(
                    f"bucket: sizes must be ascending and positive, found {move.sizes}"
                )
            return replace(layout, buckets=move.sizes)
        case Pack():
            _positive(move, rows=move.rows)
            return replace(layout, pack=move.rows, grouped=move.product == "grouped")
        case Fuse():
            return _fuse(layout, move)


def _place(layout: Layout, move: Place) -> Layout:
    if move.tier == "hbm":
        device = gpu.place(_device(layout, move), layout.graph, move)
        return replace(layout, device=device)
    if move.unit == "kv":
        raise VerifyError(f"place kv in {move.tier}: KV is in ram unless it is placed in hbm")
    in_ram = move.tier == "ram"
    if move.unit == "embed":
        return replace(layout, embed_resident=in_ram)
    if move.unit == "head":
        return replace(layout, head_resident=in_ram)
    layers = len(layout.graph.layers)
    unknown = [layer for layer in move.layers if not 0 <= layer < layers]
    if unknown:
        raise VerifyError(f"place {move.unit}: layer {unknown[0]} is not in 0..{layers - 1}")
    if move.unit == "dense":
        dense = list(layout.dense_resident)
        for layer in move.layers:
            dense[layer] = in_ram
        return replace(layout, dense_resident=tuple(dense))
    if move.which and layout.device is None:
        raise VerifyError(
            f"place experts: found which={move.which}, but without a GPU every expert that is not "
            "in ram is read in every step, whichever it is: give their count alone"
        )
    resident, which = list(layout.experts_resident), list(layout.ram_which)
    for layer in move.layers:
        experts = experts_of(layout.graph, layer)
        most = experts.count if experts else 0
        if not 0 <= move.count <= most:
            raise VerifyError(f"place experts: layer {layer} has {most}, found count {move.count}")
        gpu.check_which(move, most)
        resident[layer] = move.count if in_ram else 0
        which[layer] = move.which
    return replace(layout, experts_resident=tuple(resident), ram_which=tuple(which))


def _split(layout: Layout, move: Split) -> Layout:
    _positive(move, size=move.size)
    match move.role, move.axis:
        case "attention", "seqs":
            return replace(layout, rows=move.size)
        case "attention", "tokens":
            return replace(layout, attn_tokens=move.size)
        case "experts", "tokens":
            return replace(layout, expert_rows=move.size)
        case "experts", "experts":
            return replace(layout, chunk=move.size)
        case "head", "seqs":
            return replace(layout, head_rows=move.size)
    raise VerifyError(
        f"split {move.role} along {move.axis}: wrong axis; a role may be split as "
        f"{', '.join(SPLITS)}"
    )


def _fuse(layout: Layout, move: Fuse) -> Layout:
    groups = layout.fused.get(move.body)
    if groups is None:
        raise VerifyError(f"fuse: no body {move.body!r}; found {', '.join(layout.fused)}")
    names = [name for group in groups for name in group]
    start = names.index(move.tasks[0]) if move.tasks and move.tasks[0] in names else -1
    if start < 0 or tuple(names[start : start + len(move.tasks)]) != move.tasks:
        raise VerifyError(f"fuse in {move.body}: {move.tasks} are not consecutive tasks of {names}")
    body = next(b for b in _bodies(layout.graph) if b.name == move.body)
    if any(t.role is Role.EXPERTS for t in body.tasks if t.name in move.tasks):
        raise VerifyError(f"fuse in {move.body}: experts run over all groups and stay on their own")
    cut = [g for g in groups if set(g) & set(move.tasks) and not set(g) <= set(move.tasks)]
    if cut:
        raise VerifyError(f"fuse in {move.body}: {move.tasks} would cut {cut[0]}, fused before")
    kept = [g for g in groups if not set(g) & set(move.tasks)]
    before = [g for g in kept if names.index(g[0]) < start]
    after = [g for g in kept if names.index(g[0]) > start]
    return replace(layout, fused=layout.fused | {move.body: (*before, move.tasks, *after)})


def _device(layout: Layout, move: Move) -> gpu.Device:
    if layout.device is None:
        raise VerifyError(f"{move}: needs a GPU; put assign(all, gpu, 100) before it")
    return layout.device


def _check(layout: Layout) -> None:
    if layout.device is not None:
        gpu.check(layout.device)
        if layout.barrier and layout.accumulated and layout.rows < layout.dispatch.seqs:
            raise VerifyError(
                "a barrier after every group leaves no experts to run over all groups at once: "
                "leave out reorder(experts, barrier) or accumulate(experts, tokens)"
            )
        if layout.paged and layout.device.by_load:
            raise VerifyError(
                "pages of experts are copied a layer ahead, but experts are assigned by load only "
                "once routing is known: leave out reorder(experts, paged) or by load"
            )
        if layout.barrier and (layout.device.experts_cpu or layout.device.linears_cpu):
            raise VerifyError(
                "a barrier after every group with experts or linears on the cpu: FlexGen's "
                "schedule has neither; leave out reorder(experts, barrier) or the assign move"
            )
        return
    epilogue = layout.graph.epilogue
    if len(layout.fused[epilogue.name]) > 1:
        names = tuple(task.name for task in epilogue.tasks)
        raise VerifyError(
            f"the epilogue runs as one segment per tile of sequences, found it in "
            f"{len(layout.fused[epilogue.name])}: add fuse({epilogue.name}, {names})"
        )
    for layer in range(len(layout.graph.layers)):
        experts = experts_of(layout.graph, layer)
        if experts is None:
            continue
        if not layout.accumulated and layout.rows < layout.dispatch.seqs:
            raise VerifyError(
                "attention is split into groups but experts are not accumulated over them: add "
                "accumulate(experts, tokens), or every group would read the experts again"
            )
        streamed = experts.count - layout.experts_resident[layer]
        if streamed % layout.chunk:
            raise VerifyError(
                f"split experts along experts by {layout.chunk}: layer {layer} streams {streamed} "
                f"experts, which {layout.chunk} does not divide"
            )
        if streamed:
            _need_prefetch(layout, "experts", layer)
    if not all(layout.dense_resident):
        _need_prefetch(layout, "dense", layout.dense_resident.index(False))
    if not layout.head_resident:
        _need_prefetch(layout, "head", -1)


def _need_prefetch(layout: Layout, unit: str, layer: int) -> None:
    if unit not in layout.prefetch:
        where = f" of layer {layer}" if layer >= 0 else ""
        raise VerifyError(
            f"{unit}{where} is on disk but no prefetch move gives it a buffer: place it in ram or "
            f"add prefetch({unit}, slots, block)"
        )


def _positive(move: Move, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise VerifyError(f"{type(move).__name__.lower()}: {name} must be >= 1, found {size}")


def _bodies(graph: TaskGraph) -> tuple[Body, ...]:
    return (graph.prologue, *graph.bodies, graph.epilogue)
