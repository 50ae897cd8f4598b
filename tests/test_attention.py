"""Attention over ragged groups against a naive float64 reference."""

import dataclasses
import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from dovetail.ir.batching import Group, Member
from dovetail.ir.task_graph import KvSpec
from dovetail.runtime import attention as subject
from dovetail.runtime.attention import attention
from dovetail.runtime.kv_store import KvGroup, KvHandle, KvStore


def assert_exact(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@dataclass(frozen=True)
class Shape:
    """An attention layer under test."""

    heads: int
    kv_heads: int
    key_dim: int = 16
    value_dim: int = 16
    window: int = 0
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    chunk: int = 0

    @property
    def spec(self) -> KvSpec:
        name = str(self.dtype).removeprefix("torch.")
        return KvSpec(self.kv_heads, self.key_dim, self.kv_heads, self.value_dim, name)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.key_dim)


SHAPES = [
    Shape(4, 4),
    Shape(8, 2),
    Shape(4, 4, window=5),
    Shape(8, 2, chunk=6),
    Shape(8, 2, sinks=True),
    Shape(8, 2, window=7, sinks=True),
    Shape(4, 4, 24, 16),
    Shape(6, 1, 16, 40, window=9, sinks=True),
]


class Model:
    """One layer with a store, and every sequence's keys and values so far beside it."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        self.shape = shape
        self.store = KvStore([shape.spec], tokens)
        self.sinks = torch.randn(shape.heads) if shape.sinks else None
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def random(self, group: Group, heads: int, dim: int) -> Tensor:
        return torch.randn(len(group.members), heads, group.q_len, dim).to(self.shape.dtype)

    def step(self, group: Group, *, materialise: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Runs a group; returns the result and the float64 reference of each row's own tokens."""
        shape = self.shape
        q = self.random(group, shape.heads, shape.key_dim)
        k = self.random(group, shape.kv_heads, shape.key_dim)
        v = self.random(group, shape.kv_heads, shape.value_dim)
        kv_group = KvGroup(self.store, group)
        keys, values = kv_group.update(0, k, v, materialise=materialise)
        out = attention(
            q, keys, values, self.sinks, shape.scale, shape.window, kv_group, shape.chunk
        )
        assert out.shape == (len(group.members), group.q_len, shape.heads, shape.value_dim)
        assert out.is_contiguous() and out.isfinite().all() and out.dtype == shape.dtype
        wanted = []
        for row, (member, length) in enumerate(zip(group.members, group.lengths, strict=True)):
            self._append(self.keys, member, k[row, :, :length])
            self._append(self.values, member, v[row, :, :length])
            own = (q[row, :, :length], self.keys[member.index], self.values[member.index])
            wanted.append(reference(*own, self.sinks, shape.scale, shape.window, shape.chunk))
        return out, wanted

    def check(self, group: Group, *, materialise: bool = False) -> None:
        out, wanted = self.step(group, materialise=materialise)
        for row, own in enumerate(wanted):
            assert_exact(out[row, : len(own)].double(), own)

    def _append(self, held: dict[int, Tensor], member: Member, new: Tensor) -> None:
        old = held[member.index] if member.held else new[:, :0]
        assert old.shape[1] == member.held
        held[member.index] = torch.cat([old, new], 1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    chunk: int = 0,
) -> Tensor:
    """Naive attention of one sequence in float64: ``[q_len, heads, dim]``."""
    ratio, q_len, total = q.shape[0] // k.shape[0], q.shape[1], k.shape[1]
    k, v = (x.double().repeat_interleave(ratio, 0) for x in (k, v))
    scores = q.double() @ k.transpose(1, 2) * scale
    for s in range(q_len):
        for j in range(total):
            position = total - q_len + s
            outside = chunk and j // chunk != position // chunk
            if j > position or (window and j <= position - window) or outside:
                scores[:, s, j] = -torch.inf
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, q_len, 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v).transpose(0, 1)


def make_group(
    rows: Sequence[int], held: Sequence[int], lengths: Sequence[int], stride: int
) -> Group:
    members = tuple(Member(row, row * stride, n) for row, n in zip(rows, held, strict=True))
    return Group(not any(held), members, tuple(lengths), max(lengths), stride)


def ids(shape: Shape) -> str:
    parts = [f"{shape.heads}x{shape.key_dim}", f"{shape.kv_heads}x{shape.value_dim}"]
    limit = f"c{shape.chunk}" if shape.chunk else f"w{shape.window}"
    return "-".join([*parts, limit] + ["sinks"] * shape.sinks)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("materialise", [False, True])
