"""Groups of sequences on their way through a GPU program: values on the device and on the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dovetail.ir.batching import Group, Member
from dovetail.ir.gpu_settings import GpuGroup, GpuSettings
from dovetail.runtime.gpu.device import ComputeDevice
from dovetail.runtime.gpu.kv import SentKv, TierKv, moved, packed
from dovetail.runtime.kv_store import KvGroup

Values = dict[str, Tensor]
HOST = torch.device("cpu")


@dataclass(slots=True)
class GroupState:
    """A group in the current step; emitted functions call it ``g``.

    ``start`` is its first row in the step's token buffers, ``valid`` the places that are not
    padding, ``home`` the group as the store of its tier has it.
    """

    info: GpuGroup
    home: Group
    kv: KvGroup
    start: int
    valid: Tensor | None
    values: Values
    host: "HostState"
    done: int = -1

    @property
    def seqs(self) -> int:
        """Sequences."""
        return len(self.info.group.members)

    @property
    def q_len(self) -> int:
        """New tokens of a sequence, with padding."""
        return self.info.group.q_len

    @property
    def past(self) -> int:
        """Tokens before, of the longest."""
        return self.info.group.past

    @property
    def tokens(self) -> int:
        """New tokens, without padding."""
        return sum(self.info.group.lengths)

    @property
    def last(self) -> int:
        """The last layer that it takes; a number of no layer if that is the model's last."""
        layers = self.info.group.layers
        return layers[1] - 1 if layers is not None else 1 << 30

    def last_hidden(self) -> Tensor:
        """The hidden state of the last new token of every sequence that gets a token, ``[receivers,
        1, hidden]``."""
        group, hidden = self.info.group, self.values.pop("hidden")
        if group.q_len == 1 and not group.unfinished:
            return hidden
        rows = torch.tensor(group.receivers, dtype=torch.int64, device=hidden.device)
        last = torch.tensor(group.lengths, device=hidden.device) - 1
        return hidden[rows, last[rows]].unsqueeze(1)


@dataclass(slots=True)
class HostState:
    """The part of a group that the CPU computes; emitted functions call it ``g`` too."""

    seqs: int
    q_len: int
    past: int
    kv: KvGroup | None
    values: Values = field(default_factory=dict)


class GroupStates:
    """Makes the states of a step's groups; ``kept`` has the values of those that go on in a later
    step, by their members."""

    def __init__(
        self, settings: GpuSettings, device: ComputeDevice, stores: Mapping[str, TierKv]
    ) -> None:
        self._settings, self._device, self._stores = settings, device, stores
        self.kept: dict[tuple[Member, ...], Values] = {}

    def of(
        self, groups: Sequence[GpuGroup], inputs: Sequence[Mapping[str, Tensor]]
    ) -> list[GroupState]:
        """The states, in the groups' order. Groups that take all layers have the first tokens, so
        that the tokens of any layer are the first ones."""
        found: list[GroupState | None] = [None] * len(groups)
        start = 0
        for i in sorted(range(len(groups)), key=lambda i: groups[i].group.layers is not None):
            found[i] = self._state(groups[i], inputs[i], start)
            start += sum(groups[i].group.lengths)
        return [state for state in found if state is not None]

    def _state(self, info: GpuGroup, inputs: Mapping[str, Tensor], start: int) -> GroupState:
        group, wall, at = info.group, self._settings.admission.wall, self._device.compute
        home = group if info.home == "hbm" else moved(group, -wall)
        store = self._stores[info.home]
        kv: KvGroup
        if info.home == "hbm":
            kv = KvGroup(store, home, at)
        elif info.kind == "copied":
            kv = SentKv(_Room(len(group.members) * (group.past + 1)), packed(group), at)
        else:
            kv = SentKv(store, home, at)
        host = HostState(
            len(group.members),
            group.q_len,
            group.past,
            KvGroup(store, home) if info.kind == "cpu" else None,
            dict(inputs),
        )
        valid = None
        if sum(group.lengths) != group.tokens:
            lengths = torch.tensor(group.lengths).unsqueeze(1)
            mask = torch.arange(group.q_len).unsqueeze(0) < lengths
            valid = mask.reshape(-1).nonzero().squeeze(1).to(at)
        goes_on = group.layers is not None and group.layers[0] > 0
        values = (
            self.kept.pop(group.members)
            if goes_on
            else {name: value.to(at) for name, value in inputs.items()}
        )
        return GroupState(info, home, kv, start, valid, values, host)


@dataclass(frozen=True, slots=True)
class _Room:
    """Stands for a group's buffer before there is one."""

    tokens: int

    def arenas(self, layer: int) -> tuple[Tensor, Tensor]:
        """No buffer yet."""
        raise AssertionError(f"layer {layer}: the group's KV has not been copied yet")
