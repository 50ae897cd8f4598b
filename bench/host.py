"""What the benches ask the operating system: the machine's name, its load, memory, page cache."""

import os
import platform
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Self

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
_TICKS = os.sysconf("SC_CLK_TCK")
_SAMPLE_SECONDS = 0.05


def describe_machine() -> dict[str, str | int]:
    """The machine and the software that a result was measured with, and when."""
    facts: dict[str, str | int] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": memory_bytes(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    return facts | {name: version(name) for name in PACKAGES}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Bytes that the system could give to a process now without swapping."""
    return _kib_fields(Path("/proc/meminfo"))["MemAvailable"]


def _kib_fields(path: Path) -> dict[str, int]:
    """The lines ``name: number kB`` of a file of /proc, in bytes."""
    fields = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.split()[0]) * 1024
    return fields


def resident_bytes(pid: int | str = "self") -> tuple[int, int]:
    """Resident memory of a process, and the part of it that no file backs. Mapped file pages are
    in the first only; the system can take those back. Raises OSError once the process is gone."""
    fields = _kib_fields(Path(f"/proc/{pid}/status"))
    # A process that has ended but was not waited for has no memory lines any more.
    return fields.get("VmRSS", 0), fields.get("RssAnon", 0)


def read_bytes(pid: int | str = "self") -> int:
    """Bytes that a process had fetched from disk, page faults included. Raises OSError."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        name, _, value = line.partition(": ")
        if name == "read_bytes":
            return int(value)
    raise OSError(f"/proc/{pid}/io has no read_bytes line, expected one on Linux")


def evict(folders: Iterable[Path]) -> None:
    """Drop the files of these folders from the page cache; pages that are mapped stay."""
    for folder in folders:
        for path in folder.iterdir():
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


@dataclass(slots=True)
class Window:
    """A stretch of time: its seconds, the cores that this process and the children it waited for
    used, and those that everything else used (time stolen from a virtual machine included)."""

    seconds: float = 0.0
    own_cores: float = 0.0
    other_cores: float = 0.0
    _begin: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __enter__(self) -> Self:
        self._begin = _clocks()
        return self

    def __exit__(self, *_: object) -> None:
        wall, own, busy = (end - begin for end, begin in zip(_clocks(), self._begin, strict=True))
        self.seconds = wall
        self.own_cores = own / wall
        self.other_cores = max(0.0, (busy - own) / wall)


def _clocks() -> tuple[float, float, float]:
    """Seconds: wall clock, CPU of this process and its children, CPU of the whole machine."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    with Path("/proc/stat").open() as file:
        fields = [int(value) for value in file.readline().split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    busy = user + nice + system + irq + softirq + steal
    return time.perf_counter(), own, busy / _TICKS


@dataclass(slots=True)
class MemoryWatch:
    """The most memory that this process held while the watch was on, sampled by a thread."""

    peak_bytes: int = 0
    anonymous_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._sample()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        total, anonymous = resident_bytes()
        self.peak_bytes = max(self.peak_bytes, total)
        self.anonymous_bytes = max(self.anonymous_bytes, anonymous)