def test_prompts_in_pieces(shape: Shape, materialise: bool) -> None:
    torch.manual_seed(0)
    stride = 400
    model = Model(shape, 4 * stride)
    # Rows that begin, rows that go on, one token at a time and more than one block of queries.
    for held, lengths in (
        ((0, 0, 0, 0), (20, 20, 9, 1)),
        ((20, 20, 9), (20, 1, 7)),
        ((40, 21, 16, 1), (1, 1, 1, 1)),
        ((41, 22, 17, 2), (300, 270, 3, 12)),
    ):
        model.check(make_group(range(len(held)), held, lengths, stride), materialise=materialise)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("materialise", [False, True])
def test_prefill_then_decode_with_refill(shape: Shape, materialise: bool) -> None:
    torch.manual_seed(0)
    stride = 40
    model = Model(shape, 5 * stride)
    lengths = {0: 20, 1: 11, 2: 11, 3: 10, 4: 1}
    model.check(make_group(list(lengths), [0] * 5, list(lengths.values()), stride))
    live = dict(lengths)
    for step in range(14):
        if step == 5:
            del live[1]
        if step == 8:
            model.check(make_group([1], [0], [6], stride), materialise=materialise)
            live[1] = 6
        rows = sorted(live)
        group = make_group(rows, [live[row] for row in rows], [1] * len(rows), stride)
        model.check(group, materialise=materialise)
        live = {row: n + 1 for row, n in live.items()}


