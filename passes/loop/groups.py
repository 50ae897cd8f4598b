"""Loop body, attention side: bundles of groups of sequences, their KV, and the weights they read.

`builder -> bundles`; groups are bundled, so that a body stays small enough to be proved optimal.
"""

import math
from dataclasses import dataclass

from dovetail.ir.placement import dense_weights
from dovetail.ir.task_graph import ITEMSIZE
from dovetail.passes.gpu.cost import GroupSeconds, Shape
from dovetail.passes.loop.builder import After, Builder

MAX_GROUPS = 8
"""Most bundles of groups in a body (facts: larger ones are not proved)."""
TWO_STREAMS = 0.85
"""Share of its rate that a stream keeps beside another where the machine file does not say."""
KV_BUFFERS = 2
"""Groups whose KV may be on the GPU at a time while it is copied for every step."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """Groups that a body treats as one: the operations that begin them, the first on the GPU, those
    that follow it there up to that after which their tokens are ready, and the copies of their KV
    ("" for none): ``kv_more`` is that of all but the first of several groups that are copied beside
    each other's attention."""

    shape: Shape
    starts: tuple[str, ...]
    follow: tuple[str, ...]
    kv_in: str = ""
    kv_out: str = ""
    kv_more: str = ""

    @property
    def last(self) -> str:
        """The operation after which the bundle's tokens are ready."""
        return self.follow[-1] if self.follow else self.starts[0]


def dense(b: Builder) -> list[str]:
    """The copy of the layer's weights that are not experts, unless hbm holds them."""
    if b.device.dense[b.layer]:
        return []
    layout = b.layout
    nbytes = sum(w.nbytes for w in dense_weights(layout.graph.body(b.layer)))
    b.pools["dense"] = layout.prefetch["dense"].slots
    missing = 0.0 if layout.dense_resident[b.layer] else nbytes
    return [b.bring("dense", nbytes * b.sent, missing, "dense")]


