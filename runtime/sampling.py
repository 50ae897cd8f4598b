"""Choosing the next token: greedy, or sampled from a seed that no schedule can disturb.

The random number of a token depends on the seed, the prompt's index and the token's position alone,
so the same command gives the same text under any plan and after any interruption.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.ir.errors import InputError


@dataclass(frozen=True, slots=True)
class Sampling:
    """``temperature`` 0 is greedy; otherwise ``top_k`` (0: all) and ``top_p`` cut the tail."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(
                f"temperature must be >= 0, found {self.temperature}; 0 is greedy, 1 as trained"
            )
        if self.top_k < 0:
            raise InputError(f"top-k must be >= 0, found {self.top_k}; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be in (0, 1], found {self.top_p}; 1 keeps all tokens")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


def choose(logits: Tensor, sampling: Sampling, who: list[tuple[int, int]]) -> Tensor:
    """Next tokens ``[n]`` from ``logits [n, vocab]``; ``who`` has each row's (prompt index, how
    many tokens it has generated)."""
    if sampling.greedy:
        return logits.argmax(-1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k and sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    ranked, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    mass = ranked.cumsum(-1)
    # A token stays while the mass before it is below top_p, so the likeliest always stays.
    ranked = ranked.masked_fill(mass - ranked >= sampling.top_p, 0.0)
    mass = ranked.cumsum(-1)
    draws = torch.tensor([_uniform(sampling.seed, *one) for one in who]).unsqueeze(1)
    place = torch.searchsorted(mass, draws * mass[:, -1:], right=True)
    # Rounding can put a draw on the whole mass, past which nothing that was kept is left.
    place = torch.minimum(place, (ranked > 0).sum(-1, keepdim=True) - 1)
    return order.gather(-1, place).squeeze(-1)


def _uniform(seed: int, index: int, made: int) -> float:
    return random.Random(f"{seed}:{index}:{made}").random()
