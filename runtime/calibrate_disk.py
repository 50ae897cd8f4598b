"""Disk read rate of one reader thread, past the page cache.

Disks behind a rate limiter let short runs through faster than they can sustain, so the largest
block is read longest and first, and only the last part of a run counts.
"""

import itertools
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dovetail.ir.errors import InputError
from dovetail.runtime.calibrate_spec import MIB, Spec
from dovetail.runtime.direct_io import Reader
from dovetail.runtime.pools import Arena, TierBudget

BUFFERS = 8

Marks = list[tuple[float, int]]
"""Moments (``time.perf_counter``) and the bytes read up to each of them."""


class RegionReader:
    """Reads files region by region in a fixed shuffled order, none twice before all were read.

    A region is as long as the largest block; smaller blocks read it piece by piece. Not for two
    threads at once. Raises CheckpointError where a file cannot be read.
    """

    def __init__(self, files: Sequence[Path], region: int) -> None:
        regions = [(p, o) for p in files for o in range(0, p.stat().st_size - region + 1, region)]
        assert regions, "no file is as long as a region"
        random.Random(0).shuffle(regions)
        self._regions = itertools.cycle(regions)
        self._region = region
        # The kind of memory that a run streams into: huge pages make a direct read one long
        # transfer instead of hundreds of short ones (4.0 against 1.1 GB/s on one virtual machine).
        # Several buffers, so that no cache holds what the disk writes to.
        self._arena = Arena(BUFFERS * region, TierBudget(2 * BUFFERS * region), "calibration")
        views = [self._arena.view(self._arena.allocate(region), region) for _ in range(BUFFERS)]
        self._buffers = itertools.cycle(views)
        self._reader = Reader()
        for file in files:
            if self._reader.open(file).mode == "buffered":
                _forget(file)

    def __enter__(self) -> "RegionReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._arena.close()

    def read(self, block: int, seconds: float, stop: threading.Event | None = None) -> Marks:
        """Reads calls of ``block`` bytes for ``seconds`` or until ``stop``, one region at least."""
        marks = [(time.perf_counter(), 0)]
        end = marks[0][0] + seconds
        while len(marks) == 1 or (marks[-1][0] < end and not (stop and stop.is_set())):
            file, start = next(self._regions)
            buffer = next(self._buffers)
            for done in range(0, self._region, block):
                size = min(block, self._region - done)
                self._reader.read_into(buffer[done:], file, start + done, size)
                marks.append((time.perf_counter(), marks[-1][1] + size))
        return marks


def late_rate(marks: Marks) -> float:
    """Bytes/s over the last half of the time: what is left when burst credit is spent."""
    (first, _), (last, total) = marks[0], marks[-1]
    start = max((m for m in marks[:-1] if m[0] <= (first + last) / 2), key=lambda m: m[0])
    return (total - start[1]) / (last - start[0])


@contextmanager
def readable_files(
    files: Sequence[Path], standby: Sequence[Path], scratch: Path, spec: Spec
) -> Iterator[list[Path]]:
    """``files`` if together large enough to measure with, else ``standby``, else a scratch file.

    ``standby`` serves only from the disk that holds the folder ``scratch``. The scratch file is
    there inside the block only.
    """
    here = scratch.stat().st_dev
    for group in (files, [path for path in standby if path.stat().st_dev == here]):
        usable = [path for path in group if path.stat().st_size >= max(spec.disk_blocks)]
        if sum(path.stat().st_size for path in usable) >= spec.scratch_bytes:
            yield usable
            return
    # The last choice: it has to be written, and what was just written may still sit in a cache of
    # the disk or of a virtual machine's host.
    path = scratch / f"dovetail-calibrate-{os.getpid()}.tmp"
    try:
        _write_scratch(path, spec.scratch_bytes)
        yield [path]
    finally:
        path.unlink(missing_ok=True)


def _write_scratch(path: Path, size: int) -> None:
    # Numbered pieces of random bytes, because some disks do not read zeros and repeats.
    piece = random.Random(0).randbytes(1 * MIB - 8)
    try:
        with path.open("wb") as file:
            for start in range(0, size, len(piece) + 8):
                file.write(start.to_bytes(8, "little") + piece[: size - start - 8])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"calibration could not write its scratch file {path} of {size} bytes: "
            f"{error.strerror}; name another folder, or give a checkpoint to read instead"
        ) from error


def _forget(path: Path) -> None:
    # Where reads go through the page cache, what is in it already must not count as disk.
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
