"""Pools: nothing beyond the budget, and no slot overwritten before it was released."""

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.ir.errors import BudgetError
from dovetail.runtime.pools import Arena, RingClosed, SlotRing, TierBudget, tensor_view, torch_dtype

PAGE = mmap.PAGESIZE


def run_all(
    jobs: Sequence[Callable[[], object]], ring: SlotRing | None = None
) -> list[BaseException]:
    """Runs the jobs in threads and returns what they raised, which also aborts ``ring``."""
    raised: list[BaseException] = []

    def guarded(job: Callable[[], object]) -> None:
        try:
            job()
        except (AssertionError, RuntimeError, RingClosed) as error:
            raised.append(error)
            if ring is not None:
                ring.abort(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread still waits"
    return raised


def test_budget_counts_by_use() -> None:
    budget = TierBudget(100)
    budget.reserve(60, "weights")
    budget.reserve(30, "kv")
    budget.release(60, "weights")
    budget.reserve(0, "nothing")
    assert (budget.in_use, budget.peak, budget.breakdown()) == (30, 90, {"kv": 30})


def test_budget_refuses_what_does_not_fit() -> None:
    budget = TierBudget(100)
    budget.reserve(60, "weights")
    with pytest.raises(BudgetError) as caught:
        budget.reserve(50, "kv")
    message = "ram budget: kv needs 50 bytes, found 40 free of 100 (in use: weights 60)"
    assert str(caught.value) == f"{message}; give a budget of at least ram=110"
    assert (budget.in_use, budget.peak, budget.breakdown()) == (60, 60, {"weights": 60})


def test_budget_asserts_on_releasing_too_much() -> None:
    budget = TierBudget(100)
    budget.reserve(60, "weights")
    with pytest.raises(AssertionError, match="kv has only 0 bytes"):
        budget.release(1, "kv")


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=30))
def test_budget_never_exceeds_its_capacity(steps: list[tuple[int, bool]]) -> None:
    budget, held = TierBudget(100), [0]
    for size, take in steps:
        if take and sum(held) + size <= 100:
            budget.reserve(size, "x")
            held.append(size)
        elif take:
            with pytest.raises(BudgetError):
                budget.reserve(size, "x")
        elif len(held) > 1:
            budget.release(held.pop(), "x")
        assert budget.in_use == sum(held) <= budget.peak <= 100


def test_budget_holds_under_threads() -> None:
    budget = TierBudget(1000)

    def work() -> None:
        for _ in range(300):
            budget.reserve(100, "x")
            budget.release(100, "x")

    assert run_all([work] * 4) == []
    assert budget.in_use == 0
    assert budget.peak <= 400


def test_arena_hands_out_aligned_disjoint_memory() -> None:
    budget = TierBudget(4 * PAGE)
    with Arena(3 * PAGE - 5, budget, "weights") as arena:
        first = arena.allocate(10)
        second = arena.allocate(PAGE)
        third = arena.allocate(9, align=64)
        fourth = arena.allocate(1, align=64)
        assert (first, second, third, fourth) == (0, PAGE, 2 * PAGE, 2 * PAGE + 64)
        assert arena.used == 2 * PAGE + 65
        assert budget.breakdown() == {"weights": 3 * PAGE}
        tensor = arena.tensor(second, torch.bfloat16, (4, 8))
        tensor.copy_(torch.arange(32).view(4, 8))
        assert tensor.data_ptr() % PAGE == 0
        back = tensor_view(arena.view(second, 64), 0, torch.bfloat16, (32,))
        assert back.tolist() == list(range(32))
        assert bytes(arena.view(first, 10)) == bytes(10)
    assert budget.in_use == 0


def test_arena_tensor_of_no_elements() -> None:
    with Arena(PAGE, TierBudget(PAGE), "weights") as arena:
        assert arena.tensor(0, torch.float32, (0, 3)).shape == (0, 3)


def test_arena_of_no_bytes() -> None:
    with Arena(0, TierBudget(0), "weights") as arena:
        assert arena.allocate(0) == 0


def test_arena_refuses_more_than_it_has() -> None:
    with Arena(2 * PAGE, TierBudget(2 * PAGE), "weights") as arena:
        arena.allocate(10)
        with pytest.raises(BudgetError) as caught:
            arena.allocate(PAGE + 1)
    message = f"weights: needs {PAGE + 1} more bytes, found {PAGE} left of {2 * PAGE}"
    assert str(caught.value) == f"{message}; give this arena at least {2 * PAGE + 1}"


def test_pools_refuse_more_than_the_budget() -> None:
    budget = TierBudget(3 * PAGE)
    with pytest.raises(BudgetError, match=f"weights needs {4 * PAGE} bytes, found {3 * PAGE} free"):
        Arena(3 * PAGE + 1, budget, "weights")
    with pytest.raises(BudgetError, match=f"ring needs {4 * PAGE} bytes"):
        SlotRing(2, PAGE + 1, budget, "ring")
    assert budget.in_use == budget.peak == 0


