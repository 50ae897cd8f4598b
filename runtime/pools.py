"""Page-aligned memory pools that cannot exceed a tier's budget.

Everything that may grow is reserved in a ``TierBudget`` before it exists. ``Arena`` holds what
stays resident, ``SlotRing`` the buffers through which weights stream.
"""

import contextlib
import math
import mmap
import threading
from collections import Counter

import torch

from dovetail.ir.errors import BudgetError


class TierBudget:
    """Thread-safe account of a tier's bytes, by what they are used for."""

    def __init__(self, capacity: int, tier: str = "ram") -> None:
        assert capacity >= 0
        self.capacity = capacity
        self.tier = tier
        self._lock = threading.Lock()
        self._used: Counter[str] = Counter()
        self._in_use = 0
        self._peak = 0

    @property
    def in_use(self) -> int:
        """Bytes reserved now."""
        return self._in_use

    @property
    def peak(self) -> int:
        """Most bytes ever reserved at one time."""
        return self._peak

    def breakdown(self) -> dict[str, int]:
        """Bytes reserved now for each use."""
        with self._lock:
            return dict(+self._used)

    def reserve(self, nbytes: int, what: str) -> None:
        """Takes ``nbytes`` for ``what``; raises BudgetError, taking nothing, if they do not fit."""
        assert nbytes >= 0
        with self._lock:
            needed = self._in_use + nbytes
            if needed > self.capacity:
                uses = ", ".join(f"{name} {size}" for name, size in (+self._used).items())
                raise BudgetError(
                    f"{self.tier} budget: {what} needs {nbytes} bytes, found"
                    f" {self.capacity - self._in_use} free of {self.capacity}"
                    f" (in use: {uses or 'nothing'}); give a budget of at least"
                    f" {self.tier}={needed}"
                )
            self._used[what] += nbytes
            self._in_use = needed
            self._peak = max(self._peak, needed)

    def release(self, nbytes: int, what: str) -> None:
        """Gives back ``nbytes`` that were reserved for ``what``."""
        with self._lock:
            assert 0 <= nbytes <= self._used[what], f"{what} has only {self._used[what]} bytes"
            self._used[what] -= nbytes
            self._in_use -= nbytes


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name``, such as ``"bfloat16"``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), f"{name} is not a dtype"
    return dtype


