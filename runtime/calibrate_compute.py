"""Rates of one compute worker: matrix multiply, attention, KV reads, copies, small operators.

Every rate is that of the best short window of consecutive calls. Windows are long enough to hold
cold and lukewarm calls in the mix that a real run has, and short enough that one of many falls
between the disturbances of other processes. Time is the CPU time of the measuring thread, so that
waiting for a core that somebody else holds does not count.
"""

import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.ir.batching import Group, Member
from dovetail.ir.task_graph import KvSpec
from dovetail.runtime.attention import attention
from dovetail.runtime.calibrate_spec import Spec
from dovetail.runtime.kv_store import KvGroup, KvStore
from dovetail.runtime.pools import Arena, TierBudget
from dovetail.runtime.quantised import int4_matrix

WINDOW_SECONDS = 0.025
MIN_WINDOWS = 2
aten = torch.ops.aten


def best_seconds(call: Callable[[int], object], cycle: int, budget: float) -> float:
    """Seconds of one ``call(i)`` in the best window; ``i`` counts up, operands repeat by cycle.

    A window is one cycle, cut where it grows past 25 ms. Takes about ``budget`` seconds, and two
    windows after a warm-up call whatever the budget.
    """
    call(0)
    best, index, windows = float("inf"), 1, 0
    end = time.perf_counter() + budget
    while windows < MIN_WINDOWS or time.perf_counter() < end:
        start, calls, spent = time.thread_time(), 0, 0.0
        while calls < cycle and spent < WINDOW_SECONDS:
            call(index)
            index, calls = index + 1, calls + 1
            spent = time.thread_time() - start
        best, windows = min(best, spent / calls), windows + 1
    return best


