"""A group of sequences on its way through the model in one step."""

import torch
from torch import Tensor

from dovetail.ir.batching import Group
from dovetail.runtime.kv_store import KvGroup


class GroupState:
    """A group of sequences in the current step: its dims, values by name, and KV access."""

    __slots__ = ("group", "kv", "past", "q_len", "seqs", "start", "tokens", "valid", "values")

    def __init__(self, group: Group, kv: KvGroup, start: int, values: dict[str, Tensor]) -> None:
        self.group, self.kv, self.start, self.values = group, kv, start, values
        self.seqs, self.q_len = len(group.members), group.q_len
        self.past = group.past
        self.tokens = sum(group.lengths)
        self.valid: Tensor | None = None
        if self.tokens != group.tokens:
            lengths = torch.tensor(group.lengths).unsqueeze(1)
            mask = torch.arange(group.q_len).unsqueeze(0) < lengths
            self.valid = mask.reshape(-1).nonzero().squeeze(1)

    def last_hidden(self) -> Tensor:
        """The hidden state of the last new token of every sequence that gets a token in this step,
        ``[receivers, 1, hidden]``."""
        hidden = self.values.pop("hidden")
        if self.q_len == 1 and not self.group.unfinished:
            return hidden
        rows = torch.tensor(self.group.receivers, dtype=torch.int64)
        last = torch.tensor(self.group.lengths) - 1
        return hidden[rows, last[rows]].unsqueeze(1)
