"""Kernels that a process is about to load, in files beside the database: those which ended it, in
the compiler or the driver, are known to the next call, which would meet them again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dovetail.kernels.bench import KernelFailure

TWICE = 2
"""Once may have been whoever ended the process; the same kernels twice are not."""


class Attempts:
    """Attempts at kernels, by digest, as files of ``folder``; each has its process in its name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def at(self, digest: str) -> Iterator[None]:
        """Load the kernels of this digest within it. Raises KernelFailure where that ended the
        process before, TWICE."""
        ended = [path for path in self._folder.glob(f"{digest}.*") if _ended(path)]
        if len(ended) >= TWICE:
            raise KernelFailure("compile_error", f"ended the process {len(ended)} times")
        self._folder.mkdir(exist_ok=True)
        mine = self._folder / f"{digest}.{os.getpid()}"
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
