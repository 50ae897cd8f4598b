"""How busy others keep the machine while a tuning measures: what tells a slow model of the machine
from a machine that had other work."""

import os
import time
from collections.abc import Callable

import psutil

LOUD = 0.25
"""Cores that others may keep busy before measured seconds say nothing of the cost model."""


class Others:
    """Counts the cores that other processes kept busy since it was made; ``worker`` gives the pid
    of the tuner's worker, None while there is none."""

    def __init__(self, worker: Callable[[], int | None]) -> None:
        self._worker = worker
        self._begin = (time.monotonic(), _busy(), self._own())

    @property
    def cores(self) -> float:
        """The mean since the beginning; time that a hypervisor took counts as others'."""
        began, busy, own = self._begin
        seconds = time.monotonic() - began
        return max(0.0, (_busy() - busy) - (self._own() - own)) / max(seconds, 1e-9)

    def _own(self) -> float:
        times = os.times()
        total = times.user + times.system + times.children_user + times.children_system
        pid = self._worker()
        if pid is not None:
            try:
                worker = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess:
                return total
            total += worker.user + worker.system
        return total


def _busy() -> float:
    """Seconds that all processors together have worked since the system began."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0)) - _guest(times)


def _guest(times: object) -> float:
    """What guests ran is in the user's time already."""
    return float(getattr(times, "guest", 0.0)) + float(getattr(times, "guest_nice", 0.0))
