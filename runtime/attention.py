"""Attention on the CPU over ragged groups: causal, windowed, chunked, grouped queries, sinks.

Everything runs in PyTorch's flash kernel for the CPU, in float32. For bfloat16 and float16 that is
also the fast way: a tile of keys is converted once into a buffer that stays in the cache, while
the kernel's own products of few 16-bit rows are several times slower. The kernel returns each
query's log-sum-exp too, which joins tiles of keys and adds sinks without a further column.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.runtime.kv_store import KvGroup, KvHandle, kv_pieces
from dovetail.runtime.latent_attention import Expand, latent_attention

SCRATCH_BYTES = 4 << 20
"""Bytes of converted keys and values that each thread keeps for decoding."""
PROMPT_BYTES = 4 << 20
"""Bytes of converted queries, keys, values and results at one time in prefill, unless a single
key head of a single row needs more."""

_FLOAT = 4
_MASKED_QUERIES = 256
_TILE_TOKENS = 128
# Rows of unequal length share a call while the padding that this adds, in bytes of converted keys
# and values, takes less time than another call.
_CALL_BYTES = 256 << 10


def attention(
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
    value_dim]``, contiguous unless keys and values are given as latents.

    Query s of a row sits at position p = held + s and sees key j if j <= p and, with a ``window``
    other than 0, j > p - window, with a ``chunk`` other than 0, j // chunk == p // chunk. Keys and
    values are tensors ``[seqs, kv_heads, kv_len, dim]`` or handles from ``KvGroup.update``.
    ``sinks [q_heads]`` are logits of a further key whose value is zero. Padded queries get finite
    numbers. With ``latent``, keys are latents and values rotary keys (``latent_attention``).
    """
    if latent is not None:
        return latent_attention(attention, q, keys, values, scale, window, kv_group, chunk, latent)
    seqs, heads, q_len, _ = q.shape
    dim = (values if isinstance(values, Tensor) else values.views[0]).shape[-1]
    # Every position is written, except for padding.
    make = torch.empty if min(kv_group.lengths) == q_len else torch.zeros
    out = make(seqs, q_len, heads, dim, dtype=q.dtype)
    logits = None if sinks is None else sinks.float()
    for first, last, k, v in kv_pieces(keys, values, seqs):
        rows = slice(first, last)
        piece = _Piece(q[rows], k, v, logits, scale, window, chunk, out[rows])
        if q_len == 1:
            _decode(piece, kv_group, first, last)
        else:
            _prompt(piece, kv_group.held[rows], kv_group.lengths[rows])
    return out


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a group whose keys are one tensor, and their part of the result."""

    q: Tensor
    keys: Tensor
    values: Tensor
    sinks: Tensor | None
    scale: float
    window: int
    chunk: int
    out: Tensor

    @property
    def dim(self) -> int:
        """Width of the kernel's heads: it wants keys and values alike, so we add zeros."""
        return max(self.keys.shape[-1], self.values.shape[-1])


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Result ``[rows, q_heads, q_len, dim]`` and log-sum-exp ``[rows, q_heads, q_len]``.

    The operator under ``scaled_dot_product_attention``, which keeps the second one to itself.
    """
    result: tuple[Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    )
    return result


def _weigh(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Adds ``exp(sinks)`` to the softmax's denominator, in place."""
    return out.mul_(torch.sigmoid(lse - sinks).unsqueeze(-1))