def shapes(b: Builder) -> list[tuple[str, Shape]]:
    """(where its attention runs, sequences) of every bundle of groups, prefill first."""
    device, work = b.device, b.work
    found: list[tuple[str, Shape]] = [(group.kind, group.shape) for group in work.groups]
    if found:
        return found
    if work.prefill:
        per_group = max(1, b.layout.attn_tokens // work.prefill.q_len)
        found += [("prefill", s) for s in _bundled(b, work.prefill, per_group, MAX_GROUPS // 2)]
    if work.decode:
        shares = {"hbm": device.kv_percent, "cpu": device.attention_cpu}
        shares["copied"] = 100 - sum(shares.values())
        left = [name for name, percent in shares.items() if percent]
        percent = taken = 0
        for name in left:
            # Rounded as they add up, so that no sequence is lost between the shares.
            percent += shares[name]
            seqs = round(work.decode.seqs * percent / 100) - taken
            taken += seqs
            if seqs:
                part = Shape(seqs, 1, work.decode.past)
                most = MAX_GROUPS // len(left)
                found += [(name, s) for s in _bundled(b, part, b.layout.rows, most)]
    return found


def _bundled(b: Builder, shape: Shape, rows: int, most: int) -> list[Shape]:
    groups = max(1, math.ceil(shape.seqs / rows))
    most = groups if b.fine else most
    if b.layout.barrier and groups > most:
        # Weights are copied beside the first group, which stays by itself.
        rest = Shape(shape.seqs - rows, shape.q_len, shape.past)
        return [Shape(rows, shape.q_len, shape.past), *_bundled(b, rest, rest.seqs, 1)]
    bundles = min(groups, most)
    return [
        Shape(max(1, shape.seqs * (i + 1) // bundles - shape.seqs * i // bundles),
              shape.q_len, shape.past)
        for i in range(bundles)
    ]  # fmt: skip


def bundle(b: Builder, number: int, kind: str, shape: Shape, weights: list[str]) -> Bundle:
    """The operations of one bundle of groups, whose sequences are dealt out to the GPUs."""
    body, gpus = b.layout.graph.body(b.layer), b.costs.gpu.count
    name, lead = f"{kind}{number}", int(b.layout.barrier)
    # Beside a barrier these weights, and the first bundle's KV, are copied a layer ahead.
    needs: list[After] = [(op, lead) for op in weights]
    local = Shape(math.ceil(shape.seqs / gpus), shape.q_len, shape.past)
    rows = b.layout.rows if shape.q_len == 1 else b.layout.attn_tokens // shape.q_len
    per_group = Shape(max(1, min(math.ceil(rows / gpus), local.seqs)), local.q_len, local.past)
    times = local.seqs / per_group.seqs
    one = b.costs.group(body, per_group)
    kv = body.kv.bytes_per_token if body.kv else 0
    kv_in = kv_out = kv_more = ""
    if kind == "copied":
        held: float = kv * local.seqs * shape.past
        if b.layout.barrier and number and times > 1:
            kv_more = b.copy(f"kv_more_{name}", "h2d", held - held / times, [], "copy:kv")
            held /= times
        kv_in = b.copy(f"kv_in_{name}", "h2d", held, [], "copy:kv")
        needs.append((kv_in, lead if number == 0 else 0))
    if kind == "cpu":
        starts, follow = _cpu_attention(b, name, shape, times, needs)
    else:
        share = b.device.linears_cpu / 100 if weights else 0.0
        starts, follow = _gpu_attention(b, name, shape, times, one, needs, per_group, share)
    last = follow[-1] if follow else starts[0]
    if kv_in:
        b.pools["kv"] = KV_BUFFERS
        b.hold("kv", kv_in, [last], lead if number == 0 else 0)
    out = 1 - b.device.kv_percent / 100 if kind == "prefill" else float(kind == "copied")
    if out and kv:
        nbytes = out * kv * local.seqs * shape.q_len
        kv_out = b.copy(f"kv_out_{name}", "d2h", nbytes, [(last, 0)], "copy:kv")
    return Bundle(shape, starts, follow, kv_in, kv_out, kv_more)


def _gpu_attention(
    b: Builder,
    name: str,
    shape: Shape,
    times: float,
    one: GroupSeconds,
    needs: list[After],
    group: Shape,
    share: float,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All of a bundle on the GPU but ``share`` of its linear layers' columns; with two streams,
    decode attention on the second."""
    body = b.layout.graph.body(b.layer)
    less = share * times * b.costs.products(body, group).gpu if share else 0.0
    if b.layout.workers < 2 or shape.q_len > 1:
        seconds = times * (one.before + one.attention + one.after) - less
        first = b.op(f"attention_{name}", "gpu0", seconds, needs, "run:attention")
        follow = []
    else:
        keeps = b.costs.machine.slowdown.get("gpu|gpu", TWO_STREAMS)
        before = times * one.before - less
        first = b.op(f"before_{name}", "gpu0", before / keeps, needs, "run:attention")
        middle = times * one.attention / keeps
        b.op(f"kv_{name}", "gpu1", middle, [(first, 0)], "run:kv_attention")
        after = times * one.after / keeps
        follow = [b.op(f"after_{name}", "gpu0", after, [(f"kv_{name}", 0)], "run:attention")]
    if not share:
        return (first,), tuple(follow)
    down, up = _cpu_linears(b, name, shape, share)
    ended = follow[0] if follow else first
    follow.append(b.op(f"join_{name}", "gpu0", 0.0, [(ended, 0), (up, 0)], "run:attention"))
    return (first, down), tuple(follow)


def _cpu_linears(b: Builder, name: str, shape: Shape, share: float) -> tuple[str, str]:
    """Columns of the bundle's linear layers on the CPU: their inputs go down, outputs come up."""
    gpus = b.costs.gpu.count
    whole = b.costs.products(b.layout.graph.body(b.layer), shape)
    down = b.copy(f"down_linears_{name}", "d2h", whole.read / gpus, [], "copy:hidden")
    seconds = share * whole.host
    host = b.op(f"cpu_linears_{name}", "cpu", seconds, [(down, 0)], "run:cpu_linears")
    made = share * whole.made / gpus
    return down, b.copy(f"up_linears_{name}", "h2d", made, [(host, 0)], "copy:hidden")


def _cpu_attention(
    b: Builder, name: str, shape: Shape, times: float, needs: list[After]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    graph, gpus = b.layout.graph, b.costs.gpu.count
    body, item = graph.body(b.layer), ITEMSIZE[graph.dtype]
    per_group = Shape(max(1, round(shape.seqs / gpus / times)), 1, shape.past)
    one = b.costs.group(body, per_group)
    pre = b.op(f"before_{name}", "gpu0", times * one.before, needs, "run:attention")
    kv = body.kv.bytes_per_token if body.kv else 0
    rows = shape.seqs / gpus
    sent = rows * (graph.hidden * item + kv)
    down = b.copy(f"down_{name}", "d2h", sent, [(pre, 0)], "copy:hidden")
    seconds = b.costs.host_attention(body, shape)
    host = b.op(f"cpu_{name}", "cpu", seconds, [(down, 0)], "run:cpu_attention")
    back = rows * graph.hidden * item
    up = b.copy(f"up_{name}", "h2d", back, [(host, 0)], "copy:hidden")
    last = b.op(f"after_{name}", "gpu0", times * one.after, [(up, 0)], "run:attention")
    return (pre,), (last,)
