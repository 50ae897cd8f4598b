"""Reads file ranges into page-aligned memory, past the page cache where the file system allows.

Reading past the cache costs a tenth of the processor time of a buffered read and leaves the
memory budget alone. Where O_DIRECT does not work (tmpfs, some network file systems), the same
calls read through the cache and drop what they brought in.
"""

import ctypes
import errno
import logging
import mmap
import os
import threading
from pathlib import Path
from typing import Literal

from dovetail.ir.errors import CheckpointError

# Direct reads need offsets, lengths and memory in multiples of the device's logical block; no
# disk's is larger than this. One that wants more fails the probe and is read through the cache.
ALIGNMENT = 4096
DEFAULT_BLOCK_BYTES = 8 << 20

Mode = Literal["direct", "buffered"]

_log = logging.getLogger(__name__)
# What file systems answer to O_DIRECT when they do not do it; anything else is a real failure.
_UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


def direct_span(offset: int, nbytes: int) -> int:
    """Bytes of buffer that reading ``nbytes`` at ``offset`` needs, with the aligned ends."""
    return _round_up(offset + nbytes) - _round_down(offset)


def _round_down(value: int) -> int:
    return value // ALIGNMENT * ALIGNMENT


def _round_up(value: int) -> int:
    return _round_down(value + ALIGNMENT - 1)


class DirectFile:
    """One open file; ``mode`` says how it is read, ``size`` is in bytes.

    Raises CheckpointError if the file cannot be opened. Reads may run in several threads at
    once; ``close`` must come after the last one.
    """

    __slots__ = ("_fd", "mode", "path", "size")

    def __init__(self, path: Path, direct: bool = True) -> None:
        self.path = path
        try:
            fd = _open_direct(path) if direct else None
            self.mode: Mode = "buffered" if fd is None else "direct"
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
            self.size = os.fstat(self._fd).st_size
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened: {error.strerror}; check that it is there and readable"
            ) from error

    def read_into(
        self,
        buffer: memoryview,
        offset: int,
        nbytes: int,
        align: int = 1,
        block_bytes: int = DEFAULT_BLOCK_BYTES,
    ) -> int:
        """Reads ``nbytes`` at ``offset`` and returns where in ``buffer`` they start.

        ``buffer`` is page-aligned memory of at least ``direct_span(offset, nbytes)`` bytes. The
        start is a multiple of ``align``; files as safetensors writes them need no move for it.
        Raises CheckpointError if the file ends early or the disk fails.
        """
        if nbytes == 0:
            return 0
        assert len(buffer) >= direct_span(offset, nbytes), "buffer smaller than direct_span"
        assert _address(buffer) % ALIGNMENT == 0, "buffer is not page-aligned"
        assert block_bytes % ALIGNMENT == 0 and block_bytes > 0, "block is not a page multiple"
        start = _round_down(offset)
        self._fill(buffer, start, offset + nbytes, block_bytes)
        delta = offset - start
        shift = delta % align
        if shift:
            buffer[delta - shift : delta - shift + nbytes] = buffer[delta : delta + nbytes]
        return delta - shift

    def _fill(self, buffer: memoryview, start: int, end: int, block_bytes: int) -> None:
        """Fills ``buffer`` from file position ``start`` on, at least up to ``end``."""
        position = start
        last = _round_up(end)
        while position < end:
            stop = min(position + block_bytes, last)
            got = self._read_block(buffer[position - start : stop - start], position)
            if position + got >= end:
                return
            # A read cut short goes on from the last whole page, because the next one must be
            # aligned; only at the end of the file may there be less than a page.
            whole = _round_down(got)
            if whole == 0:
                raise CheckpointError(
                    f"{self.path}: truncated: expected at least {end} bytes, found"
                    f" {position + got}; it was cut or replaced while open: download it again"
                )
            position += whole

    def _read_block(self, block: memoryview, position: int) -> int:
        try:
            # Releases the GIL; Python itself repeats a call that a signal interrupted (PEP 475).
            got = os.preadv(self._fd, [block], position)
            if self.mode == "buffered":
                os.posix_fadvise(self._fd, position, len(block), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: reading {len(block)} bytes at byte {position} failed:"
                f" {error.strerror}; check the disk, then download the file again"
            ) from error
        return got

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


def _open_direct(path: Path) -> int | None:
    """A descriptor for direct reads, proved by reading a page, or None where they do not work."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        fd: int = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    try:
        with mmap.mmap(-1, ALIGNMENT) as page:
            os.preadv(fd, [page], 0)
    except OSError as error:
        os.close(fd)
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return fd


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class Reader:
    """Reads ranges of many files and keeps each file open after its first use.

    ``direct=False`` reads everything through the page cache. Several threads may read at once;
    ``close`` must come after the last read.
    """

    def __init__(self, direct: bool = True, block_bytes: int = DEFAULT_BLOCK_BYTES) -> None:
        self._direct = direct
        self._block_bytes = block_bytes
        self._files: dict[Path, DirectFile] = {}
        self._lock = threading.Lock()

    def read_into(
        self, buffer: memoryview, file: Path, offset: int, nbytes: int, align: int = 1
    ) -> int:
        """Reads like ``DirectFile.read_into``; raises CheckpointError, naming ``file``."""
        opened = self._files.get(file) or self.open(file)
        return opened.read_into(buffer, offset, nbytes, align, self._block_bytes)

    def open(self, file: Path) -> DirectFile:
        """The open handle of ``file``; raises CheckpointError if it cannot be opened."""
        with self._lock:
            if file not in self._files:
                opened = DirectFile(file, self._direct)
                if self._direct and opened.mode == "buffered":
                    _log.warning(
                        "%s: its file system does not support direct reads (O_DIRECT); reading"
                        " through the page cache, which costs more processor time",
                        file,
                    )
                self._files[file] = opened
            return self._files[file]

    def close(self) -> None:
        """Closes every file."""
        with self._lock:
            for opened in self._files.values():
                opened.close()
            self._files.clear()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
