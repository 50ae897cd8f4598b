"""The KV store: what is written where, what is read back, and which memory it takes."""

import mmap

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dovetail.ir.batching import Admission, Batcher, Group, Member, Request, row_tokens
from dovetail.ir.errors import BudgetError
from dovetail.ir.task_graph import KvSpec
from dovetail.runtime.kv_store import KvGroup, KvHandle, KvStore, anonymous, store_nbytes
from dovetail.runtime.pools import Arena, TierBudget

SPEC = KvSpec(2, 8, 1, 4, "float32")


def decode_group(offsets: list[int], held: list[int], stride: int) -> Group:
    members = tuple(Member(i, at, n) for i, (at, n) in enumerate(zip(offsets, held, strict=True)))
    return Group(False, members, (1,) * len(members), 1, stride)


def new_tokens(group: Group, heads: int, dim: int) -> torch.Tensor:
    return torch.randn(len(group.members), heads, group.q_len, dim)


def test_store_gives_layers_their_shapes_and_counts_whole_pages() -> None:
    specs = [SPEC, None, KvSpec(1, 576, 1, 64, "bfloat16")]
    with KvStore(specs, tokens=100) as store:
        keys, values = store.arenas(2)
        assert keys.shape == (100, 1, 576) and values.shape == (100, 1, 64)
        assert keys.dtype == torch.bfloat16 and not keys.any()
        assert store.nbytes == store_nbytes(specs, 100)
        assert store.nbytes % mmap.PAGESIZE == 0
        assert 0 <= store.nbytes - 100 * (80 + 1280) < 4 * mmap.PAGESIZE


def test_store_takes_its_memory_from_a_budgeted_arena() -> None:
    budget = TierBudget(1 << 20)
    nbytes = store_nbytes([SPEC, SPEC], 64)
    with Arena(nbytes, budget, "kv") as arena:
        store = KvStore([SPEC, SPEC], 64, lambda size: arena.view(arena.allocate(size), size))
        assert budget.in_use == store.nbytes == nbytes
        with pytest.raises(BudgetError, match="kv: needs 4096 more bytes, found 0 left"):
            KvStore([SPEC], 64, lambda size: arena.view(arena.allocate(size), size))
        store.close()
    assert budget.in_use == store.nbytes == 0


def test_memory_outlives_the_store_while_it_is_read() -> None:
    store = KvStore([SPEC], 1 << 12, anonymous)
    keys, _ = store.arenas(0)
    store.close()
    keys.fill_(1.0)
    assert keys.sum() == keys.numel()


def test_store_refuses_a_layer_without_kv() -> None:
    with KvStore([None, SPEC], 8) as store, pytest.raises(AssertionError, match="layer 0 keeps no"):
        store.arenas(0)


def test_group_refuses_rows_that_do_not_fit() -> None:
    with KvStore([SPEC], 32) as store:
        with pytest.raises(AssertionError, match="a row of 16 tokens gets 17"):
            KvGroup(store, decode_group([0, 16], [3, 16], 16))
        with pytest.raises(AssertionError, match="beyond the KV store"):
            KvGroup(store, decode_group([0, 17], [3, 3], 16))


def test_prefill_returns_its_input_and_leaves_padding_out() -> None:
    members = (Member(0, 16, 0), Member(1, 0, 0))
    group = Group(True, members, (5, 3), 5, 16)
    with KvStore([SPEC], 32) as store:
        k, v = new_tokens(group, 2, 8), new_tokens(group, 1, 4)
        keys, values = KvGroup(store, group).update(0, k, v)
        assert keys is k and values is v
        arena, _ = store.arenas(0)
        assert torch.equal(arena[16:21], k[0].transpose(0, 1))
        assert torch.equal(arena[0:3], k[1, :, :3].transpose(0, 1))
        assert not arena[3:16].any() and not arena[21:].any()