def tensor_view(
    buffer: memoryview, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """A tensor over ``buffer``'s bytes from ``offset`` on, without a copy; keeps them mapped. Its
    storage is the whole buffer, so that one view may be over several tensors of it."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    assert offset % dtype.itemsize == 0, "a tensor must start at a multiple of its itemsize"
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    whole = torch.frombuffer(buffer, dtype=dtype, count=len(buffer) // dtype.itemsize)
    return whole.as_strided(shape, strides[: len(shape)], offset // dtype.itemsize)


class _Mapping:
    """Anonymous memory of ``nbytes``, reserved in ``budget`` while it lasts; zero until written.

    It counts towards the process's RSS only as it is touched.
    """

    def __init__(self, nbytes: int, budget: TierBudget, what: str) -> None:
        self.nbytes = _round_up(nbytes, mmap.PAGESIZE)
        self._budget = budget
        self._what = what
        self._map: mmap.mmap | None = None
        budget.reserve(self.nbytes, what)
        if self.nbytes:
            try:
                self._map = _anonymous(self.nbytes)
            except OSError as error:
                budget.release(self.nbytes, what)
                raise BudgetError(
                    f"{what}: the system refused to map {self.nbytes} bytes ({error.strerror});"
                    f" give a smaller {budget.tier} budget than {budget.capacity}"
                ) from error
        self.bytes = memoryview(self._map or bytearray())

    def close(self) -> None:
        """Gives the memory back at once, and its addresses when the last view of it is gone.

        So a tensor that is still held (by a traceback, say) reads zeros and never crashes.
        """
        self.bytes = memoryview(b"")
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._map = None
        self._budget.release(self.nbytes, self._what)
        self.nbytes = 0


def _anonymous(nbytes: int) -> mmap.mmap:
    # Private, because pages of a shared mapping do not go back with MADV_DONTNEED.
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Only a hint for speed: kernels built without huge pages answer EINVAL.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Arena:
    """Page-aligned memory of a fixed size that is handed out once, for what stays resident.

    Takes ``capacity`` bytes, rounded up to pages, from ``budget`` as ``what``; raises BudgetError
    if they do not fit. ``close`` gives all of it back. Not for several allocating threads.
    """

    def __init__(self, capacity: int, budget: TierBudget, what: str) -> None:
        self._mapping = _Mapping(capacity, budget, what)
        self._what = what
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes handed out, with alignment."""
        return self._used

    def allocate(self, nbytes: int, align: int = mmap.PAGESIZE) -> int:
        """The offset of ``nbytes`` fresh bytes at a multiple of ``align`` (a page at most)."""
        assert mmap.PAGESIZE % align == 0, "the mapping is only page-aligned"
        offset = _round_up(self._used, align)
        if offset + nbytes > self._mapping.nbytes:
            raise BudgetError(
                f"{self._what}: needs {nbytes} more bytes, found"
                f" {max(0, self._mapping.nbytes - offset)} left of {self._mapping.nbytes};"
                f" give this arena at least {offset + nbytes}"
            )
        self._used = offset + nbytes
        return offset

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The bytes at ``offset``, writable, without a copy."""
        assert 0 <= offset <= offset + nbytes <= self._used, "outside what was allocated"
        return self._mapping.bytes[offset : offset + nbytes]

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor over the bytes at ``offset``, without a copy."""
        nbytes = math.prod(shape) * dtype.itemsize
        return tensor_view(self.view(offset, nbytes), 0, dtype, shape)

    def close(self) -> None:
        """Gives the memory and its budget back; tensors still held read zeros from here on."""
        self._mapping.close()
        self._used = 0

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RingClosed(Exception):
    """Raised in the threads that wait on a ring when it is closed; they should end."""


class SlotRing:
    """Recycled page-aligned buffers through which numbered loads stream, in order.

    Load ``n`` lives in slot ``n % slots``: a producer calls ``acquire(n)``, fills the memory, and
    calls ``publish(n)``; each of the ``consumers`` calls ``wait(n)``, reads, and calls
    ``release(n)`` once. Several producers may fill different loads at once. All bytes come from
    ``budget`` as ``what``; raises BudgetError if they do not fit.
    """

    def __init__(
        self, slots: int, slot_bytes: int, budget: TierBudget, what: str, consumers: int = 1
    ) -> None:
        assert slots > 0 and slot_bytes > 0 and consumers > 0
        self.slots = slots
        self.slot_bytes = _round_up(slot_bytes, mmap.PAGESIZE)
        self._consumers = consumers
        self._mapping = _Mapping(slots * self.slot_bytes, budget, what)
        starts = range(0, self._mapping.nbytes, self.slot_bytes)
        self._buffers = [self._mapping.bytes[at : at + self.slot_bytes] for at in starts]
        lock = threading.Lock()
        self._freed = threading.Condition(lock)
        self._published = threading.Condition(lock)
        self._load = list(range(slots))  # the load that each slot holds or takes next
        self._ready = [False] * slots
        self._releases = [0] * slots
        self._error: BaseException | None = None

    def acquire(self, n: int) -> memoryview:
        """Waits until load ``n`` may be written and returns its slot; raises what aborted us."""
        return self._await(self._freed, n, needs_data=False)

    def publish(self, n: int) -> None:
        """Lets the consumers of load ``n`` go on; its producer calls this once it is written."""
        slot = n % self.slots
        with self._published:
            assert self._error or (self._load[slot] == n and not self._ready[slot])
            self._ready[slot] = True
            self._published.notify_all()

    def wait(self, n: int) -> memoryview:
        """Waits until load ``n`` is published and returns its slot; raises what aborted us."""
        return self._await(self._published, n, needs_data=True)

    def release(self, n: int) -> None:
        """Says that one consumer is done with load ``n``; the last one frees its slot."""
        slot = n % self.slots
        with self._freed:
            assert self._error or (self._load[slot] == n and self._ready[slot])
            self._releases[slot] += 1
            if self._releases[slot] == self._consumers:
                self._load[slot] = n + self.slots
                self._ready[slot] = False
                self._releases[slot] = 0
                self._freed.notify_all()

    def _await(self, condition: threading.Condition, n: int, needs_data: bool) -> memoryview:
        slot = n % self.slots
        with condition:
            # What is ready may still be an earlier load, which a slower consumer has not released.
            while self._error is None and (
                self._load[slot] < n
                or (needs_data and self._load[slot] == n and not self._ready[slot])
            ):
                condition.wait()
            if self._error is not None:
                raise self._error
            assert self._load[slot] == n, f"load {n} has already been released"
            return self._buffers[slot]

    def abort(self, error: BaseException) -> None:
        """Raises ``error`` in every thread that waits now or later; the first abort counts."""
        with self._freed:
            if self._error is None:
                self._error = error
            self._freed.notify_all()
            self._published.notify_all()

    def close(self) -> None:
        """Ends the waiting threads with RingClosed and gives the memory and its budget back.

        Threads that read or write a slot at this time keep it mapped, so end them before counting.
        """
        self.abort(RingClosed("the ring was closed"))
        self._buffers.clear()
        self._mapping.close()

    def __enter__(self) -> "SlotRing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
