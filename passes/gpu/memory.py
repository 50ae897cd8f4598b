"""GPU memory: `layout -> bytes of hbm (of one GPU) and of ram, by what they hold`."""

import math
from dataclasses import dataclass

from dovetail.ir.placement import dense_weights, embed_weights, experts_of, head_weights
from dovetail.ir.task_graph import ITEMSIZE, TaskGraph, Weight
from dovetail.passes.apply_moves import Layout
from dovetail.passes.device import Device
from dovetail.passes.memory import activation_bytes, step_tokens

HBM_SHARE, RAM_SHARE = 0.92, 0.95
"""Shares of hbm and of ram that a plan may use; the rest is for the context, library workspaces
and fragmentation (MoE-Lightning keeps 0.86 of hbm and 0.80 of ram)."""


def tier_bytes(layout: Layout, gpus: int) -> dict[str, dict[str, int]]:
    """Peak bytes of the tiers ``hbm`` and ``ram``, by what they hold."""
    device = layout.device
    assert device is not None
    return {"hbm": _hbm(layout, device, gpus), "ram": _ram(layout, device)}


@dataclass(frozen=True, slots=True)
class UnitSizes:
    """Bytes of a model's units: layer by layer for dense weights, one expert's, and how many; of
    KV for a token, in all layers and in that with the most."""

    embed: int
    head: int
    dense: tuple[int, ...]
    expert: tuple[int, ...]
    experts: tuple[int, ...]
    kv: int
    kv_layer: int


def unit_sizes(graph: TaskGraph) -> UnitSizes:
    """The sizes of a graph's units, worked out once."""
    known = _SIZES.get(id(graph))
    if known is None or known[0] is not graph:
        layers = range(len(graph.layers))
        specs = [experts_of(graph, i) for i in layers]
        sizes = UnitSizes(
            embed=_size(embed_weights(graph)),
            head=_size(head_weights(graph)),
            dense=tuple(_size(dense_weights(graph.body(i))) for i in layers),
            expert=tuple(e.nbytes if e else 0 for e in specs),
            experts=tuple(e.count if e else 0 for e in specs),
            kv=graph.kv_bytes_per_token,
            kv_layer=max((b.kv.bytes_per_token for b in graph.bodies if b.kv), default=0),
        )
        known = _SIZES[id(graph)] = (graph, sizes)
    return known[1]


_SIZES: dict[int, tuple[TaskGraph, UnitSizes]] = {}
"""By identity; each entry keeps its graph alive, so that no other takes its identity."""


def _size(weights: tuple[Weight, ...]) -> int:
    return sum(w.nbytes for w in weights)


def _hbm(layout: Layout, device: Device, gpus: int) -> dict[str, int]:
    graph, sizes = layout.graph, unit_sizes(layout.graph)
    resident = device.embed * sizes.embed + device.head * sizes.head
    rings, sent = 0 if device.head else sizes.head, 1 - device.linears_cpu / 100
    resident += sum(n for n, there in zip(sizes.dense, device.dense, strict=True) if there)
    streamed = [n for n, there in zip(sizes.dense, device.dense, strict=True) if not there]
    if streamed:
        rings += layout.prefetch["dense"].slots * math.ceil(max(streamed) * sent)
    chunk = 0
    for count, there, nbytes in zip(sizes.experts, device.experts, sizes.expert, strict=True):
        resident += math.ceil(there / gpus) * nbytes
        if there < count:
            chunk = max(chunk, math.ceil(layout.chunk * nbytes * sent))
    if chunk:
        rings += layout.prefetch["experts"].slots * chunk
    kv = layout.dispatch.kv_tokens * sizes.kv
    staged = 0
    if device.kv_percent + device.attention_cpu < 100:
        group = layout.rows * math.ceil(layout.dispatch.kv_tokens / layout.dispatch.seqs)
        staged = 2 * group * sizes.kv_layer
    return {
        "resident": resident,
        "rings": rings,
        "kv": math.ceil(kv * device.kv_percent / 100 / gpus) + staged,
        "tokens": math.ceil(step_tokens(layout) / gpus) * graph.hidden * 4 * ITEMSIZE[graph.dtype],
        "activations": math.ceil(activation_bytes(layout) / gpus),
    }


def _ram(layout: Layout, device: Device) -> dict[str, int]:
    sizes = unit_sizes(layout.graph)
    resident = (not device.embed) * sizes.embed + (not device.head) * sizes.head
    staging = 0
    for layer, dense in enumerate(sizes.dense):
        if not device.dense[layer]:
            if layout.dense_resident[layer]:
                resident += dense
            else:
                staging = max(staging, 2 * dense)
        left = sizes.experts[layer] - device.experts[layer]
        resident += min(left, layout.experts_resident[layer]) * sizes.expert[layer]
        if left > layout.experts_resident[layer]:
            staging = max(staging, 2 * layout.chunk * sizes.expert[layer])
    kv = layout.dispatch.kv_tokens * sizes.kv
    return {
        "resident": resident,
        "staging": staging,
        "kv": math.ceil(kv * (100 - device.kv_percent) / 100),
    }
