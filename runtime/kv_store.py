"""The KV store on the CPU: two token-major arenas per layer, and the groups that read them.

A sequence owns the ``stride`` tokens from its ``Member.offset`` on, of which the first ``held``
are filled. Neighbouring sequences of a cohort are a **run**, whose keys are one strided view.
"""

import math
import mmap
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dovetail.ir.batching import Group, Member
from dovetail.ir.task_graph import ITEMSIZE, KvSpec
from dovetail.runtime.pools import tensor_view, torch_dtype

T = TypeVar("T")


def anonymous(nbytes: int) -> memoryview:
    """Page-aligned memory of this process, zero until written; mapped until its last view goes."""
    return memoryview(mmap.mmap(-1, nbytes))


def store_nbytes(specs: Sequence[KvSpec | None], tokens: int) -> int:
    """Bytes that a ``KvStore`` of these layers and ``tokens`` allocates, in whole pages."""
    sizes = (size for spec in specs if spec for size in _arena_bytes(spec, tokens))
    return sum(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes)


class KvStore:
    """Keys ``[tokens, key_heads, key_dim]`` and values likewise for every layer that has a spec.

    ``allocate(nbytes)`` gives page-aligned zeroed memory, such as ``Arena.view`` of a budgeted
    arena of ``store_nbytes``. Memory counts towards the process's RSS as tokens are written.
    """

    def __init__(
        self,
        specs: Sequence[KvSpec | None],
        tokens: int,
        allocate: Callable[[int], memoryview] = anonymous,
    ) -> None:
        assert tokens > 0, "a KV store holds at least one token"
        self.tokens = tokens
        self.nbytes = store_nbytes(specs, tokens)
        # Made outside of inference mode, a tensor may be written in it and out of it.
        with torch.inference_mode(False):
            self._arenas = [
                None if spec is None else _arenas(spec, tokens, allocate) for spec in specs
            ]

    def arenas(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens of a layer."""
        arenas = self._arenas[layer]
        assert arenas is not None, f"layer {layer} keeps no KV"
        return arenas

    def close(self) -> None:
        """Lets the memory go; what ``allocate`` gave is unmapped or reused by its owner."""
        self._arenas.clear()
        self.nbytes = 0

    def __enter__(self) -> "KvStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Run:
    """Rows ``first`` to ``last`` (exclusive) of a group that lie side by side in the store from
    token ``offset`` on; the longest has ``kv_len`` tokens, this step's new ones included."""

    first: int
    last: int
    offset: int
    kv_len: int


@dataclass(frozen=True, slots=True)
class KvHandle:
    """Keys or values of a group where they lie: a view ``[rows, heads, kv_len, dim]`` per run.

    Positions past a row's own tokens hold stale numbers, which are finite.
    """

    runs: tuple[Run, ...]
    views: tuple[Tensor, ...]


class KvArenas(Protocol):
    """Keys and values of every layer that keeps any, token by token."""

    @property
    def tokens(self) -> int:
        """How many tokens fit."""

    def arenas(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens of a layer."""


class KvGroup:
    """One step's view of the store for a group: indices are worked out once, for all layers."""

    def __init__(self, store: KvArenas, group: Group, device: torch.device | None = None) -> None:
        self.store = store
        self.group = group
        self.held = tuple(member.held for member in group.members)
        self.lengths = group.lengths
        ends = [held + new for held, new in zip(self.held, self.lengths, strict=True)]
        assert max(ends) <= group.stride, f"a row of {group.stride} tokens gets {max(ends)}"
        last = max(member.offset for member in group.members)
        assert last + group.stride <= store.tokens, "a row lies beyond the KV store"
        self.runs = _runs(group.members, ends, group.stride)
        slots = [member.offset + member.held for member in group.members]
        self._slots = torch.tensor(slots, device=device) if group.q_len == 1 else None
        self._memo: dict[Hashable, Any] = {}

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gave the first time for ``key``: tables that all layers share."""
        if key not in self._memo:
            self._memo[key] = make()
        value: T = self._memo[key]
        return value

    def update(
        self, layer: int, k: Tensor, v: Tensor, *, materialise: bool = False
    ) -> tuple[Tensor, Tensor] | tuple[KvHandle, KvHandle]:
        """Store this step's keys and values ``[seqs, heads, q_len, dim]``; returns all of them.

        Where no row holds any yet, these are ``k`` and ``v``. Otherwise handles that ``attention``
        reads in place, or with ``materialise`` tensors ``[seqs, heads, past + q_len, dim]``.
        Right padding is not stored.
        """
        keys, values = self.store.arenas(layer)
        self._write(keys, k)
        self._write(values, v)
        if not any(self.held):
            return k, v
        if materialise:
            return self._gather(keys), self._gather(values)
        return KvHandle(self.runs, self._views(keys)), KvHandle(self.runs, self._views(values))

    def _write(self, arena: Tensor, new: Tensor) -> None:
        """Copies the valid tokens of ``new`` to their slots."""
        if self._slots is not None:
            arena.index_copy_(0, self._slots, new[:, :, 0])
            return
        for row, (member, length) in enumerate(zip(self.group.members, self.lengths, strict=True)):
            start = member.offset + member.held
            arena[start : start + length].copy_(new[row, :, :length].transpose(0, 1))

    def _views(self, arena: Tensor) -> tuple[Tensor, ...]:
        return tuple(_view(arena, run, self.group.stride, run.kv_len) for run in self.runs)

    def _gather(self, arena: Tensor) -> Tensor:
        """Keys or values as one tensor: a view if the rows lie side by side."""
        total = self.group.past + self.group.q_len
        if len(self.runs) == 1 and self.runs[0].kv_len == total:
            return self._views(arena)[0]
        shape = (len(self.held), total, *arena.shape[1:])
        gathered = torch.zeros(shape, dtype=arena.dtype, device=arena.device).transpose(1, 2)
        for run, view in zip(self.runs, self._views(arena), strict=True):
            gathered[run.first : run.last, :, : run.kv_len].copy_(view)
        return gathered


def _arena_bytes(spec: KvSpec, tokens: int) -> tuple[int, int]:
    item = tokens * ITEMSIZE[spec.dtype]
    return item * spec.key_heads * spec.key_dim, item * spec.value_heads * spec.value_dim


def _arenas(
    spec: KvSpec, tokens: int, allocate: Callable[[int], memoryview]
) -> tuple[Tensor, Tensor]:
    dtype = torch_dtype(spec.dtype)
    key_bytes, value_bytes = _arena_bytes(spec, tokens)
    key_shape = (tokens, spec.key_heads, spec.key_dim)
    value_shape = (tokens, spec.value_heads, spec.value_dim)
    return (
        tensor_view(allocate(key_bytes), 0, dtype, key_shape),
        tensor_view(allocate(value_bytes), 0, dtype, value_shape),
    )


def _runs(members: Sequence[Member], ends: Sequence[int], stride: int) -> tuple[Run, ...]:
    """Splits the rows where the next one does not lie ``stride`` tokens after the last."""
    starts = [
        row
        for row in range(len(members))
        if row == 0 or members[row].offset != members[row - 1].offset + stride
    ]
    return tuple(
        Run(first, last, members[first].offset, max(ends[first:last]))
        for first, last in zip(starts, [*starts[1:], len(members)], strict=True)
    )


def _view(arena: Tensor, run: Run, stride: int, kv_len: int) -> Tensor:
    """The run's first ``kv_len`` tokens per row as ``[rows, heads, kv_len, dim]``."""
    heads, dim = arena.shape[1:]
    token = math.prod(arena.shape[1:])
    start = arena.storage_offset() + run.offset * token
    shape = (run.last - run.first, heads, kv_len, dim)
    return arena.as_strided(shape, (stride * token, dim, token, 1), start)


def kv_pieces(
    keys: Tensor | KvHandle, values: Tensor | KvHandle, seqs: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """First and last row (exclusive) with their keys and values ``[rows, heads, kv_len, dim]``."""
    if isinstance(keys, Tensor):
        assert isinstance(values, Tensor)
        yield 0, seqs, keys, values
        return
    assert isinstance(values, KvHandle)
    for run, k, v in zip(keys.runs, keys.views, values.views, strict=True):
        yield run.first, run.last, k, v
