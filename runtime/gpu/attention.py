"""Attention of a GPU executor, by torch's own kernels, on whatever device the tensors are.

``runtime.attention`` is the CPU's: its kernel is another, and what it does to save memory and
copies is for caches. This one leaves the choice of a kernel to torch.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.runtime.gpu.kv import SteadyKv
from dovetail.runtime.kv_store import KvGroup, KvHandle, kv_pieces
from dovetail.runtime.latent_attention import Expand, latent_attention


def gpu_attention(
    q: Tensor,
    keys: Tensor | KvHandle,
    values: Tensor | KvHandle,
    sinks: Tensor | None,
    scale: float,
    window: int,
    kv_group: KvGroup,
    chunk: int = 0,
    latent: Expand | None = None,
) -> Tensor:
    """Attention of ``q [seqs, q_heads, q_len, key_dim]``; returns ``[seqs, q_len, q_heads,
    value_dim]``.

    What each query sees is as in ``runtime.attention.attention``, and so are ``sinks`` and
    ``latent``.
    """
    if latent is not None:
        return latent_attention(
            gpu_attention, q, keys, values, scale, window, kv_group, chunk, latent
        )
    plain = not (any(kv_group.held) or window or chunk) and sinks is None and q.shape[2] > 1
    if plain:
        assert isinstance(keys, Tensor) and isinstance(values, Tensor)
        return _attend(q, keys, values, None, scale, None)
    parts = []
    q_len = q.shape[2]
    for first, last, k, v in kv_pieces(keys, values, q.shape[0]):
        rows = slice(first, last)
        shape = q_len, k.shape[2], window, chunk
        make = partial(_mask, _started(kv_group, rows, q.device), *shape, q.device)
        mask = kv_group.memo(("mask", first, last, *shape), make)
        parts.append(_attend(q[rows], k, v, sinks, scale, mask))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _started(kv_group: KvGroup, rows: slice, device: torch.device) -> Tensor:
    """How many tokens each row holds, ``[rows]``."""
    if isinstance(kv_group, SteadyKv):
        return kv_group.started[rows]
    return torch.tensor(kv_group.held[rows], device=device)


def _mask(
    started: Tensor, q_len: int, kv_len: int, window: int, chunk: int, device: torch.device
) -> Tensor:
    """Which keys each query sees, ``[rows, 1, q_len, kv_len]``."""
    query = started[:, None, None] + torch.arange(q_len, device=device)[:, None]
    key = torch.arange(kv_len, device=device)
    seen = key <= query
    if window:
        seen = seen & (key > query - window)
    if chunk:
        seen = seen & (key // chunk == query // chunk)
    return seen[:, None]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, mask: Tensor | None
) -> Tensor:
    """``[rows, q_len, q_heads, value_dim]``; without a mask each query sees those up to its own."""
    grouped = q.shape[1] != k.shape[1]
    if sinks is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    assert mask is not None
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    extra = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    return (weights.to(v.dtype) @ v).transpose(1, 2)
