"""How much engines slow each other down when they run at the same time."""

import bisect
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F

from dovetail.runtime.calibrate_disk import RegionReader, late_rate

WINDOWS = 32
"""Short enough that one falls between the disturbances of other processes: some 50 ms each."""


def run_together(
    calls: Sequence[Callable[[int], object]],
    seconds: float,
    reader: tuple[RegionReader, int] | None = None,
) -> tuple[float, float]:
    """Calls/s of one worker and the reader's bytes/s (0 if none) when all run for ``seconds``.

    Each worker has a function of its own in ``calls`` and counts up its argument; ``reader`` comes
    with its block size. Wall-clock time, unlike in ``calibrate_compute``: what a thread loses by
    waiting for a core or for the interpreter is what is measured here.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(len(calls) + 1) as pool:
        try:
            disk = pool.submit(reader[0].read, reader[1], seconds, stop) if reader else None
            jobs = [pool.submit(_repeat, call, stop) for call in calls]
            stop.wait(seconds)
        finally:
            stop.set()
        ends = [job.result() for job in jobs]
        return best_window(ends), late_rate(disk.result()) if disk else 0.0


def products(weights: Sequence[Tensor], rows: int, workers: int) -> list[Callable[[int], object]]:
    """For each worker a function that multiplies ``rows`` rows with one of its own weights."""
    x = torch.ones(rows, weights[0].shape[1], dtype=weights[0].dtype)

    def worker(mine: Sequence[Tensor]) -> Callable[[int], object]:
        return lambda i: F.linear(x, mine[i % len(mine)])

    return [worker(weights[i::workers]) for i in range(workers)]


def _repeat(call: Callable[[int], object], stop: threading.Event) -> list[float]:
    """Moments at which calls ended, the warm-up call first."""
    torch.set_num_threads(1)
    ends: list[float] = []
    with torch.inference_mode():
        while len(ends) < 3 or not stop.is_set():
            call(len(ends))
            ends.append(time.perf_counter())
    return ends


def best_window(ends: Sequence[Sequence[float]]) -> float:
    """Calls/s per worker in the best of 32 equal windows of the time that all ran together."""
    first, last = max(e[0] for e in ends), min(e[-1] for e in ends)
    if first >= last:
        return sum((len(e) - 1) / (e[-1] - e[0]) for e in ends) / len(ends)
    width = (last - first) / WINDOWS
    edges = [first + width * i for i in range(WINDOWS)] + [last]
    counts = [sum(_calls_until(e, edge) for e in ends) for edge in edges]
    most = max(b - a for a, b in itertools.pairwise(counts))
    return most / width / len(ends)


def _calls_until(ends: Sequence[float], moment: float) -> float:
    """Calls ended until ``moment``, the one under way counted by its share."""
    i = min(bisect.bisect_right(ends, moment), len(ends) - 1)
    return i - 1 + min(1.0, (moment - ends[i - 1]) / (ends[i] - ends[i - 1]))
