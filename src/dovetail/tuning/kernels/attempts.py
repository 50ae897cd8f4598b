"""Kernels that a process is about to load, in files beside the database: those which ended it, in
the compiler or the driver, are known to the next call, which would meet them again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from dovetail.kernels.bench import KernelFailure

TWICE = 2
"""Once may have been whoever ended the process; the same kernels twice are not."""


class Attempts:
    """Attempts at kernels, by digest, as files beside ``database``; each has its process in its
    name, and is gone when the attempt is over."""

    def __init__(self, database: Path) -> None:
        self._database = database

    @contextmanager
    def at(self, digest: str) -> Iterator[None]:
        """Load the kernels of this digest within it. Raises KernelFailure where that ended the
        process before, TWICE."""
        stem = f"{self._database.name}.trying-{digest[:16]}"
        beside = self._database.parent.glob(f"{escape(stem)}.*")
        ended = [path for path in beside if _ended(path)]
        if len(ended) >= TWICE:
            for path in ended:
                path.unlink(missing_ok=True)
            raise KernelFailure("compile_error", f"ended the process {len(ended)} times")
        mine = self._database.with_name(f"{stem}.{os.getpid()}")
        mine.touch()
        try:
            yield
        finally:
            # Whatever came of it, this process has outlived it.
            for path in (mine, *ended):
                path.unlink(missing_ok=True)


def _ended(attempt: Path) -> bool:
    """Whether the process of an attempt is gone."""
    pid = int(attempt.suffix[1:])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's, and at work
    return False
