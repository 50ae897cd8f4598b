"""Your own modules and functions, compiled by a decorator.

python examples/compile_your_own.py
"""

# %% A module whose routed experts are transformers' own, and a class decorator on it.
import torch
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import dovetail

torch.manual_seed(0)
config = OlmoeConfig(hidden_size=128, intermediate_size=256, num_experts=16, num_experts_per_tok=4)
config._experts_implementation = "eager"


@dovetail.compile
class Tower(nn.Module):
    """Blocks of routed experts on top of each other."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OlmoeSparseMoeBlock(config) for _ in range(blocks))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        """``x [seqs, tokens, 128]``."""
        for block in self.blocks:
            x = x + block(x)
        return x


tower = Tower().eval()
x = torch.randn(4, 32, 128)
with torch.no_grad():
    y = tower(x)
print(tower)
print(tower.explain())

# %% A function is traced, and its routed experts scheduled, if that is measured to be faster.
block = tower.blocks[0]


@dovetail.compile
def twice(x: Tensor) -> Tensor:
    """The first block, twice."""
    out: Tensor = block(block(x))
    return out


config._experts_implementation = "grouped_mm"
with torch.no_grad():
    twice(x)
    twice(x)
print(twice)


# %% A Python loop over experts is recognised by what it computes.
class Loop(nn.Module):
    """Routed experts as many write them."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.router = nn.Linear(32, 16, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(16))
        self.capacity = capacity

    def forward(self, x: Tensor) -> Tensor:
        """``x [tokens, 32]``."""
        weights, index = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = (found[: self.capacity] for found in torch.where(index == number))
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out


loop = dovetail.compile(Loop().eval())
with torch.no_grad():
    loop(torch.randn(1, 32))
print(loop.explain())

# %% What is not recognised runs as it is, and a warning says what was found.
capped = dovetail.compile(Loop(capacity=3).eval())
with torch.no_grad():
    capped(torch.randn(5, 32))
print(capped.explain())