def cold_weights(spec: Spec, dtype: torch.dtype, cold_bytes: int, least: int = 2) -> list[Tensor]:
    """``least`` or more ``[width, width]`` weights, together larger than the last cache."""
    seed = torch.Generator().manual_seed(0)
    first = torch.randn(spec.gemm_width, spec.gemm_width, generator=seed).to(dtype)
    count = max(least, -(-cold_bytes // first.nbytes))
    return [first, *(first.clone() for _ in range(count - 1))]


def gemm_rate(rows: int, weights: Sequence[Tensor], budget: float) -> float:
    """FLOP/s of ``[rows, width] @ [width, width]`` with weights that are not in cache."""
    width = weights[0].shape[1]
    x = torch.ones(rows, width, dtype=weights[0].dtype)
    with torch.inference_mode():
        seconds = best_seconds(
            lambda i: F.linear(x, weights[i % len(weights)]), len(weights), budget
        )
    return 2 * rows * width * weights[0].shape[0] / seconds


def int8_rate(rows: int, width: int, cold_bytes: int, budget: float) -> float:
    """FLOP/s of rows in int8 with matrices that are not in cache; rounding them and scaling sums
    take as long as their bytes take to move, whatever the matrix."""
    first = torch.randint(-127, 128, (width, width), dtype=torch.int8)
    weights = [first, *(first.clone() for _ in range(max(1, cold_bytes // first.nbytes)))]
    x = torch.ones(rows, width, dtype=torch.int8)
    with torch.inference_mode():
        seconds = best_seconds(
            lambda i: torch._int_mm(x, weights[i % len(weights)]), len(weights), budget
        )
    return 2 * rows * width * width / seconds


def int4_rate(rows: int, width: int, cold_bytes: int, budget: float) -> float:
    """FLOP/s of bfloat16 rows with int4 matrices that are not in cache, turned into bfloat16
    first."""
    first = torch.randint(0, 256, (width, width // 2), dtype=torch.uint8)
    weights = [first, *(first.clone() for _ in range(max(1, cold_bytes // first.nbytes)))]
    x, scale = torch.ones(rows, width, dtype=torch.bfloat16), torch.ones(width, max(1, width // 32))
    with torch.inference_mode():
        seconds = best_seconds(
            lambda i: F.linear(x, int4_matrix(weights[i % len(weights)], scale, x.dtype)),
            len(weights),
            budget,
        )
    return 2 * rows * width * width / seconds


def attention_rate(spec: Spec, length: int, dtype: torch.dtype, budget: float) -> float:
    """FLOP/s of causal self-attention over ``length`` tokens, the masked half counted too."""
    x = torch.ones(1, spec.heads, length, spec.head_dim, dtype=dtype)
    with _group(spec, 1, length, dtype, prefill=True) as group, torch.inference_mode():
        seconds = best_seconds(lambda i: attention(x, x, x, None, 0.1, 0, group), 64, budget)
    return 2 * spec.heads * length * length * 2 * spec.head_dim / seconds


@contextmanager
def _group(
    spec: Spec, seqs: int, length: int, dtype: torch.dtype, *, prefill: bool
) -> Iterator[KvGroup]:
    """``seqs`` sequences in prefill of ``length`` tokens, or in decode at that length."""
    width = (spec.heads, spec.head_dim)
    kv = KvSpec(*width, *width, str(dtype).removeprefix("torch."))
    held = 0 if prefill else length - 1
    new = length if prefill else 1
    members = tuple(Member(i, i * length, held) for i in range(seqs))
    group = Group(prefill, members, (new,) * seqs, new, length)
    with KvStore([kv], seqs * length) as store:
        # Filled, because a store of untouched zeros is one shared page that never leaves the cache.
        for arena in store.arenas(0):
            arena.fill_(0.5)
        yield KvGroup(store, group)


def kv_bytes(spec: Spec, length: int, dtype: torch.dtype) -> int:
    """KV bytes of one sequence and layer of ``length`` tokens."""
    return 2 * length * spec.heads * spec.head_dim * dtype.itemsize


def kv_rate(spec: Spec, length: int, dtype: torch.dtype, cold_bytes: int, budget: float) -> float:
    """Bytes/s at which decode attention reads the KV store, the new token's write included.

    The store is larger than the last cache; every sequence holds ``length`` tokens.
    """
    per_sequence = kv_bytes(spec, length, dtype)
    seqs = max(1, -(-cold_bytes // per_sequence))
    query = torch.ones(seqs, spec.heads, 1, spec.head_dim, dtype=dtype)
    with _group(spec, seqs, length, dtype, prefill=False) as group, torch.inference_mode():

        def step(_: int) -> Tensor:
            keys, values = group.update(0, query, query)
            return attention(query, keys, values, None, 0.1, 0, group)

        seconds = best_seconds(step, 1, budget)
    return seqs * per_sequence / seconds


def copy_rate(cold_bytes: int, budget: float) -> float:
    """Bytes/s, read plus written, of copying a tensor that no cache holds."""
    source = torch.ones(cold_bytes // 4, dtype=torch.float32)
    target = torch.ones_like(source)
    seconds = best_seconds(lambda i: target.copy_(source), 1, budget)
    return 2 * source.nbytes / seconds


def fresh_rate(nbytes: int) -> float:
    """Bytes/s at which one thread touches memory that the system has yet to give, huge pages
    asked for, as all pools ask."""
    with Arena(nbytes, TierBudget(nbytes + mmap.PAGESIZE), "calibration") as arena:
        tensor = arena.tensor(arena.allocate(nbytes), torch.uint8, (nbytes,))
        begin = time.perf_counter()
        tensor[:: mmap.PAGESIZE] = 1
        return nbytes / (time.perf_counter() - begin)


OPS_OF_CHAIN = 8 * 5


def op_chain(dtype: torch.dtype) -> Callable[[int], object]:
    """Eight times view, add, mul, view and linear on ``[1, 64]``."""
    x = torch.ones(1, 64, dtype=dtype)
    weight = torch.full((64, 64), 1 / 64, dtype=dtype)

    def chain(_: int) -> Tensor:
        y = x
        for _ in range(8):
            flat = aten.view.default(y, [64])
            flat = aten.mul.Tensor(aten.add.Tensor(flat, flat), 0.5)
            y = aten.linear.default(aten.view.default(flat, [1, 64]), weight)
        return y

    return chain


def op_seconds(dtype: torch.dtype, budget: float) -> float:
    """Mean seconds of one operator in ``op_chain``."""
    with torch.inference_mode():
        return best_seconds(op_chain(dtype), 64, budget) / OPS_OF_CHAIN