def _widened(x: Tensor, dim: int) -> Tensor:
    """``x`` in float32 with zeros up to ``dim`` on the last axis; ``x`` itself if it is so."""
    return F.pad(x.float(), (0, dim - x.shape[-1])) if x.shape[-1] < dim else x.float()


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows ``first`` to ``last`` and keys ``begin`` to ``end`` (both exclusive) of one call;
    ``mask [rows, 1, 1, keys]`` is added to the scores."""

    first: int
    last: int
    begin: int
    end: int
    mask: Tensor | None


class _Scratch(threading.local):
    """Each thread's buffer: halves for keys and values."""

    def __init__(self) -> None:
        # Made outside of inference mode, a tensor may be written in it and out of it.
        with torch.inference_mode(False):
            self.halves = torch.empty(2, SCRATCH_BYTES // 2 // _FLOAT)


_scratch = _Scratch()


def _decode(piece: _Piece, kv_group: KvGroup, first: int, last: int) -> None:
    """One new token per row: the query heads of a key head are the rows of one small product."""
    seqs, kv_heads = piece.keys.shape[:2]
    head_bytes = 2 * piece.dim * _FLOAT
    heads = max(1, min(kv_heads, SCRATCH_BYTES // (head_bytes * _TILE_TOKENS)))
    limit = SCRATCH_BYTES // (head_bytes * heads)
    if _fits(piece.keys, piece.dim) and _fits(piece.values, piece.dim):
        heads, limit = kv_heads, sys.maxsize
    waste = _CALL_BYTES // (head_bytes * heads)
    tiles = kv_group.memo(
        ("tiles", first, last, piece.window, piece.chunk, limit),
        lambda: _tiles(kv_group.held[first:last], piece.window, piece.chunk, limit, waste),
    )
    q = _widened(piece.q.reshape(seqs, kv_heads, -1, piece.q.shape[-1]), piece.dim)
    out = piece.out.view(seqs, kv_heads, -1, piece.out.shape[-1])
    sinks = None if piece.sinks is None else piece.sinks.view(kv_heads, -1)
    for tile in tiles:
        rows, span = slice(tile.first, tile.last), slice(tile.begin, tile.end)
        for head in range(0, kv_heads, heads):
            part = slice(head, head + heads)
            k, v = piece.keys[rows, part, span], piece.values[rows, part, span]
            result, lse = _decode_tile(q[rows, part], k, v, piece, tile.mask, limit)
            if sinks is not None:
                result = _weigh(result, lse, sinks[part])
            out[rows, part].copy_(result[..., : out.shape[-1]])


def _decode_tile(
    q: Tensor, k: Tensor, v: Tensor, piece: _Piece, mask: Tensor | None, limit: int
) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp of a tile; a row of more than ``limit`` tokens goes in parts."""
    rows, _, tokens, _ = k.shape
    parts = -(-rows * tokens // limit)
    assert parts == 1 or (rows == 1 and mask is None)
    step = -(-tokens // parts)
    joined: tuple[Tensor, Tensor] | None = None
    for start in range(0, tokens, step):
        span = slice(start, start + step)
        keys = _staged(k[:, :, span], piece.dim, 0)
        part = _flash(q, keys, _staged(v[:, :, span], piece.dim, 1), piece.scale, mask)
        joined = part if joined is None else _join(joined, part)
    assert joined is not None
    return joined


def _join(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both."""
    lse = torch.logaddexp(a[1], b[1])
    share_a, share_b = ((x[1] - lse).exp().unsqueeze(-1) for x in (a, b))
    return a[0] * share_a + b[0] * share_b, lse


def _fits(x: Tensor, dim: int) -> bool:
    """Whether the kernel can read ``x`` where it lies."""
    return x.dtype == torch.float32 and x.shape[-1] == dim and x.stride(-1) == 1


def _staged(x: Tensor, dim: int, half: int) -> Tensor:
    """``x [rows, heads, tokens, own]`` in float32 and ``dim`` wide, in scratch unless it is so."""
    rows, heads, tokens, own = x.shape
    if _fits(x, dim):
        return x
    flat = _scratch.halves[half, : rows * heads * tokens * dim]
    # Copied in the order in which it lies: long contiguous stretches convert fastest.
    token_major = x.stride(1) < x.stride(2)
    if token_major:
        staged = flat.view(rows, tokens, heads, dim).transpose(1, 2)
    else:
        staged = flat.view(rows, heads, tokens, dim)
    staged[..., :own].copy_(x)
    staged[..., own:].zero_()
    return staged


def _first_seen(position: int, window: int, chunk: int) -> int:
    """The first key that the query at ``position`` sees."""
    low = max(0, position + 1 - window) if window else 0
    return max(low, position // chunk * chunk) if chunk else low


def _tiles(
    held: Sequence[int], window: int, chunk: int, limit: int, waste: int
) -> tuple[_Tile, ...]:
    """Groups neighbouring rows of like length, with at most ``limit`` tokens in a tile of several
    rows and at most ``waste`` tokens of padding added by each."""
    spans = [(_first_seen(n, window, chunk), n + 1) for n in held]
    tiles = []
    first, (begin, end) = 0, spans[0]
    for row, (low, high) in enumerate(spans[1:], 1):
        wide = (min(begin, low), max(end, high))
        cells = (wide[1] - wide[0]) * (row + 1 - first)
        added = cells - (end - begin) * (row - first) - (high - low)
        if cells <= limit and added <= waste:
            begin, end = wide
        else:
            tiles.append(_tile(spans, first, row, begin, end))
            first, (begin, end) = row, (low, high)
    return (*tiles, _tile(spans, first, len(spans), begin, end))


def _tile(spans: Sequence[tuple[int, int]], first: int, last: int, begin: int, end: int) -> _Tile:
    own = spans[first:last]
    if all(span == (begin, end) for span in own):
        return _Tile(first, last, begin, end, None)
    low, high = torch.tensor(own).T[:, :, None]
    at = torch.arange(begin, end)
    hidden = (at < low) | (at >= high)
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return _Tile(first, last, begin, end, mask[:, None, None])


def _prompt(piece: _Piece, held: Sequence[int], lengths: Sequence[int]) -> None:
    """Several new tokens per row, in blocks of rows and key heads that bound the memory."""
    kv_heads = piece.keys.shape[1]
    ratio = piece.q.shape[1] // kv_heads
    for first, last in _alike(held, lengths):
        longest = lengths[first]
        total = held[first] + longest
        head_bytes = 2 * piece.dim * _FLOAT * (ratio * longest + total)
        heads = max(1, min(kv_heads, PROMPT_BYTES // head_bytes))
        rows = max(1, PROMPT_BYTES // (head_bytes * heads))
        for row in range(first, last, rows):
            for head in range(0, kv_heads, heads):
                block = _block(
                    piece, slice(row, min(last, row + rows)), slice(head, head + heads), ratio
                )
                _prompt_block(block, held[first], longest)


def _alike(held: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring rows that hold the same, the first the longest and none below 7/8 of it."""
    first = 0
    for row in range(1, len(held)):
        near = 7 * lengths[first] <= 8 * lengths[row] <= 8 * lengths[first]
        if held[row] != held[first] or not near:
            yield first, row
            first = row
    yield first, len(held)


def _block(piece: _Piece, rows: slice, heads: slice, ratio: int) -> _Piece:
    """Some rows and key heads of a piece, with the query heads that belong to them."""
    own = slice(heads.start * ratio, heads.stop * ratio)
    return _Piece(
        piece.q[rows, own],
        piece.keys[rows, heads],
        piece.values[rows, heads],
        None if piece.sinks is None else piece.sinks[own],
        piece.scale,
        piece.window,
        piece.chunk,
        piece.out[rows, :, own],
    )


def _prompt_block(block: _Piece, held: int, length: int) -> None:
    """Queries at ``held`` to ``held + length``; those that need a mask go 256 at a time."""
    total = held + length
    q = _widened(block.q[:, :, :length], block.dim)
    k = _widened(block.keys[:, :, :total], block.dim)
    v = _widened(block.values[:, :, :total], block.dim)
    plain = held == 0 and not (0 < block.window < length or 0 < block.chunk < length)
    step = length if plain else _MASKED_QUERIES
    for start in range(0, length, step):
        end = min(length, start + step)
        if plain:
            result, lse = _flash(q, k, v, block.scale, causal=True)
        else:
            low = _first_seen(held + start, block.window, block.chunk)
            span = slice(low, held + end)
            mask = _causal_mask(held + start, held + end, low, block.window, block.chunk)
            result, lse = _flash(
                q[:, :, start:end], k[:, :, span], v[:, :, span], block.scale, mask
            )
        if block.sinks is not None:
            result = _weigh(result, lse, block.sinks[:, None])
        block.out[:, start:end] = result[..., : block.out.shape[-1]].transpose(1, 2)


def _causal_mask(start: int, end: int, low: int, window: int, chunk: int) -> Tensor:
    """What positions ``start`` to ``end`` add to the scores of keys ``low`` to ``end``."""
    query, key = torch.arange(start, end)[:, None], torch.arange(low, end)
    distance = query - key
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    if chunk:
        hidden |= query // chunk != key // chunk
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
