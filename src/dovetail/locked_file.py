"""Files that one process at a time writes to."""

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

from dovetail.ir.errors import InputError


def open_locked(path: Path, flags: int, alone: str) -> int:
    """Open or create a file for reading and writing and lock it for this process; returns its
    descriptor.

    Raises InputError with ``alone``, what was expected and what to do, if another process has it,
    and OSError.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o666)
        with ExitStack() as on_error:
            on_error.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{path}: found it in use by another process; {alone}") from error
            # A run that ended in between has removed or replaced the file of this name.
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                on_error.pop_all()
                return fd