def test_decode_reads_neighbouring_rows_in_place() -> None:
    group = decode_group([0, 16, 48], [4, 2, 9], 16)
    with KvStore([SPEC], 64) as store:
        kv_group = KvGroup(store, group)
        k, v = new_tokens(group, 2, 8), new_tokens(group, 1, 4)
        keys, values = kv_group.update(0, k, v)
        assert isinstance(keys, KvHandle) and isinstance(values, KvHandle)
        assert [(run.first, run.last, run.kv_len) for run in keys.runs] == [(0, 2, 5), (2, 3, 10)]
        assert [tuple(view.shape) for view in keys.views] == [(2, 2, 5, 8), (1, 2, 10, 8)]
        arena, _ = store.arenas(0)
        start, size = arena.data_ptr(), arena.numel() * 4
        assert all(start <= view.data_ptr() < start + size for view in keys.views)
        assert torch.equal(keys.views[0][1, :, 2], k[1, :, 0])
        assert torch.equal(values.views[1][0, :, 9], v[2, :, 0])


def test_materialised_decode_is_a_view_of_one_run_and_a_copy_of_several() -> None:
    with KvStore([SPEC], 64) as store:
        store.arenas(0)[0].normal_()
        for offsets in ([0, 16, 32], [32, 0, 16]):
            group = decode_group(offsets, [4, 2, 9], 16)
            k, v = new_tokens(group, 2, 8), new_tokens(group, 1, 4)
            keys, values = KvGroup(store, group).update(0, k, v, materialise=True)
            assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
            assert keys.shape == (3, 2, 10, 8) and values.shape == (3, 1, 10, 4)
            arena, _ = store.arenas(0)
            assert (keys.data_ptr() == arena.data_ptr()) == (offsets[0] == 0)
            for row, member in enumerate(group.members):
                own = arena[member.offset : member.offset + member.held + 1]
                assert torch.equal(keys[row, :, : member.held + 1], own.transpose(0, 1))
            assert keys.isfinite().all() and values.isfinite().all()


def test_memo_makes_each_table_once() -> None:
    with KvStore([SPEC], 16) as store:
        kv_group = KvGroup(store, decode_group([0], [1], 16))
        assert kv_group.memo("a", lambda: [1]) is kv_group.memo("a", lambda: [2])
        assert kv_group.memo("b", lambda: [2]) == [2]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_sequence_reads_back_its_own_tokens(
    sizes: list[tuple[int, int]], rows: int, refill: bool
) -> None:
    """Drives the Batcher with refill; each token's key is (sequence, position)."""
    requests = [Request(i, length, new) for i, (length, new) in enumerate(sizes)]
    longest = max(row_tokens(r.length, r.new_tokens) for r in requests)
    admission = Admission(2 * rows, 2 * rows * longest, rows, 24, 40, refill)
    batcher = Batcher(requests, admission)
    with KvStore([KvSpec(1, 2, 1, 1, "float32")], admission.kv_tokens) as store:
        while step := batcher.next_step():
            for group in step.groups:
                _check_group(store, group)
            batcher.advance(step, [m.index for g in step.groups for m in g.members if m.held == 7])


def _check_group(store: KvStore, group: Group) -> None:
    index = torch.tensor([m.index for m in group.members])[:, None].expand(-1, group.q_len)
    held = torch.tensor([m.held for m in group.members])[:, None]
    position = held + torch.arange(group.q_len)
    k = torch.stack([index, position], -1).float()[:, None]
    kv_group = KvGroup(store, group)
    keys, _ = kv_group.update(0, k, position.float()[:, None, :, None], materialise=True)
    assert isinstance(keys, torch.Tensor)
    for row, (member, length) in enumerate(zip(group.members, group.lengths, strict=True)):
        own = keys[row, 0, : member.held + length]
        assert own[:, 0].eq(member.index).all()
        assert torch.equal(own[:, 1], torch.arange(len(own)).float())
