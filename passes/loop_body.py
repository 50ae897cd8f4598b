"""Loop body: `layout, machine, a step's sequences -> what every engine does for one layer`.

On a machine with a GPU a step is a loop over layers that is pipelined over engines: ``gpu0``
computes, ``h2d`` and ``d2h`` copy between ram and hbm, ``disk`` reads into ram, ``cpu`` computes
what is assigned to it. A body is a ``LoopProblem`` of the overlap solver, in ticks, with the order
in which each engine takes its operations: the policy's order here, the solver's if it finds a
better one. Groups and loads are bundled, so that a body stays small enough to be proved optimal.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dovetail.ir.machine import Curve
from dovetail.ir.placement import dense_weights, experts_of
from dovetail.ir.task_graph import ITEMSIZE, Experts
from dovetail.passes.apply_moves import Layout
from dovetail.passes.gpu_cost import GpuCosts, GroupSeconds, Shape
from dovetail.solvers.loop_problem import Hold, LoopProblem, Op

TICK = 1e-6
"""Seconds of one tick of the loop problem."""
MAX_GROUPS, MAX_LOADS = 8, 16
"""Most bundles of groups and of expert loads in a body (facts: larger ones are not proved)."""
TWO_STREAMS = 0.85
"""Share of its rate that a stream keeps beside another where the machine file does not say."""
KV_BUFFERS = 2
"""Groups whose KV may be on the GPU at a time while it is copied for every step."""
Order = Mapping[str, tuple[tuple[str, int], ...]]
"""For every engine its operations in order, each with how many iterations it runs ahead."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step processes: in decode ``seqs`` sequences with ``past`` tokens before; in prefill
    ``seqs`` prompts of ``q_len`` tokens. A mixed step has both; with ``layer_groups`` its prompts
    take only one of so many groups of layers (layered prefill)."""

    decode: Shape | None
    prefill: Shape | None
    layer_groups: int = 1

    @property
    def kind(self) -> Literal["decode", "prefill", "mixed"]:
        """What the step does."""
        if self.decode and self.prefill:
            return "mixed"
        return "decode" if self.decode else "prefill"

    @property
    def tokens(self) -> int:
        """New tokens of the step."""
        return sum(s.seqs * s.q_len for s in (self.decode, self.prefill) if s)

    @property
    def seqs(self) -> int:
        """Sequences that get a token."""
        return sum(s.seqs for s in (self.decode, self.prefill) if s)


@dataclass(frozen=True, slots=True)
class Loop:
    """The body of one kind of layer, the engines' order, what each operation is called in a
    timeline, and the bytes that each link moves."""

    problem: LoopProblem
    order: Order
    classes: Mapping[str, str]
    nbytes: Mapping[str, float]

    def loads(self) -> dict[str, float]:
        """Busy seconds of every engine in one iteration."""
        busy: dict[str, float] = {}
        for op in self.problem.ops:
            busy[op.engine] = busy.get(op.engine, 0.0) + op.duration * TICK
        return busy


def loop_body(layout: Layout, costs: GpuCosts, work: StepWork, layer: int) -> Loop:
    """The loop body of layer ``layer`` in a step that does ``work``."""
    return _Builder(layout, costs, work, layer).build()


@dataclass(slots=True)
class _Builder:
    layout: Layout
    costs: GpuCosts
    work: StepWork
    layer: int
    ops: list[Op] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    pools: dict[str, int] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    nbytes: dict[str, float] = field(default_factory=dict)
    chains: list[tuple[str, ...]] = field(default_factory=list)
    bundles: int = 0

    def build(self) -> Loop:
        dense = self._dense()
        groups = [self._group(kind, shape, dense) for kind, shape in self._groups()]
        experts = experts_of(self.layout.graph, self.layer)
        ends = self._experts(experts, groups) if experts else self._tail(groups)
        if dense:
            self._hold("dense", 1, dense[0], [*groups, *ends])
        self._carry(groups, ends)
        problem = LoopProblem(
            tuple(self.ops), tuple(self.holds), dict(self.pools), tuple(self.chains)
        )
        return Loop(problem, self._order(), dict(self.classes), dict(self.nbytes))

    # Weights that are not experts.

    def _dense(self) -> list[str]:
        layout, device = self.layout, self.layout.device
        assert device is not None
        if device.dense[self.layer]:
            return []
        nbytes = sum(w.nbytes for w in dense_weights(layout.graph.body(self.layer)))
        self.pools["dense"] = layout.prefetch["dense"].slots
        return [self._bring("dense", nbytes, layout.dense_resident[self.layer], "dense")]

    def _bring(self, name: str, nbytes: float, in_ram: bool, unit: str) -> str:
        """Copy weights to the GPU, from disk through ram where ram does not hold them."""
        block = self.layout.prefetch[unit].block
        before: list[tuple[str, int]] = []
        if not in_ram:
            rate = self.costs.machine.disk.at(min(block, nbytes))
            read = self._op(f"read_{name}", "disk", nbytes / rate, [], f"load:{unit}", nbytes)
            before.append((read, 0))
            self.pools.setdefault("staging", 2)
        copy = self._copy(f"copy_{name}", "h2d", nbytes, before, f"copy:{unit}")
        if not in_ram:
            self.holds.append(Hold("staging", 1, f"read_{name}", ((copy, 0),)))
        return copy

    # Groups of sequences.

    def _groups(self) -> list[tuple[str, Shape]]:
        """(where its attention runs, sequences) of every bundle of groups, prefill first."""
        device, work = self.layout.device, self.work
        assert device is not None
        found: list[tuple[str, Shape]] = []
        if work.prefill:
            kind = "prefill"
            per_group = max(1, self.layout.attn_tokens // work.prefill.q_len)
            found += [(kind, s) for s in self._bundles(work.prefill, per_group, 4)]
        if work.decode:
            shares = {"hbm": device.kv_percent, "cpu": device.attention_cpu}
            shares["copied"] = 100 - sum(shares.values())
            left = [name for name, percent in shares.items() if percent]
            for name in left:
                seqs = round(work.decode.seqs * shares[name] / 100)
                if seqs:
                    part = Shape(seqs, 1, work.decode.past)
                    bundles = self._bundles(part, self.layout.rows, MAX_GROUPS // len(left))
                    found += [(name, s) for s in bundles]
        return found

    def _bundles(self, shape: Shape, rows: int, most: int) -> list[Shape]:
        groups = max(1, math.ceil(shape.seqs / rows))
        bundles = min(groups, most)
        return [
            Shape(max(1, shape.seqs * (i + 1) // bundles - shape.seqs * i // bundles),
                  shape.q_len, shape.past)
            for i in range(bundles)
        ]  # fmt: skip

    def _group(self, kind: str, shape: Shape, dense: list[str]) -> str:
        """The operations of a bundle of groups; returns that after which its tokens are ready."""
        body = self.layout.graph.body(self.layer)
        name = f"{kind}{self.bundles}"
        self.bundles += 1
        needs = [(op, 0) for op in dense]
        local = Shape(math.ceil(shape.seqs / self.costs.gpu.count), shape.q_len, shape.past)
        rows = self.layout.rows if shape.q_len == 1 else self.layout.attn_tokens // shape.q_len
        per_group = Shape(max(1, min(rows, local.seqs)), local.q_len, local.past)
        times = local.seqs / per_group.seqs
        one = self.costs.group(body, per_group)
        kv = body.kv.bytes_per_token if body.kv else 0
        if kind == "cpu":
            last = self._cpu_attention(name, shape, times, needs)
        else:
            if kind == "copied":
                held = kv * local.seqs * shape.past
                needs.append((self._copy(f"kv_in_{name}", "h2d", held, [], "copy:kv"), 0))
            last = self._gpu_attention(name, shape, times, one, needs)
            if kind == "copied":
                self.pools["kv"] = KV_BUFFERS
                self._hold("kv", 1, f"kv_in_{name}", [last])
        device = self.layout.device
        assert device is not None
        share = 1 - device.kv_percent / 100 if kind == "prefill" else float(kind == "copied")
        if share and kv:
            out = share * kv * local.seqs * shape.q_len
            self._copy(f"kv_out_{name}", "d2h", out, [(last, 0)], "copy:kv")
        return last

    def _gpu_attention(
        self, name: str, shape: Shape, times: float, one: GroupSeconds, needs: list[tuple[str, int]]
    ) -> str:
        """All of a group on the GPU; with two streams, decode attention on the second."""
        if self.layout.workers < 2 or shape.q_len > 1:
            seconds = times * (one.before + one.attention + one.after)
            return self._op(f"attention_{name}", "gpu0", seconds, needs, "run:attention")
        keeps = self.costs.machine.slowdown.get("gpu|gpu", TWO_STREAMS)
        pre = self._op(f"before_{name}", "gpu0", times * one.before / keeps, needs, "run:attention")
        middle = times * one.attention / keeps
        self._op(f"kv_{name}", "gpu1", middle, [(pre, 0)], "run:kv_attention")
        after = times * one.after / keeps
        return self._op(f"after_{name}", "gpu0", after, [(f"kv_{name}", 0)], "run:attention")

    def _cpu_attention(
        self, name: str, shape: Shape, times: float, needs: list[tuple[str, int]]
    ) -> str:
        graph, gpus = self.layout.graph, self.costs.gpu.count
        body, item = graph.body(self.layer), ITEMSIZE[graph.dtype]
        per_group = Shape(max(1, round(shape.seqs / gpus / times)), 1, shape.past)
        one = self.costs.group(body, per_group)
        pre = self._op(f"before_{name}", "gpu0", times * one.before, needs, "run:attention")
        kv = body.kv.bytes_per_token if body.kv else 0
        rows = shape.seqs / gpus
        sent = rows * (graph.hidden * item + kv)
        down = self._copy(f"down_{name}", "d2h", sent, [(pre, 0)], "copy:hidden")
        seconds = self.costs.host_attention(body, shape)
        host = self._op(f"cpu_{name}", "cpu", seconds, [(down, 0)], "run:cpu_attention")
        back = rows * graph.hidden * item
        up = self._copy(f"up_{name}", "h2d", back, [(host, 0)], "copy:hidden")
        return self._op(f"after_{name}", "gpu0", times * one.after, [(up, 0)], "run:attention")

    # Experts.

    def _experts(self, experts: Experts, groups: list[str]) -> list[str]:
        layout, device = self.layout, self.layout.device
        assert device is not None
        gpus = self.costs.gpu.count
        on_cpu = round(experts.count * device.experts_cpu / 100)
        in_hbm = min(device.experts[self.layer], experts.count - on_cpu)
        streamed = experts.count - on_cpu - in_hbm
        ready = [(op, 0) for op in groups]
        copies = self._streamed(experts, streamed / gpus)
        ends: list[str] = []
        if on_cpu:
            ends.append(self._cpu_experts(experts, on_cpu, ready))
        if layout.accumulated or len(groups) == 1:
            ends += self._accumulated(experts, in_hbm / gpus, streamed / gpus, copies, ready)
        else:
            ends += self._per_group(experts, (in_hbm + streamed) / gpus, copies, groups)
        return ends

    def _rows(self, experts: Experts, tokens: float) -> tuple[float, float]:
        """Share of the experts that tokens choose under uniform routing, and rows of each."""
        hit = 1 - (1 - experts.top_k / experts.count) ** tokens
        return hit, tokens * experts.top_k / (experts.count * hit)

    def _streamed(self, experts: Experts, count: float) -> list[str]:
        """Copies of a layer's streamed experts, those from disk last."""
        if count <= 0:
            return []
        layout, device = self.layout, self.layout.device
        assert device is not None
        loads = math.ceil(count / layout.chunk)
        bundles = min(loads, MAX_LOADS)
        in_ram = layout.experts_resident[self.layer]
        resident = min(1.0, in_ram / max(1, experts.count - device.experts[self.layer]))
        # A bundle of several loads counts as one: fewer, larger buffers of the same size together.
        slots = layout.prefetch["experts"].slots
        self.pools["experts"] = max(1, slots * bundles // loads)
        size = count / bundles * experts.nbytes
        names = [
            self._bring(f"experts{i}", size, i + 1 <= round(bundles * resident), "experts")
            for i in range(bundles)
        ]
        self.chains.append(tuple(names))
        return names

    def _accumulated(
        self,
        experts: Experts,
        in_hbm: float,
        streamed: float,
        copies: list[str],
        ready: list[tuple[str, int]],
    ) -> list[str]:
        tokens = self.work.tokens
        hit, rows = self._rows(experts, tokens)
        tail = self.costs.all_to_all(experts, tokens / self.costs.gpu.count) + self._tail_seconds()
        tile = self.layout.expert_rows
        names = []
        seconds = self._tiled(experts, in_hbm * hit, rows, tile) + tail
        names.append(self._op("experts_hbm", "gpu0", seconds, ready, "run:experts"))
        for i, copy in enumerate(copies):
            each = self._tiled(experts, streamed / len(copies) * hit, rows, tile)
            gemm = self._op(f"gemm{i}", "gpu0", each, [*ready, (copy, 0)], "run:experts")
            self._hold("experts", 1, copy, [gemm])
            names.append(gemm)
        return names

    def _tiled(self, experts: Experts, count: float, rows: float, tile: int) -> float:
        pieces = max(1.0, rows / tile)
        return pieces * self.costs.experts(experts, count, rows / pieces)

    def _per_group(
        self, experts: Experts, count: float, copies: list[str], groups: list[str]
    ) -> list[str]:
        """Experts of one group after the other, once all weights of the layer are there."""
        names = []
        shapes = [shape for _, shape in self._groups()]
        rows = max(1, min(self.layout.rows, max(s.seqs for s in shapes)))
        for i, (group, shape) in enumerate(zip(groups, shapes, strict=True)):
            per_group = rows * shape.q_len if shape.q_len == 1 else self.layout.attn_tokens
            tokens = min(shape.seqs * shape.q_len, per_group)
            pieces = math.ceil(shape.seqs * shape.q_len / tokens)
            hit, each = self._rows(experts, tokens)
            seconds = pieces * self.costs.experts(experts, count * hit, each)
            seconds += self._tail_seconds() / len(groups)
            needs = [(group, 0), *((copy, 0) for copy in copies)]
            names.append(self._op(f"experts_group{i}", "gpu0", seconds, needs, "run:experts"))
        for copy in copies:
            self._hold("experts", 1, copy, [names[-1]])
        return names

    def _cpu_experts(self, experts: Experts, count: int, ready: list[tuple[str, int]]) -> str:
        graph, gpus = self.layout.graph, self.costs.gpu.count
        hit, rows = self._rows(experts, self.work.tokens)
        sent = min(self.work.tokens, count * hit * rows) * graph.hidden * ITEMSIZE[graph.dtype]
        down = self._copy("down_experts", "d2h", sent / gpus, ready, "copy:hidden")
        seconds = self.costs.host_experts(experts, count * hit, rows)
        host = self._op("cpu_experts", "cpu", seconds, [(down, 0)], "run:cpu_experts")
        return self._copy("up_experts", "h2d", sent / gpus, [(host, 0)], "copy:hidden")

    def _tail(self, groups: list[str]) -> list[str]:
        needs = [(op, 0) for op in groups]
        return [self._op("tail", "gpu0", self._tail_seconds(), needs, "run:other")]

    def _tail_seconds(self) -> float:
        body, total = self.layout.graph.body(self.layer), 0.0
        for _, shape in self._groups():
            local = Shape(math.ceil(shape.seqs / self.costs.gpu.count), shape.q_len, shape.past)
            total += self.costs.group(body, local).tail
        return total

    # Bookkeeping.

    def _carry(self, groups: list[str], ends: list[str]) -> None:
        """The next layer's groups begin when this layer has their hidden states."""
        first = {name.split("_", 1)[1]: name for name in self.classes if name.startswith("before")}
        for i, group in enumerate(groups):
            starts = first.get(group.split("_", 1)[1], group)
            per_group = len(ends) == len(groups) and ends[0].startswith("experts_group")
            before = [ends[i]] if per_group else ends
            self._after(starts, [(name, 1) for name in before])

    def _after(self, name: str, more: Iterable[tuple[str, int]]) -> None:
        at = next(i for i, op in enumerate(self.ops) if op.name == name)
        op = self.ops[at]
        self.ops[at] = Op(op.name, op.engine, op.duration, (*op.after, *more))

    def _copy(
        self, name: str, engine: str, nbytes: float, after: list[tuple[str, int]], kind: str
    ) -> str:
        curve: Curve = self.costs.gpu.h2d if engine == "h2d" else self.costs.gpu.d2h
        seconds = nbytes / curve.at(max(1.0, nbytes)) if nbytes else 0.0
        return self._op(name, engine, seconds, after, kind, nbytes)

    def _op(
        self,
        name: str,
        engine: str,
        seconds: float,
        after: Sequence[tuple[str, int]],
        kind: str,
        nbytes: float = 0.0,
    ) -> str:
        self.ops.append(Op(name, engine, round(seconds / TICK), tuple(after)))
        self.classes[name] = kind
        if nbytes:
            self.nbytes[engine] = self.nbytes.get(engine, 0.0) + nbytes
        return name

    def _hold(self, pool: str, units: int, first: str, last: Sequence[str]) -> None:
        self.holds.append(Hold(pool, units, first, tuple((name, 0) for name in last)))

    def _order(self) -> Order:
        order: dict[str, list[tuple[str, int]]] = {}
        for op in self.ops:
            order.setdefault(op.engine, []).append((op.name, 0))
        if self.layout.paged and "h2d" in order:
            order["h2d"] = _interleaved(order["h2d"])
        for move in self.layout.pipelines:
            if (move.work, move.layer) == (self.work.kind, self.layer):
                given = sorted(name for name, _ in order.get(move.engine, ()))
                # A workload of another size has other bundles: then the policy's order stands.
                if given == sorted(move.ops):
                    order[move.engine] = list(zip(move.ops, move.ahead, strict=True))
        return {engine: tuple(items) for engine, items in order.items()}


def _interleaved(items: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The next layer's weights in between this layer's other transfers (CGOPipe)."""
    pages = [(name, 1) for name, _ in items if name.startswith(("copy_dense", "copy_experts"))]
    others = [item for item in items if (item[0], 1) not in pages]
    merged: list[tuple[str, int]] = []
    for i, item in enumerate(others or [("", 0)]):
        merged += pages[
            len(pages) * i // max(1, len(others)) : len(pages) * (i + 1) // max(1, len(others))
        ]
        if item[0]:
            merged.append(item)
    return merged
