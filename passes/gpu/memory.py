"""GPU memory: `layout -> bytes of hbm (of one GPU) and of ram, by what they hold`."""

import math
from dataclasses import dataclass

from dovetail.ir.moves import Dispatch
from dovetail.ir.placement import (
    dense_weights,
    embed_weights,
    expert_bytes,
    experts_of,
    head_weights,
    weights_bytes,
)
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
    buffers that these are read from disk into, in whole blocks; of KV for a token, in all layers
    and in that with the most."""

    embed: int
    head: int
    dense: tuple[int, ...]
    expert: tuple[int, ...]
    experts: tuple[int, ...]
    dense_read: tuple[int, ...]
    expert_read: tuple[int, ...]
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
            dense_read=tuple(weights_bytes(dense_weights(graph.body(i))) for i in layers),
            expert_read=tuple(expert_bytes(e) if e else 0 for e in specs),
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
    kv = kv_wall(layout.dispatch, device) * sizes.kv
    staged = 0
    if device.kv_percent + device.attention_cpu < 100:
        rows = math.ceil(layout.rows / gpus)
        group = rows * math.ceil(layout.dispatch.kv_tokens / layout.dispatch.seqs)
        staged = 2 * group * sizes.kv_layer
    return {
        "resident": resident,
        "rings": rings,
        "kv": math.ceil(kv / gpus) + staged,
        "tokens": math.ceil(step_tokens(layout) / gpus) * graph.hidden * 4 * ITEMSIZE[graph.dtype],
        "activations": math.ceil(activation_bytes(layout) / gpus),
    }


def _ram(layout: Layout, device: Device) -> dict[str, int]:
    sizes = unit_sizes(layout.graph)
    resident = (not device.embed) * sizes.embed + (not device.head) * sizes.head
    staging = reads = 0
    for layer, dense in enumerate(sizes.dense):
        if not device.dense[layer]:
            if layout.dense_resident[layer]:
                resident += dense
            else:
                staging = max(staging, 2 * sizes.dense_read[layer])
        left = sizes.experts[layer] - device.experts[layer]
        resident += min(left, layout.experts_resident[layer]) * sizes.expert[layer]
        if left > layout.experts_resident[layer]:
            staging = max(staging, 2 * layout.chunk * sizes.expert_read[layer])
        reads = max(reads, _cpu_reads(layout, device, layer) * sizes.expert_read[layer])
    in_ram = layout.dispatch.kv_tokens - kv_wall(layout.dispatch, device)
    kv = in_ram * sizes.kv
    return {"resident": resident, "staging": staging, "cpu_reads": reads, "kv": kv}


def _cpu_reads(layout: Layout, device: Device, layer: int) -> int:
    """Most experts of a layer that are read from disk for the CPU in a step."""
    sizes, in_ram = unit_sizes(layout.graph), layout.experts_resident[layer]
    cpu = round(sizes.experts[layer] * device.experts_cpu / 100)
    if not device.by_load:
        return max(0, cpu - in_ram)
    on_disk = sizes.experts[layer] - device.experts[layer] - in_ram
    return min(layout.chunk, cpu) if on_disk > 0 else 0


def kv_wall(dispatch: Dispatch, device: Device) -> int:
    """KV tokens in hbm: those of whole sequences, all of them of the mean length."""
    return dispatch.kv_tokens * round(dispatch.seqs * device.kv_percent / 100) // dispatch.seqs