@settings(max_examples=60)
@given(
    st.sampled_from(SHAPES),
    st.integers(0, 2**31),
    st.integers(1, 30),
    st.sampled_from([1, 1, 3, 17]),
)
def test_random_groups(shape: Shape, seed: int, past: int, new: int) -> None:
    """Rows of any length, in any order, with dead rows between; also several tokens on a past."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    stride = past + new
    rows = rng.sample(range(8), rng.randint(1, 6))
    if rng.random() < 0.5:
        rows.sort()
    model = Model(shape, 8 * stride)
    for arena in model.store.arenas(0):
        arena.normal_(std=50.0)  # what left sequences leave behind
    held = [rng.choice([past, rng.randint(1, past)]) for _ in rows]
    model.check(make_group(rows, [0] * len(rows), held, stride))
    lengths = [rng.randint(1, new) for _ in rows]
    model.check(make_group(rows, held, lengths, stride), materialise=rng.random() < 0.5)


@pytest.mark.parametrize("shape", [Shape(8, 2), Shape(2, 2, 24, 16, 250, sinks=True)], ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_blocks_give_the_same(
    shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles along rows, heads and keys, and masked query blocks, join to the same result."""
    shape = dataclasses.replace(shape, dtype=dtype)
    group = make_group([0, 1, 3], [0, 0, 0], [300, 290, 40], 310)
    after = make_group([0, 1, 3], [300, 290, 40], [1, 1, 1], 310)

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        model = Model(shape, 4 * 310)
        return [model.step(g)[0] for g in (group, after)]

    whole = run()
    monkeypatch.setattr(subject, "SCRATCH_BYTES", 20_000)
    monkeypatch.setattr(subject, "PROMPT_BYTES", 1)
    monkeypatch.setattr(subject, "_TILE_TOKENS", 30)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_padding_and_company_never_change_a_result(shape: Shape) -> None:
    torch.manual_seed(2)
    stride, lengths = 70, [60, 33, 32, 5]
    tensors = [
        torch.randn(4, heads, 60, dim)
        for heads, dim in (
            (shape.heads, shape.key_dim),
            (shape.kv_heads, shape.key_dim),
            (shape.kv_heads, shape.value_dim),
        )
    ]
    sinks = torch.randn(shape.heads) if shape.sinks else None

    def run(store: KvStore, rows: list[int]) -> list[Tensor]:
        """Prefill all but each row's last token, then decode it."""
        results = []
        own = [lengths[row] for row in rows]
        for held, new in (([0] * len(rows), [n - 1 for n in own]), ([n - 1 for n in own], None)):
            group = make_group(rows, held, new or [1] * len(rows), stride)
            index = torch.tensor(held)[:, None] + torch.arange(group.q_len)
            q, k, v = (
                torch.stack([t[row][:, at] for row, at in zip(rows, index, strict=True)])
                for t in tensors
            )
            kv_group = KvGroup(store, group)
            keys, values = kv_group.update(0, k, v)
            results.append(attention(q, keys, values, sinks, shape.scale, shape.window, kv_group))
        return results

    with KvStore([shape.spec], 4 * stride) as store:
        together = run(store, [0, 1, 2, 3])
    for row, length in enumerate(lengths):
        with KvStore([shape.spec], 4 * stride) as store:
            prompt, token = run(store, [row])
        assert_exact(together[0][row, : length - 1], prompt[0])
        assert_exact(together[1][row], token[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [Shape(4, 4, 64, 64), Shape(8, 2, 64, 64, sinks=True)], ids=ids)
def test_error_in_16_bits_is_within_sdpas(shape: Shape, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    shape = dataclasses.replace(shape, dtype=dtype)
    model = Model(shape, 400)
    for group in (
        make_group([0, 1], [0, 0], [90, 90], 200),
        make_group([0, 1], [90, 90], [1, 1], 200),
    ):
        torch.manual_seed(4)
        q = model.random(group, shape.heads, shape.key_dim)
        torch.manual_seed(4)
        out, wanted = model.step(group)
        exact = torch.stack(wanted)
        k, v = (torch.stack([held[0], held[1]]) for held in (model.keys, model.values))
        plain = sdpa(q, k, v, model.sinks, shape.scale).transpose(1, 2)
        ours = (out.double() - exact).norm()
        assert ours <= 1.5 * (plain.double() - exact).norm()
        assert ours < 0.01 * exact.norm()


def sdpa(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float) -> Tensor:
    """PyTorch's own attention, sinks as one more key with a value of zero."""
    q_len, total = q.shape[2], k.shape[2]
    seen = torch.ones(q_len, total, dtype=torch.bool).tril(total - q_len)
    mask = torch.zeros(q_len, total).masked_fill_(~seen, -torch.inf).expand(q.shape[1], -1, -1)
    if sinks is not None:
        mask = torch.cat([mask, sinks[:, None, None].expand(-1, q_len, 1)], -1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = mask[None].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("window", [0, 6])
def test_sinks_match_gpt_oss(window: int) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    torch.manual_seed(5)
    shape = Shape(8, 2, 32, 32, window, sinks=True)
    model = Model(shape, 60)
    module: Any = SimpleNamespace(num_key_value_groups=4, sinks=model.sinks, training=False)
    for group in (
        make_group([0, 1], [0, 0], [20, 20], 30),
        make_group([0, 1], [20, 20], [1, 1], 30),
    ):
        torch.manual_seed(6)
        q = model.random(group, shape.heads, shape.key_dim)
        torch.manual_seed(6)
        out, _ = model.step(group)
        k, v = (torch.stack([held[0], held[1]]) for held in (model.keys, model.values))
        distance = torch.arange(k.shape[2] - group.q_len, k.shape[2])[:, None]
        distance = distance - torch.arange(k.shape[2])
        hidden = (distance < 0) | (distance >= (window or 1000))
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)
        theirs, _ = eager_attention_forward(module, q, k, v, mask, shape.scale)
        torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-5)


def test_inference_mode_and_normal_mode_share_store_and_scratch() -> None:
    torch.manual_seed(7)
    model = Model(dataclasses.replace(SHAPES[1], dtype=torch.bfloat16), 60)
    with torch.inference_mode():
        model.step(make_group([0, 1], [0, 0], [9, 7], 30))
        model.step(make_group([0, 1], [9, 7], [1, 1], 30))
    out, wanted = model.step(make_group([0, 1], [10, 8], [1, 1], 30))
    torch.testing.assert_close(out[1].double(), wanted[1], rtol=0.02, atol=0.02)


def test_handles_are_read_without_a_copy() -> None:
    """Float32 keys go to the kernel where they lie in the store."""
    model = Model(SHAPES[0], 60)
    group = make_group([0, 1], [4, 4], [1, 1], 30)
    k = model.random(group, 4, 16)
    keys, _ = KvGroup(model.store, group).update(0, k, k)
    assert isinstance(keys, KvHandle)
    staged = subject._staged(keys.views[0], 16, 0)
    assert staged.data_ptr() == model.store.arenas(0)[0].data_ptr()


def test_threads_do_not_share_scratch() -> None:
    """Workers run groups of one store at the same time and get what one thread gets."""
    torch.manual_seed(8)
    shape = dataclasses.replace(SHAPES[1], dtype=torch.bfloat16)
    model = Model(shape, 8 * 300)
    for arena in model.store.arenas(0):
        arena.normal_()
    groups = [make_group([2 * i, 2 * i + 1], [290, 270], [1, 1], 300) for i in range(4)]
    calls = []
    for group in groups:
        q, k = (model.random(group, heads, 16) for heads in (shape.heads, shape.kv_heads))
        kv_group = KvGroup(model.store, group)
        calls.append((q, *kv_group.update(0, k, k), None, shape.scale, 0, kv_group))
    alone = [attention(*call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            together = list(pool.map(lambda call: attention(*call), calls))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
