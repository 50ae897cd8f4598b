"""Weights of a GPU plan: what stays in hbm and in ram, what is read and copied in every step.

Units lie packed in memory, one tensor after the other, the same way in ram and in hbm: so a unit
that ram holds is copied to the GPU in one piece. What comes from disk is read directly into a
buffer with whole blocks around it, and copied from there tensor by tensor.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dovetail.ir.gpu_settings import GpuSettings
from dovetail.ir.placement import dense_weights, embed_weights, experts_of, head_weights
from dovetail.ir.task_graph import TaskGraph
from dovetail.runtime.direct_io import ALIGNMENT, Reader
from dovetail.runtime.gpu.memory import GpuMemory
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.pools import torch_dtype
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.weight_store import PIECE, Tensors, Unit, WeightStore

Key = tuple[str, int, int]
"""A unit: embed, head, dense or experts; its layer or -1; the expert or -1."""
WIDE = 16
"""Bytes at whose multiples kernels like their tensors to begin."""
BLOCK = 16 << 20
"""Most bytes of one read of what stays resident."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Where the tensors of a unit are in its bytes."""

    places: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]]
    nbytes: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> "Packed":
        """Without gaps: first those whose bytes are a multiple of ``WIDE``, then the others by
        falling size of an element."""
        sized = []
        for name, shape, dtype in tensors:
            kind = torch_dtype(dtype)
            sized.append((math.prod(shape) * kind.itemsize, name, kind, shape))
        sized.sort(key=lambda one: (one[0] % WIDE > 0, -one[2].itemsize))
        places, at = {}, 0
        for nbytes, name, kind, shape in sized:
            places[name] = (at, kind, shape)
            at += nbytes
        return cls(places, at)

    def views(self, memory: Tensor) -> Tensors:
        """The tensors in ``memory``, bytes from the unit's first on."""
        return {
            name: memory[at : at + math.prod(shape) * kind.itemsize].view(kind).view(shape)
            for name, (at, kind, shape) in self.places.items()
        }


