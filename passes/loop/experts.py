"""Loop body, expert side: which experts are in hbm, copied, or the CPU's, and what each part takes.

`builder, bundles -> the operations that end a layer`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dovetail.ir.task_graph import ITEMSIZE, Experts
from dovetail.passes.expert_loads import ANY, Load
from dovetail.passes.gpu.cost import Shape
from dovetail.passes.loop.builder import After, Builder
from dovetail.passes.loop.groups import Bundle

MAX_LOADS = 16
"""Most bundles of expert loads in a body (facts: larger ones are not proved)."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A layer's experts in hbm, copied in every step, and on the CPU; each a number of experts and,
    where a placement names them, which."""

    counts: tuple[int, int, int]
    ids: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None

    @classmethod
    def of(cls, b: Builder, experts: Experts) -> "Parts":
        """The parts of the builder's layer; of experts that are known by their loads, the CPU has
        those of least."""
        device = b.device
        cpu = round(experts.count * device.experts_cpu / 100)
        hbm = min(device.experts[b.layer], experts.count - cpu)
        counts = hbm, experts.count - hbm - cpu, cpu
        if loads_layer(b) == ANY:
            return cls(counts, None)
        which = set(device.which[b.layer])
        shares = b.costs.loads.shares(b.layer, experts)
        by_load = sorted(range(experts.count), key=lambda e: (-shares[e], e))
        held = [e for e in by_load if e in which][:hbm]
        others = [e for e in by_load if e not in held]
        copied = counts[1]
        return cls(counts, (tuple(held), tuple(others[:copied]), tuple(others[copied:])))

    def loads(self, b: Builder, experts: Experts, part: int, tokens: float) -> list[Load]:
        """The loads of one part when ``tokens`` tokens choose."""
        if self.ids is not None:
            return list(b.costs.loads.of(b.layer, experts, self.ids[part], tokens))
        share = self.counts[part] / experts.count
        every = b.costs.loads.of(loads_layer(b), experts, None, tokens)
        return _scaled(every, share) if share else []


def loads_layer(b: Builder) -> int:
    """The layer whose loads its experts have: its own where a placement names them."""
    named = b.device.which[b.layer] or b.layout.ram_which[b.layer]
    return b.layer if named and b.costs.loads.traced else ANY


def _scaled(loads: Sequence[Load], factor: float) -> list[Load]:
    return [Load(load.count * factor, load.rows) for load in loads]


def experts_ends(b: Builder, experts: Experts, bundles: Sequence[Bundle]) -> list[list[str]]:
    """The operations that end a layer with experts, by bundle where each has its own, and else
    those of all."""
    ready: list[After] = [(bundle.last, 0) for bundle in bundles]
    if b.device.by_load:
        return [_by_load(b, experts, bundles, ready)]
    parts = Parts.of(b, experts)
    gpus = b.costs.gpu.count
    # What ram holds serves the CPU first, which needs no buffer for it.
    left = max(0, b.layout.experts_resident[b.layer] - parts.counts[2])
    copies = _streamed(b, experts, parts.counts[1] / gpus, max(0, parts.counts[1] - left) / gpus)
    ends: list[str] = []
    host = parts.loads(b, experts, 2, b.work.tokens)
    if copies and b.device.linears_cpu:
        share = b.device.linears_cpu / 100
        host += _scaled(parts.loads(b, experts, 1, b.work.tokens), share)
    if host:
        missing = max(0, parts.counts[2] - b.layout.experts_resident[b.layer])
        ends.append(_cpu_experts(b, experts, host, missing, ready))
    if b.layout.accumulated or len(bundles) == 1:
        return [[*ends, *_accumulated(b, experts, parts, copies, ready, bundles)]]
    each = _per_group(b, experts, parts, copies, bundles)
    return [[*ends, end] for end in each]


def _streamed(
    b: Builder, experts: Experts, count: float, missing: float, after: Sequence[After] = ()
) -> list[str]:
    """Copies of ``count`` experts, of which ``missing`` are read from disk first; those are spread
    evenly over the copies, so that the disk never waits for many others, and one of them comes
    first: while the layer's tokens are not ready, its buffers hold what took longest to bring."""
    if count <= 0:
        return []
    loads = math.ceil(count / b.layout.chunk)
    bundles = loads if b.fine else min(loads, MAX_LOADS)
    # A bundle of several loads counts as one: fewer, larger buffers of the same size together.
    slots = b.layout.prefetch["experts"].slots
    b.pools["experts"] = max(1, slots * bundles // loads)
    size = count / bundles * experts.nbytes * b.sent
    reads = min(bundles, math.ceil(missing * bundles / count - 1e-9))
    # What the CPU computes of a load is read from disk too.
    read = missing / reads * experts.nbytes if reads else 0.0
    names = []
    for i in range(bundles):
        from_disk = -(-(i + 1) * reads // bundles) > -(-i * reads // bundles)
        names.append(b.bring(f"experts{i}", size, read if from_disk else 0.0, "experts", after))
    b.chain([f"read_{name}" for name in _units(names) if f"read_{name}" in b.classes])
    _chain_alike(b, names, names)
    return names


def _units(copies: Sequence[str]) -> list[str]:
    return [name.removeprefix("copy_") for name in copies]


def _chain_alike(b: Builder, copies: Sequence[str], names: Sequence[str]) -> None:
    """Operations that belong to copies of one kind are alike: those that wait for the disk, and
    those that do not."""
    from_disk = [f"read_{name}" in b.classes for name in _units(copies)]
    for reading in (True, False):
        b.chain([n for n, read in zip(names, from_disk, strict=True) if read == reading])


def _in_ram(b: Builder, experts: Experts) -> float:
    """Share of the experts outside hbm that ram holds: of those that a step's tokens choose where a
    placement names them, else of all."""
    outside = max(1, experts.count - b.device.experts[b.layer])
    if loads_layer(b) == ANY:
        return min(1.0, b.layout.experts_resident[b.layer] / outside)
    hit = b.costs.loads.hit(b.layer, experts, b.work.tokens)
    held, ram = set(b.device.which[b.layer]), b.layout.ram_which[b.layer]
    wanted = sum(float(hit[e]) for e in range(experts.count) if e not in held)
    return min(1.0, sum(float(hit[e]) for e in ram) / wanted) if wanted else 1.0


def _accumulated(
    b: Builder,
    experts: Experts,
    parts: Parts,
    copies: list[str],
    ready: list[After],
    bundles: Sequence[Bundle],
) -> list[str]:
    """Every expert once, over the tokens of all groups."""
    tokens, gpus, tile = b.work.tokens, b.costs.gpu.count, b.layout.expert_rows
    tail = b.costs.all_to_all(experts, tokens / gpus) + _tail_seconds(b, bundles)
    slowest = b.costs.imbalance(loads_layer(b), experts, tokens)
    held = _scaled(parts.loads(b, experts, 0, tokens), slowest / gpus)
    seconds = b.costs.expert_loads(experts, held, tile) + tail
    names = [b.op("experts_hbm", "gpu0", seconds, ready, "run:experts")]
    if copies:
        copied = parts.loads(b, experts, 1, tokens)
        one = _scaled(copied, slowest / gpus / len(copies) * b.sent)
        names += _gemms(b, b.costs.expert_loads(experts, one, tile), copies, ready)
    return names


def _gemms(b: Builder, seconds: float, copies: list[str], ready: Sequence[After]) -> list[str]:
    """The products of copied experts, each after its copy."""
    names = []
    for i, copy in enumerate(copies):
        gemm = b.op(f"gemm{i}", "gpu0", seconds, [*ready, (copy, 0)], "run:experts")
        b.hold("experts", copy, [gemm])
        names.append(gemm)
    _chain_alike(b, copies, names)
    return names


def _per_group(
    b: Builder, experts: Experts, parts: Parts, copies: list[str], bundles: Sequence[Bundle]
) -> list[str]:
    """Experts of one group after the other, once all weights of the layer are there."""
    names, gpus = [], b.costs.gpu.count
    rows = max(1, min(b.layout.rows, max(bundle.shape.seqs for bundle in bundles)))
    for i, bundle in enumerate(bundles):
        shape = bundle.shape
        per_group = rows * shape.q_len if shape.q_len == 1 else b.layout.attn_tokens
        tokens = min(shape.seqs * shape.q_len, per_group)
        pieces = math.ceil(shape.seqs * shape.q_len / tokens)
        on_gpu = [*parts.loads(b, experts, 0, tokens), *_scaled(
            parts.loads(b, experts, 1, tokens), b.sent)]  # fmt: skip
        slowest = b.costs.imbalance(loads_layer(b), experts, tokens)
        seconds = pieces * b.costs.expert_loads(experts, _scaled(on_gpu, slowest / gpus), 1 << 30)
        seconds += _tail_seconds(b, bundles) / len(bundles)
        needs = [(bundle.last, 0), *((copy, 0) for copy in copies)]
        names.append(b.op(f"experts_group{i}", "gpu0", seconds, needs, "run:experts"))
    for copy in copies:
        b.hold("experts", copy, [names[-1]])
    return names


def _cpu_experts(
    b: Builder, experts: Experts, loads: list[Load], missing: float, ready: list[After]
) -> str:
    """Experts on the CPU, ``missing`` of them read from disk: their tokens go down, and come
    back."""
    rows = sum(load.count * load.rows for load in loads)
    seconds = b.costs.host_loads(experts, loads)
    read = b.read("cpu_experts", missing * experts.nbytes, "experts")
    return _on_host(b, min(b.work.tokens, rows), seconds, ready, read)


def _on_host(
    b: Builder, tokens: float, seconds: float, ready: list[After], read: Sequence[After]
) -> str:
    graph, gpus = b.layout.graph, b.costs.gpu.count
    sent = tokens * graph.hidden * ITEMSIZE[graph.dtype] / gpus
    down = b.copy("down_experts", "d2h", sent, ready, "copy:hidden")
    host = b.op("cpu_experts", "cpu", seconds, [(down, 0), *read], "run:cpu_experts")
    return b.copy("up_experts", "h2d", sent, [(host, 0)], "copy:hidden")


def _by_load(
    b: Builder, experts: Experts, bundles: Sequence[Bundle], ready: list[After]
) -> list[str]:
    """Experts dealt to CPU and GPU in every step, by what routing gave them."""
    device, gpus = b.device, b.costs.gpu.count
    most = round(experts.count * device.experts_cpu / 100)
    layer = loads_layer(b)
    held = tuple(range(device.experts[b.layer])) if layer == ANY else device.which[b.layer]
    deal = b.costs.dealt(layer, experts, held, b.work.tokens, most)
    tail = b.costs.all_to_all(experts, b.work.tokens / gpus) + _tail_seconds(b, bundles)
    names = [b.op("experts_hbm", "gpu0", deal.held + tail, ready, "run:experts")]
    missing = 1 - _in_ram(b, experts)
    count = deal.copies / gpus
    # What is to run has a copy for every expert that may be wanted; many will have nothing to do.
    if b.work.groups:
        count = float(experts.count - len(held))
        missing = float(b.layout.experts_resident[b.layer] < count)
    copies = _streamed(b, experts, count, missing * count, ready)
    if copies:
        names += _gemms(b, deal.copied / len(copies), copies, ready)
    if deal.host or (b.work.groups and most):
        wanted = sum(load.count for load in b.costs.loads.of(b.layer, experts, None, b.work.tokens))
        wanted *= 1 - len(held) / experts.count
        nbytes = missing * max(0.0, wanted - deal.copies) * experts.nbytes
        if b.work.groups:
            nbytes = missing * b.layout.chunk * experts.nbytes
        read = b.read("cpu_experts", nbytes, "experts", ready)
        names.append(_on_host(b, min(b.work.tokens, deal.host_rows), deal.host, ready, read))
    return names


def tail_ends(b: Builder, bundles: Sequence[Bundle]) -> list[list[str]]:
    """What ends a layer without experts."""
    seconds = _tail_seconds(b, bundles)
    if not b.layout.barrier:
        needs = [(bundle.last, 0) for bundle in bundles]
        return [[b.op("tail", "gpu0", seconds, needs, "run:other")]]
    each = seconds / len(bundles)
    return [
        [b.op(f"tail{i}", "gpu0", each, [(bundle.last, 0)], "run:other")]
        for i, bundle in enumerate(bundles)
    ]


def _tail_seconds(b: Builder, bundles: Sequence[Bundle]) -> float:
    body, total = b.layout.graph.body(b.layer), 0.0
    for bundle in bundles:
        shape = bundle.shape
        local = Shape(math.ceil(shape.seqs / b.costs.gpu.count), shape.q_len, shape.past)
        total += b.costs.group(body, local).tail
    return total
