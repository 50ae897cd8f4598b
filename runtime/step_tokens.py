"""The tokens of a step on all ranks, and the parts of them that one rank runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dovetail.ir.batching import Group, Step
from dovetail.ir.expert_dispatch import owners
from dovetail.ir.expert_rows import NUMBER, value_bytes
from dovetail.ir.task_graph import Value
from dovetail.runtime.exchange import packed
from dovetail.runtime.group_state import GroupState
from dovetail.runtime.kv_store import KvGroup, KvStore

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class StepTokens:
    """Every token of a step, known to all ranks: its prompt, position, place in the KV store, group
    and row; ``starts[group]`` are the numbers of the rows' first tokens."""

    step: Step
    prompt: Ints
    position: Ints
    slot: Ints
    group: Ints
    row: Ints
    starts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, step: Step) -> "StepTokens":
        """Number the tokens of a step, group by group and row by row."""
        prompt: list[Ints] = []
        position: list[Ints] = []
        slot: list[Ints] = []
        number: list[Ints] = []
        rows: list[Ints] = []
        starts, at = [], 0
        for place, group in enumerate(step.groups):
            firsts = []
            for row, (member, length) in enumerate(zip(group.members, group.lengths, strict=True)):
                firsts.append(at)
                at += length
                prompt.append(np.full(length, member.index))
                position.append(np.arange(member.held, member.held + length))
                slot.append(member.offset + position[-1])
                number.append(np.full(length, place))
                rows.append(np.full(length, row))
            starts.append(tuple(firsts))
        return cls(
            step,
            np.concatenate(prompt),
            np.concatenate(position),
            np.concatenate(slot),
            np.concatenate(number),
            np.concatenate(rows),
            tuple(starts),
        )

    @property
    def decode(self) -> tuple[int, ...]:
        """The groups in which every sequence has one token."""
        return tuple(i for i, group in enumerate(self.step.groups) if not group.prefill)

    def owned(self, number: int, rank: int, ranks: int) -> list[int]:
        """The rows of a group whose prompts are the rank's."""
        members = self.step.groups[number].members
        owner = owners([member.index for member in members], ranks)
        return [int(row) for row in np.flatnonzero(owner == rank)]

    def receivers(self) -> dict[int, int]:
        """The place among the sequences that get a token, by the number of their last one."""
        found: dict[int, int] = {}
        for group, starts in zip(self.step.groups, self.starts, strict=True):
            for row in group.receivers:
                found[starts[row] + group.lengths[row] - 1] = len(found)
        return found


@dataclass(slots=True, eq=False)
class Part:
    """Tokens of one group that a rank runs through the dense part of a layer together."""

    group: int
    state: GroupState
    numbers: Ints
    moving: bool

    @classmethod
    def of(
        cls,
        tokens: StepTokens,
        group: int,
        rows: Sequence[int],
        store: KvStore,
        values: dict[str, Tensor],
        *,
        moving: bool,
    ) -> "Part":
        """The part of some rows of a group; ``values`` are theirs."""
        whole, starts = tokens.step.groups[group], tokens.starts[group]
        numbers = [np.arange(starts[row], starts[row] + whole.lengths[row]) for row in rows]
        own = rows_of(whole, rows)
        state = GroupState(own, KvGroup(store, own), 0, values)
        return cls(group, state, np.concatenate(numbers), moving)

    def last_numbers(self) -> Ints:
        """The numbers of the last tokens of the rows that get one, in their order."""
        ends = np.cumsum(self.state.group.lengths) - 1
        found: Ints = self.numbers[ends[list(self.state.group.receivers)]]
        return found


def rows_of(group: Group, rows: Sequence[int]) -> Group:
    """Some rows of a group as a group."""
    lengths = tuple(group.lengths[row] for row in rows)
    return Group(
        prefill=group.prefill,
        members=tuple(group.members[row] for row in rows),
        lengths=lengths,
        q_len=max(lengths),
        stride=group.stride,
        unfinished=tuple(i for i, row in enumerate(rows) if row in group.unfinished),
    )


def by_row(values: Tensor, seqs: int, rows: Sequence[int]) -> Tensor:
    """Rows of a value with one row for each sequence; one that all share stays as it is."""
    return values[torch.tensor(rows)] if values.shape[0] == seqs else values


def carried_rows(parts: Sequence[Part], values: Mapping[str, Value]) -> Tensor:
    """The rows that tokens take along when they move, part by part."""
    width = sum(map(value_bytes, values.values())) + NUMBER
    rows = [torch.empty((0, width), dtype=torch.uint8)]
    for part in parts:
        count = len(part.numbers)
        columns = [part.state.values[name].reshape(count, -1) for name in values]
        rows.append(packed(*columns, torch.from_numpy(part.numbers).to(torch.int32)))
    return torch.cat(rows)