class GpuWeights:
    """The units of a model on their way to a device.

    Raises CheckpointError where the files lack something, BudgetError where a tier is too small.
    """

    def __init__(
        self,
        graph: TaskGraph,
        source: CheckpointIndex | MemoryWeights,
        settings: GpuSettings,
        memory: GpuMemory,
    ) -> None:
        self._graph, self._memory = graph, memory
        self._reader = Reader(block_bytes=settings.block)
        self._store: WeightStore | MemoryWeights = (
            source
            if isinstance(source, MemoryWeights)
            else WeightStore(graph, source, self._reader)
        )
        self._packed: dict[tuple[str, int], Packed] = {}
        self.resident: dict[str, dict[Key, Tensors]] = {"hbm": {}, "ram": {}}
        self._ram_bytes: dict[Key, Tensor] = {}
        for tier in ("hbm", "ram"):
            self._load_resident(tier, list(_units(graph, settings, tier)))

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def packed(self, key: Key) -> Packed:
        """How a unit is packed."""
        kind, layer, _ = key
        at = kind, self._graph.layers[layer] if layer >= 0 else -1
        if at not in self._packed:
            self._packed[at] = Packed.of(_tensors(self._graph, kind, layer))
        return self._packed[at]

    def read(self, keys: Sequence[Key], buffer: Tensor) -> list[Tensors]:
        """Read units from disk into ``buffer`` [nbytes], the first at its beginning."""
        found: list[Tensors] = []
        view, at = _bytes(buffer), 0
        for key in keys:
            if isinstance(self._store, MemoryWeights):
                found += self._store.tensors(*_asked(key))
                continue
            unit = self._store.unit(*_asked(key))
            found += self._store.read(unit, view[at : at + unit.nbytes], streamed=True)
            at += unit.nbytes
        return found

    def copy(
        self, keys: Sequence[Key], staged: Mapping[Key, Tensors], buffer: Tensor
    ) -> list[Tensors]:
        """Copy units into ``buffer`` [nbytes] on the device, from ``staged`` or else from ram;
        returns their tensors there."""
        found, at = [], 0
        for key in keys:
            packed = self.packed(key)
            mine = buffer[at : at + packed.nbytes]
            views = packed.views(mine)
            if key in staged:
                for name, tensor in staged[key].items():
                    views[name].copy_(tensor, non_blocking=True)
            else:
                mine.copy_(self._ram_bytes[key], non_blocking=True)
            found.append(views)
            at += packed.nbytes
        return found

    def fetch(self, key: Key, names: Sequence[str]) -> Tensors:
        """Some tensors of a unit in ordinary memory of the host, wherever the unit is."""
        for tier in ("ram", "hbm"):
            if key in self.resident[tier]:
                unit = self.resident[tier][key]
                return {name: unit[name].to("cpu", copy=True) for name in names}
        if isinstance(self._store, MemoryWeights):
            return {n: t for n, t in self._store.tensors(*_asked(key))[0].items() if n in names}
        made = self.packed(key).views(torch.empty(self.packed(key).nbytes, dtype=torch.uint8))
        self._fill(self._store.unit(*_asked(key)), [made])
        return {name: made[name].clone() for name in names}

    def _load_resident(self, tier: str, keys: list[Key]) -> None:
        total = sum(self.packed(key).nbytes for key in keys)
        if not total:
            return
        held, at = self._memory.allocate(tier, total, "resident"), 0
        for key in keys:
            packed = self.packed(key)
            mine = held[at : at + packed.nbytes]
            views = self.resident[tier][key] = packed.views(mine)
            if tier == "ram":
                self._ram_bytes[key] = mine
            if isinstance(self._store, MemoryWeights):
                for name, tensor in self._store.tensors(*_asked(key))[0].items():
                    views[name].copy_(tensor)
            else:
                self._fill(self._store.unit(*_asked(key)), [views])
            at += packed.nbytes

    def _fill(self, unit: Unit, parts: Sequence[Tensors]) -> None:
        """Read a unit into tensors on any device, a block at a time."""
        block = min(BLOCK, max((s.entry.nbytes for part in unit.parts for s in part), default=0))
        with self._memory.scratch(-(-block // ALIGNMENT) * ALIGNMENT + 2 * ALIGNMENT) as scratch:
            view = _bytes(scratch)
            for part, tensors in zip(unit.parts, parts, strict=True):
                done: dict[str, int] = {}
                for slot in part:
                    name = slot.name.split(PIECE)[0]
                    stored = torch_dtype(slot.entry.dtype)
                    flat, count = tensors[name].view(-1), math.prod(slot.shape)
                    first = done.get(name, 0)
                    for begin in range(0, count, block // stored.itemsize):
                        size = min(count - begin, block // stored.itemsize)
                        offset = slot.entry.offset + begin * stored.itemsize
                        at = self._reader.read_into(
                            view, slot.entry.file, offset, size * stored.itemsize, stored.itemsize
                        )
                        read = scratch[at : at + size * stored.itemsize].view(stored)
                        flat[first + begin : first + begin + size].copy_(read)
                    done[name] = first + count


def _bytes(memory: Tensor) -> memoryview:
    """The bytes of a host's tensor [nbytes]."""
    array: Any = memory.numpy()
    return memoryview(array)


def _asked(key: Key) -> tuple[str, int, range]:
    """A unit as the weight store names it."""
    kind, layer, expert = key
    return kind, layer, range(expert, expert + 1) if expert >= 0 else range(0)


def _units(graph: TaskGraph, settings: GpuSettings, tier: str) -> Iterable[Key]:
    """What a tier holds for the whole run; experts first, none of them behind an odd size."""
    for layer, experts in enumerate(settings.experts):
        if experts is not None:
            for expert in experts.hbm if tier == "hbm" else experts.ram:
                yield "experts", layer, expert
    if settings.embed == tier and embed_weights(graph):
        yield "embed", -1, -1
    if settings.head == tier:
        yield "head", -1, -1
    for layer, place in enumerate(settings.dense):
        if place == tier:
            yield "dense", layer, -1


def _tensors(graph: TaskGraph, kind: str, layer: int) -> Iterable[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of a unit's tensors."""
    if kind == "experts":
        spec = experts_of(graph, layer)
        assert spec is not None
        return [(t.part, t.shape, t.dtype) for t in spec.tensors]
    if kind == "dense":
        weights = dense_weights(graph.body(layer))
    else:
        weights = embed_weights(graph) if kind == "embed" else head_weights(graph)
    return [(w.fqn, w.shape, w.dtype) for w in weights]
