"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2) from its latents.

With one query a sequence, the matrices that expand latents to keys and values are absorbed into the
query and the result: attention then reads each token's latent once, for all heads, as in the
paper's equations for inference. With many queries, expanding once is less work than that.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dovetail.runtime.kv_store import KvGroup, KvHandle
from dovetail.runtime.linear import TiledLinear

Attend = Callable[[Tensor, Tensor, Tensor, None, float, int, KvGroup, int], Tensor]
Expand = tuple[Callable[[Tensor, Tensor], Tensor], Tensor]
"""The product that expands latents, and its weight ``[heads * (own + value), latent]``."""


def latent_attention(
    attend: Attend,
    q: Tensor,
    latents: Tensor | KvHandle,
    rotary: Tensor | KvHandle,
    scale: float,
    window: int,
    kv_group: KvGroup,
    chunk: int,
    expand: Expand,
) -> Tensor:
    """Attention of ``q [seqs, heads, q_len, own + rotary]`` over ``latents [seqs, 1, kv_len,
    latent]`` and ``rotary [seqs, 1, kv_len, rotary]``; ``[seqs, q_len, heads, value]``."""
    assert isinstance(latents, Tensor) and isinstance(rotary, Tensor)
    product, weight = expand
    heads, own = q.shape[1], q.shape[3] - rotary.shape[3]
    if q.shape[2] > 1:
        seqs, _, length, _ = latents.shape
        whole = product(latents, weight).view(seqs, length, heads, -1).transpose(1, 2)
        shared = rotary.expand(-1, heads, -1, -1)
        keys = torch.cat((whole[..., :own], shared), -1)
        return attend(q, keys, whole[..., own:], None, scale, window, kv_group, chunk)
    matrices = weight.view(heads, -1, weight.shape[1])
    of_keys, of_values = matrices[:, :own], matrices[:, own:]
    inner = _batched(product, q[:, :, 0, :own].transpose(0, 1), of_keys).transpose(0, 1)
    query = torch.cat((inner, q[:, :, 0, own:]), -1).unsqueeze(2)
    # As values, what is beyond the latent is of no use, but keys and values are then one tensor.
    keys = torch.cat((latents, rotary), -1)
    mixed = attend(query, keys, keys, None, scale, window, kv_group, chunk)
    mixed = mixed[:, 0, :, : weight.shape[1]].transpose(0, 1)
    return _batched(product, mixed, of_values.transpose(1, 2)).transpose(0, 1).unsqueeze(1)


def _batched(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor) -> Tensor:
    """``x [heads, rows, in] @ weights [heads, in, out]``, tiled as ``product`` is."""
    if isinstance(product, TiledLinear):
        return product.batched(x, weights)
    return torch.bmm(x, weights)
