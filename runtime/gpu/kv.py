"""KV of a GPU plan: a store in hbm, one in ram, and buffers for groups that are copied.

`plan, step -> views`: each group sees keys and values through a ``KvGroup``, wherever they are.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dovetail.ir.batching import Group, Member
from dovetail.ir.task_graph import ITEMSIZE, KvSpec
from dovetail.runtime.kv_store import KvArenas, KvGroup, KvHandle
from dovetail.runtime.pools import torch_dtype


class TierKv:
    """Keys and values of ``tokens`` tokens in every layer, over ``memory`` [nbytes]; zeros, since
    what a row does not hold yet is read and masked."""

    def __init__(self, specs: Sequence[KvSpec | None], tokens: int, memory: Tensor) -> None:
        self.tokens = tokens
        self._arenas: list[tuple[Tensor, Tensor] | None] = []
        at = 0
        for spec in specs:
            if spec is None or not tokens:
                self._arenas.append(None)
                continue
            size = tokens * spec.bytes_per_token
            self._arenas.append(layer_arenas(spec, tokens, memory[at : at + size].zero_()))
            at += size

    def arenas(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens of a layer."""
        arenas = self._arenas[layer]
        assert arenas is not None, f"layer {layer} keeps no KV here"
        return arenas


class OneLayerKv:
    """A buffer with the keys and values of a group in one layer, whichever is asked for; zeros at
    first, like a tier's."""

    def __init__(self, spec: KvSpec, tokens: int, memory: Tensor) -> None:
        self.tokens = tokens
        self._arenas = layer_arenas(spec, tokens, memory[: tokens * spec.bytes_per_token].zero_())

    def arenas(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values in the buffer."""
        return self._arenas


def layer_arenas(spec: KvSpec, tokens: int, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [tokens, key_heads, key_dim] and values likewise over bytes [nbytes]."""
    item, dtype = ITEMSIZE[spec.dtype], torch_dtype(spec.dtype)
    keys = tokens * spec.key_heads * spec.key_dim * item
    values = tokens * spec.value_heads * spec.value_dim * item
    return (
        memory[:keys].view(dtype).view(tokens, spec.key_heads, spec.key_dim),
        memory[keys : keys + values].view(dtype).view(tokens, spec.value_heads, spec.value_dim),
    )


def moved(group: Group, by: int) -> Group:
    """A group whose rows are ``by`` tokens further on in another store."""
    return replace(
        group, members=tuple(Member(m.index, m.offset + by, m.held) for m in group.members)
    )


def packed(group: Group) -> Group:
    """A group that decodes, its rows one after the other in a buffer, with room for a token."""
    stride = group.past + 1
    members = tuple(Member(m.index, i * stride, m.held) for i, m in enumerate(group.members))
    return replace(group, members=members, stride=stride)


class SentKv(KvGroup):
    """KV of a group whose home is ram, while it is computed on the device: what is new is kept in
    ``new``, by layer, until it has been sent. Prompts begin there, so nothing precedes them;
    groups that decode have what precedes them in buffers, ``rooms``, which are copied ahead."""

    def __init__(self, store: KvArenas, group: Group, device: torch.device) -> None:
        super().__init__(store, group, device)
        self.new: dict[int, tuple[Tensor, Tensor]] = {}
        self.rooms: dict[int, OneLayerKv] = {}

    def update(
        self, layer: int, k: Tensor, v: Tensor, *, materialise: bool = False
    ) -> tuple[Tensor, Tensor] | tuple[KvHandle, KvHandle]:
        """As ``KvGroup.update``."""
        self.new[layer] = k, v
        if not any(self.held):
            return k, v
        self.store = self.rooms.pop(layer)
        return super().update(layer, k, v, materialise=materialise)


class SteadyKv(KvGroup):
    """KV of rows that get a token in every step, ``width`` tokens of each seen as one view.

    ``started [seqs]`` says how much each row holds, ``put`` changes it; a mask hides the rest.
    """

    def __init__(self, store: TierKv, group: Group, width: int, device: torch.device) -> None:
        super().__init__(store, group, device)
        self.runs = tuple(replace(run, kv_len=width) for run in self.runs)
        self._width = width
        self.started = torch.zeros(len(group.members), dtype=torch.int64, device=device)
        self.put(group)

    def put(self, group: Group) -> None:
        """Be where this group's rows are now."""
        assert self._slots is not None
        held = torch.tensor([member.held for member in group.members])
        offsets = torch.tensor([member.offset for member in group.members])
        self.started.copy_(held)
        self._slots.copy_(offsets + held)

    def forget(self) -> None:
        """Remember nothing of an earlier run: a graph has to make its masks itself."""
        self._memo.clear()

    def _gather(self, arena: Tensor) -> Tensor:
        """Keys or values [seqs, heads, width, dim]: a view if the rows lie side by side."""
        views = self._views(arena)
        return views[0] if len(views) == 1 else torch.cat(views)


def bring_kv(ram: TierKv, layer: int, home: Group, there: OneLayerKv) -> None:
    """Copy what a group's rows hold from ram into its buffer, row by row: each is contiguous."""
    stride = home.past + 1
    for source, target in zip(ram.arenas(layer), there.arenas(layer), strict=True):
        for i, member in enumerate(home.members):
            held = source[member.offset : member.offset + member.held]
            target[i * stride : i * stride + member.held].copy_(held, non_blocking=True)


def send_kv(ram: TierKv, layer: int, home: Group, new: tuple[Tensor, Tensor]) -> None:
    """Copy new keys and values [seqs, heads, q_len, dim] to the group's rows in ram."""
    for arena, values in zip(ram.arenas(layer), new, strict=True):
        by_token = values.transpose(1, 2).contiguous()
        for i, (member, length) in enumerate(zip(home.members, home.lengths, strict=True)):
            start = member.offset + member.held
            arena[start : start + length].copy_(by_token[i, :length], non_blocking=True)


def kv_nbytes(specs: Sequence[KvSpec | None], tokens: int) -> int:
    """Bytes of a store of these layers."""
    return tokens * sum(spec.bytes_per_token for spec in specs if spec)
