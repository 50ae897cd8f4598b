"""Reads units of weights by name from a checkpoint into given memory, as tensors without a copy."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dovetail.ir.errors import CheckpointError
from dovetail.ir.placement import (
    beside_rows,
    dense_weights,
    embed_weights,
    experts_of,
    head_weights,
)
from dovetail.ir.task_graph import ITEMSIZE, TaskGraph, Weight
from dovetail.runtime.direct_io import Reader, direct_span
from dovetail.runtime.pools import tensor_view, torch_dtype
from dovetail.runtime.safetensors_index import CheckpointIndex, Run, TensorEntry, adjacent_runs

Tensors = dict[str, Tensor]
PIECE = "#"
"""Between a weight's name and the number of its piece."""
CONVERT_LIMIT = 4 << 20
"""Largest tensor of a streamed unit that may be converted to another dtype on the way."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A tensor of a unit: the name it goes by, where it is, and what the operators expect."""

    name: str
    entry: TensorEntry
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit's tensors and the reads that bring them: one mapping, or one per expert; ``numbers``
    are those of the runs that its tensors are in."""

    parts: tuple[tuple[_Slot, ...], ...]
    runs: tuple[Run, ...]
    numbers: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> int:
        """Buffer bytes that reading the unit takes."""
        return sum(direct_span(run.offset, run.nbytes) for run in self.runs)

    @property
    def payload(self) -> int:
        """Bytes of the tensors themselves."""
        return sum(run.nbytes for run in self.runs)


class WeightStore:
    """The checkpoint as units. Raises CheckpointError if a tensor that the graph reads is missing
    or of another shape."""

    def __init__(self, graph: TaskGraph, index: CheckpointIndex, reader: Reader) -> None:
        self._graph, self._index, self._reader = graph, index, reader
        self._units: dict[tuple[str, int, range], Unit] = {}

    def unit(self, kind: str, layer: int = -1, experts: range = range(0)) -> Unit:
        """The tensors of ``embed`` (or those ``beside rows`` of its tables), ``head``,
        ``dense[layer]`` or some of ``experts[layer]``."""
        key = (kind, layer, experts)
        if key not in self._units:
            parts = tuple(tuple(part) for part in self._parts(kind, layer, experts))
            runs = tuple(adjacent_runs([slot.entry for part in parts for slot in part]))
            number = {entry: n for n, run in enumerate(runs) for entry in run.entries}
            numbers = tuple(tuple(number[slot.entry] for slot in part) for part in parts)
            self._units[key] = Unit(parts, runs, numbers)
        return self._units[key]

    def read(self, unit: Unit, buffer: memoryview, *, streamed: bool) -> list[Tensors]:
        """Fill ``buffer`` (page-aligned, ``unit.nbytes`` at least) and return the tensors over it,
        one mapping for every part of the unit."""
        # Where the file's first byte would be, by the bytes of each run.
        starts: list[int] = []
        at = 0
        for run in unit.runs:
            span = direct_span(run.offset, run.nbytes)
            view = buffer[at : at + span]
            start = self._reader.read_into(view, run.file, run.offset, run.nbytes, run.align)
            starts.append(at + start - run.offset)
            at += span
        return [
            _joined(
                {
                    slot.name: _tensor(slot, buffer, starts[n] + slot.entry.offset, streamed)
                    for slot, n in zip(part, numbers, strict=True)
                }
            )
            for part, numbers in zip(unit.parts, unit.numbers, strict=True)
        ]

    def rows(self, name: str, rows: Tensor, buffer: memoryview) -> Tensor:
        """The given rows of a matrix that stays on disk: ``[n] -> [n, width]``. ``buffer`` holds
        one direct read of a row."""
        weight = next(w for w in embed_weights(self._graph) if w.fqn == name)
        entry = self._entry(weight.key, weight.shape)
        width = entry.nbytes // weight.shape[0]
        out = torch.empty((len(rows), *weight.shape[1:]), dtype=torch_dtype(weight.dtype))
        for i, row in enumerate(rows.tolist()):
            offset = entry.offset + row * width
            start = self._reader.read_into(buffer, entry.file, offset, width, entry.itemsize)
            out[i] = tensor_view(buffer, start, torch_dtype(entry.dtype), weight.shape[1:])
        return out

    def _parts(self, kind: str, layer: int, experts: range) -> Iterable[list[_Slot]]:
        if kind == "experts":
            spec = experts_of(self._graph, layer)
            assert spec is not None
            for expert in experts:
                yield [
                    _Slot(
                        t.part,
                        self._expert_entry(t.key, t.shape, layer, expert, t.stacked, spec.count),
                        t.shape,
                        t.dtype,
                    )
                    for t in spec.tensors
                ]
            return
        weights: Mapping[str, tuple[Weight, ...]] = {
            "embed": embed_weights(self._graph),
            "beside rows": beside_rows(self._graph),
            "head": head_weights(self._graph),
            "dense": dense_weights(self._graph.body(layer)) if layer >= 0 else (),
        }
        yield [slot for w in weights[kind] for slot in self._slots(w, layer)]

    def _slots(self, weight: Weight, layer: int) -> Iterable[_Slot]:
        if not weight.pieces:
            entry = self._entry(weight.key.format(layer=layer), weight.shape)
            yield _Slot(weight.fqn, entry, weight.shape, weight.dtype)
        for number, key in enumerate(weight.pieces):
            entry = self._entry(key.format(layer=layer))
            yield _Slot(f"{weight.fqn}{PIECE}{number}", entry, entry.shape, weight.dtype)

    def _expert_entry(
        self, key: str, shape: tuple[int, ...], layer: int, expert: int, stacked: bool, count: int
    ) -> TensorEntry:
        name = key.format(layer=layer, expert=expert)
        if not stacked:
            return self._entry(name, shape)
        whole = self._entry(name, (count, *shape), (count * shape[0], *shape[1:]))
        share = whole.nbytes // count
        return replace(
            whole,
            key=f"{name}[{expert}]",
            offset=whole.offset + expert * share,
            nbytes=share,
            shape=shape,
        )

    def _entry(self, key: str, *shapes: tuple[int, ...]) -> TensorEntry:
        """The entry of ``key``, which has one of ``shapes``."""
        entry = self._index.entries.get(key)
        if entry is None:
            raise CheckpointError(
                f"{self._index.directory}: the model reads tensor {key!r}, which none of the "
                f"{len(self._index.entries)} tensors is; the files belong to another model or are "
                "incomplete: download the checkpoint again"
            )
        if shapes and tuple(entry.shape) not in shapes:
            raise CheckpointError(
                f"{entry.file}: tensor {key!r} has shape {list(entry.shape)}, the model's config "
                f"expects {list(shapes[0])}; config.json and weights are from different models"
            )
        return entry


def _joined(tensors: Tensors) -> Tensors:
    """``tensors`` with those that come in pieces put together."""
    pieces: dict[str, list[Tensor]] = {}
    for name in [name for name in tensors if PIECE in name]:
        pieces.setdefault(name.split(PIECE)[0], []).append(tensors.pop(name))
    return tensors | {name: torch.cat(parts) for name, parts in pieces.items()}


def _tensor(slot: _Slot, buffer: memoryview, at: int, streamed: bool) -> Tensor:
    stored, wanted = slot.entry.dtype, slot.dtype
    tensor = tensor_view(buffer, at, torch_dtype(stored), slot.shape)
    if stored == wanted:
        return tensor
    if streamed and slot.entry.nbytes > CONVERT_LIMIT:
        raise CheckpointError(
            f"{slot.entry.file}: tensor {slot.entry.key!r} is stored as {stored} but the model "
            f"computes in {wanted}; weights that are streamed must be stored as they are used: "
            f"convert the checkpoint to {wanted}, or set its config's dtype to {stored}"
        )
    if ITEMSIZE[wanted] <= ITEMSIZE[stored]:
        # The converted tensor fits over the stored one, so that it needs no memory of its own.
        target = tensor_view(buffer, at, torch_dtype(wanted), slot.shape)
        return target.copy_(tensor.to(torch_dtype(wanted)))
    return tensor.to(torch_dtype(wanted))
