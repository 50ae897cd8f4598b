"""Time launches on a GPU: replays of a captured graph between events, so that what the host does
between launches does not count."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Work = Callable[[], object]
"""A piece of work that is launched on the current stream."""
LEAST_SECONDS = 0.01
"""A sample replays a graph until this much time has passed by the first replay's."""


class Timer(Protocol):
    """Times lists of works that are run after one another."""

    device: str

    def load(self, works: Sequence[Work]) -> Callable[[], float]:
        """Get the works ready (they are run at least once). What comes back takes one sample every
        time that it is called, in seconds per work."""
        ...


class CudaTimer:
    """Replays a CUDA graph of all works. Raises RuntimeError where they cannot be captured."""

    device = "cuda"

    def load(self, works: Sequence[Work]) -> Callable[[], float]:
        """Warm up, capture, and see how many replays a sample takes."""

        def once() -> None:
            for work in works:
                work()

        once()
        torch.cuda.synchronize()
        replay = captured(once)
        replay()
        rounds = rounds_of(event_seconds(replay, 1), LEAST_SECONDS)
        return lambda: event_seconds(replay, rounds) / len(works)


class HostTimer:
    """Runs the works once a sample on the processor: its seconds say nothing of a GPU."""

    device = "cpu"

    def load(self, works: Sequence[Work]) -> Callable[[], float]:
        """Wall seconds per work."""

        def sample() -> float:
            begin = time.perf_counter()
            for work in works:
                work()
            return (time.perf_counter() - begin) / len(works)

        return sample


def captured(once: Work) -> Work:
    """A replay of the CUDA graph of what ``once`` launches, which is run once before."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph.replay


def event_seconds(replay: Work, rounds: int) -> float:
    """Seconds of one replay, of ``rounds`` that are queued together."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(rounds):
        replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / rounds


def rounds_of(seconds: float, least: float) -> int:
    """How many replays of ``seconds`` take ``least`` seconds; at least one."""
    return max(1, math.ceil(least / max(seconds, 1e-7)))
