"""Warm-up: touch what every run needs of the libraries before memory is measured.

Kernels page in code, and libraries keep buffers and generated code per thread. None of that is the
model's memory, so it belongs to the interpreter's share and is brought in first.
"""

import torch
from torch.nn import functional as F

from dovetail.ir.batching import Group, Member
from dovetail.ir.task_graph import Experts, KvSpec
from dovetail.runtime.attention import attention
from dovetail.runtime.kv_store import KvGroup, KvStore
from dovetail.runtime.pools import TierBudget
from dovetail.runtime.sampling import Sampling, choose
from dovetail.runtime.tokens import TokenBuffers

_TOKENS, _WIDTH, _HEADS = 16, 64, 4


def warm_up(dtype: torch.dtype) -> None:
    """Run the operators of the known model families once, on small zeros, on this thread."""
    with torch.inference_mode():
        x = torch.zeros((_TOKENS, _WIDTH), dtype=dtype)
        _elementwise(x)
        _products(dtype)
        _attend(dtype)
        _route(x)
        choose(x.repeat(1, 4), Sampling(), [])


def _elementwise(x: torch.Tensor) -> None:
    ids = torch.zeros((1, _TOKENS), dtype=torch.int64)
    h = F.embedding(ids, x).view(1, _TOKENS, _WIDTH)
    wide = h.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    half = torch.cat([-h[..., 32:], h[..., :32]], -1)
    turned = h * normed.cos().to(h.dtype) + half * normed.sin().to(h.dtype)
    F.silu(turned).mul(h).sub(1.0).neg().clamp(-1.0, 1.0).sigmoid().contiguous()
    scores = wide[0].softmax(-1)
    value, index = scores.topk(4)
    (value / value.sum(-1, keepdim=True)).to(h.dtype)
    scores.gather(1, index).masked_fill(index > 1, float("-inf")).argmax(-1)
    torch.zeros_like(scores).scatter_(1, index, 1).bool().logical_not()


def _products(dtype: torch.dtype) -> None:
    weight = torch.zeros((256, 256), dtype=dtype)
    for rows in (1, 2, 16, 256):
        y = F.linear(weight[:rows], weight)
        torch.addmm(y[0], y, weight)
    y.float() @ weight.float()


def _attend(dtype: torch.dtype) -> None:
    dim = _WIDTH // _HEADS
    name = str(dtype).removeprefix("torch.")
    spec = KvSpec(_HEADS, dim, _HEADS, dim, name)
    with KvStore([spec], 4 * _TOKENS) as store:
        lengths = (_TOKENS, _TOKENS - 4)
        for prefill in (True, False):
            held = (0, 0) if prefill else lengths
            members = tuple(Member(i, i * 2 * _TOKENS, n) for i, n in enumerate(held))
            fresh = lengths if prefill else (1, 1)
            group = Group(prefill, members, fresh, max(fresh), 2 * _TOKENS)
            state = KvGroup(store, group)
            q = torch.zeros((2, _HEADS, group.q_len, dim), dtype=dtype)
            keys, values = state.update(0, q, q)
            attention(q, keys, values, None, 0.25, 0, state)


def _route(x: torch.Tensor) -> None:
    spec = Experts(4, 2, _WIDTH, _WIDTH, (), (), split_gate=True)
    tokens = TokenBuffers([spec], _TOKENS, 1, x.dtype, TierBudget(1 << 30))
    index = torch.arange(2 * _TOKENS).view(_TOKENS, 2) % 4
    tokens.put(0, x, index, index.float())
    routing = tokens.route(_TOKENS, spec, list(range(4)))
    rows = routing.rows[: routing.offsets[1]]
    y = tokens.x.index_select(0, rows).float().mul_(routing.weights[: routing.offsets[1]])
    tokens.sums[0].index_add_(0, rows, y)
    tokens.take(0, _TOKENS, x.dtype)
    tokens.close()
