"""This process's memory: how much it holds, how much it held at most, and how to give it back.

Linux only; the readers raise OSError where there is no /proc.
"""

import ctypes
import mmap
from pathlib import Path

_PROC = Path("/proc/self")

# From glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def rss_bytes() -> int:
    """Bytes of memory that the process holds now (resident set size)."""
    return int((_PROC / "statm").read_text().split()[1]) * mmap.PAGESIZE


def peak_rss_bytes() -> int:
    """Most bytes that the process held at one time, since its start or ``reset_peak_rss``."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line, expected one on Linux")


def reset_peak_rss() -> bool:
    """Starts ``peak_rss_bytes`` anew from what is held now; False if the system forbids it."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim_allocator(mmap_threshold: int, trim_threshold: int, arenas: int) -> bool:
    """Makes malloc give freed memory back to the system; False if it is not glibc's or refuses.

    Blocks of at least ``mmap_threshold`` bytes (old glibc: 32 MiB at most) get a mapping of their
    own, which goes back when freed. A heap gives back its free end once that is larger than
    ``trim_threshold`` bytes. At most ``arenas`` heaps are kept for threads that start from now on;
    by default each thread may hoard one.
    """
    libc = _glibc()
    if libc is None:
        return False
    # Setting any of the first two also stops glibc from raising them by itself as blocks are
    # freed, which is how a process that frees large blocks comes to keep them.
    assert max(mmap_threshold, trim_threshold, arenas) < 2**31, "mallopt takes a C int"
    settings = (
        (_M_MMAP_THRESHOLD, mmap_threshold),
        (_M_TRIM_THRESHOLD, trim_threshold),
        (_M_ARENA_MAX, arenas),
    )
    return all([libc.mallopt(name, value) == 1 for name, value in settings])


def malloc_trim() -> bool:
    """Gives malloc's free pages back to the system now; False if there were none to give."""
    libc = _glibc()
    return libc is not None and libc.malloc_trim(0) == 1


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
    except (AttributeError, OSError):
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