def test_arena_refuses_what_the_system_cannot_map() -> None:
    budget = TierBudget(1 << 60)
    with pytest.raises(BudgetError, match=f"weights: the system refused to map {1 << 50} bytes"):
        Arena(1 << 50, budget, "weights")
    assert budget.in_use == 0


def test_tensor_held_after_close_reads_zeros() -> None:
    arena = Arena(PAGE, TierBudget(PAGE), "weights")
    arena.allocate(PAGE)
    tensor = arena.tensor(0, torch.int64, (PAGE // 8,))
    tensor.fill_(7)
    arena.close()
    arena.close()
    assert int(tensor.sum()) == 0


def test_torch_dtype_by_name() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16


@settings(max_examples=25)
@given(
    slots=st.integers(1, 4),
    producers=st.integers(1, 3),
    consumers=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_no_slot_is_overwritten_before_all_released_it(
    slots: int, producers: int, consumers: int, seed: int
) -> None:
    loads = 40
    budget = TierBudget(slots * PAGE)
    ring = SlotRing(slots, 100, budget, "ring", consumers)
    seen: list[list[int]] = [[] for _ in range(consumers)]

    def pause(n: int) -> None:
        if (n * 7919 + seed) % 5 == 0:
            time.sleep(0)

    def produce(which: int) -> None:
        for n in range(which, loads, producers):
            slot = ring.acquire(n)
            slot[:8] = n.to_bytes(8, "little")
            pause(n)
            slot[-8:] = n.to_bytes(8, "little")
            ring.publish(n)

    def consume(which: int) -> None:
        for n in range(loads):
            slot = ring.wait(n)
            before = int.from_bytes(slot[:8], "little")
            pause(n + which)
            assert int.from_bytes(slot[-8:], "little") == before == n
            seen[which].append(before)
            ring.release(n)

    jobs = [partial(produce, which) for which in range(producers)]
    jobs += [partial(consume, which) for which in range(consumers)]
    assert run_all(jobs, ring) == []
    assert seen == [list(range(loads))] * consumers
    ring.close()
    assert budget.in_use == 0


def test_acquire_waits_for_the_last_consumer() -> None:
    with SlotRing(1, PAGE, TierBudget(PAGE), "ring", consumers=2) as ring:
        ring.acquire(0)
        ring.publish(0)
        ring.wait(0)
        ring.release(0)
        thread = threading.Thread(target=ring.acquire, args=(1,), daemon=True)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        ring.release(0)
        thread.join(60)
        assert not thread.is_alive()


def test_loads_may_be_published_out_of_order() -> None:
    with SlotRing(2, PAGE, TierBudget(2 * PAGE), "ring") as ring:
        ring.acquire(0)
        ring.acquire(1)[0] = 11
        ring.publish(1)
        assert ring.wait(1)[0] == 11


def test_a_fast_consumer_waits_while_a_slow_one_holds_the_slot() -> None:
    with SlotRing(1, PAGE, TierBudget(PAGE), "ring", consumers=2) as ring:
        ring.acquire(0)
        ring.publish(0)
        ring.release(0)
        thread = threading.Thread(target=ring.wait, args=(1,), daemon=True)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        ring.release(0)
        ring.acquire(1)
        ring.publish(1)
        thread.join(60)
        assert not thread.is_alive()


def test_slots_are_page_aligned() -> None:
    with SlotRing(3, 100, TierBudget(3 * PAGE), "ring") as ring:
        for n in range(3):
            assert torch.frombuffer(ring.acquire(n), dtype=torch.uint8).data_ptr() % PAGE == 0


def test_abort_raises_the_first_error_in_every_waiter() -> None:
    ring = SlotRing(1, PAGE, TierBudget(PAGE), "ring", consumers=1)
    ring.acquire(0)
    error = RuntimeError("the disk is gone")

    def abort() -> None:
        time.sleep(0.02)
        ring.abort(error)
        ring.abort(RuntimeError("a later one"))

    waits = [partial(ring.acquire, 1), partial(ring.wait, 0), partial(ring.wait, 0)]
    assert run_all([*waits, abort]) == [error] * 3
    with pytest.raises(RuntimeError, match="the disk is gone"):
        ring.acquire(1)
    ring.publish(0)
    ring.release(0)
    ring.close()


def test_close_ends_waiting_threads() -> None:
    ring = SlotRing(1, PAGE, TierBudget(PAGE), "ring")
    ring.acquire(0)

    def close() -> None:
        time.sleep(0.02)
        ring.close()

    [raised] = run_all([partial(ring.wait, 0), close])
    assert isinstance(raised, RingClosed)


def test_ring_asserts_on_a_broken_protocol() -> None:
    with SlotRing(2, PAGE, TierBudget(2 * PAGE), "ring") as ring:
        with pytest.raises(AssertionError):
            ring.release(0)
        ring.acquire(0)
        ring.publish(0)
        with pytest.raises(AssertionError):
            ring.publish(0)
        ring.wait(0)
        ring.release(0)
        with pytest.raises(AssertionError, match="load 0 has already been released"):
            ring.wait(0)
