"""Time work on a GPU: graph replays between events, so that launches cost what a server pays.

`HostClock` stands in where there is no GPU: it runs the same calls once, for trying the script out.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dovetail.kernels.timing import Work, captured, event_seconds, rounds_of


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one piece of work, the least and most, and how it was launched."""

    seconds: float
    least: float
    most: float
    how: str


class Clock(Protocol):
    """Times a list of works that are run after one another, per work."""

    device: str

    def time(self, works: Sequence[Work], graph: bool = True) -> Timing:
        """Seconds per work; with ``graph`` false it is never captured."""
        ...


class CudaClock:
    """Replays a CUDA graph of all works, or runs them as they are where they cannot be captured.

    The works differ in their data, so that a replay does not find its weights in L2 by chance.
    """

    device = "cuda"

    def __init__(self, repeats: int = 7, least_seconds: float = 0.02) -> None:
        self.repeats, self.least_seconds = repeats, least_seconds

    def time(self, works: Sequence[Work], graph: bool = True) -> Timing:
        """Warm up (compiling what must be), capture, replay ``repeats`` times."""

        def once() -> None:
            for work in works:
                work()

        for _ in range(2):
            once()
        torch.cuda.synchronize()
        replay, how = (captured(once), "graph") if graph else (once, "eager")
        rounds = rounds_of(event_seconds(replay, 1), self.least_seconds)
        samples = [event_seconds(replay, rounds) / len(works) for _ in range(self.repeats)]
        return Timing(statistics.median(samples), min(samples), max(samples), how)


class HostClock:
    """Runs every work once on the CPU; its figures mean nothing."""

    device = "cpu"

    def time(self, works: Sequence[Work], graph: bool = True) -> Timing:
        """Wall seconds per work."""
        begin = time.perf_counter()
        for work in works:
            work()
        seconds = (time.perf_counter() - begin) / len(works)
        return Timing(seconds, seconds, seconds, "dry")


@dataclass(frozen=True, slots=True)
class Peaks:
    """Measured rates of the device: bytes/s of a large copy (read and written), FLOP/s of a large
    bfloat16 product of random matrices."""

    bandwidth: float
    flops: float


def measure_peaks(clock: Clock, large: bool) -> Peaks:
    """Copy 4 GB and multiply 8192³ (16 MB and 256³ when not ``large``)."""
    count, side = (2 << 30, 8192) if large else (8 << 20, 256)
    source = torch.ones(count, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copy = clock.time([lambda: target.copy_(source)])
    left, right = (
        torch.randn(side, side, device=clock.device).to(torch.bfloat16) for _ in range(2)
    )
    product = clock.time([lambda: left @ right])
    return Peaks(2 * count / copy.seconds, 2 * side**3 / product.seconds)
