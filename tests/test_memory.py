"""Process memory: readings move with what is held; the allocator gives back what is freed."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.runtime import memory
from dovetail.runtime.pools import Arena, TierBudget

MIB = 1 << 20


def test_rss_follows_touched_memory() -> None:
    budget = TierBudget(64 * MIB)
    before = memory.rss_bytes()
    arena = Arena(64 * MIB, budget, "weights")
    assert memory.rss_bytes() - before < 16 * MIB  # mapped, not touched
    view = arena.view(arena.allocate(64 * MIB), 64 * MIB)
    for at in range(0, len(view), mmap.PAGESIZE):
        view[at] = 1
    assert memory.rss_bytes() - before > 48 * MIB
    arena.close()
    assert memory.rss_bytes() - before < 16 * MIB


def test_peak_rss_is_kept_until_reset() -> None:
    with mmap.mmap(-1, 64 * MIB) as block:
        block[:: mmap.PAGESIZE] = b"x" * (len(block) // mmap.PAGESIZE)
        held = memory.rss_bytes()
    assert memory.peak_rss_bytes() > held - 16 * MIB
    if memory.reset_peak_rss():
        assert memory.peak_rss_bytes() < held - 32 * MIB


def test_reset_peak_rss_says_when_it_is_not_permitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path / "absent")
    assert not memory.reset_peak_rss()


def test_allocator_calls_say_when_there_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    assert not memory.trim_allocator(1 << 20, 1 << 20, 1)
    assert not memory.malloc_trim()


# In its own process: the settings last as long as it does. The first round makes glibc raise its
# threshold; the small blocks between the large ones of the second keep its heap from shrinking.
_FREED = """
import sys
from dovetail.runtime.memory import malloc_trim, rss_bytes, trim_allocator
applied = sys.argv[1] == "trimmed" and trim_allocator(256 << 10, 1 << 20, 2)
before = rss_bytes()
for _ in range(2):
    held = [(b"x" * (1 << 20), b"x" * 1000) for _ in range(64)]
    full = rss_bytes()
    held = [small for _, small in held]
freed = rss_bytes()
print(int(applied), full - before, freed - before, int(malloc_trim()), rss_bytes() - before)
"""


@pytest.mark.parametrize("setting", ["trimmed", "default"])
def test_trimmed_allocator_gives_freed_blocks_back(setting: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FREED, setting],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    applied, full, freed, trimmed, after = map(int, done.stdout.split())
    assert full > 48 * MIB
    if applied:
        assert freed < 8 * MIB
    elif trimmed:
        assert freed > 32 * MIB, "nothing was kept, so the trimmed case shows nothing"
        assert after < 8 * MIB
