"""Which fraction of a linear layer the CPU computes, when the rest is sent to the GPU.

    minimise    max( α cpu , (1 - α) max(link, gpu) )     over α in [0, 1]

``cpu``, ``link`` and ``gpu`` are the seconds that all of the layer takes on the CPU, on its way to
the GPU, and there; copies run ahead of products. The two sides are a rising and a falling line, so
the best α is where they meet: α = m / (cpu + m) with m = max(link, gpu) (HeteGen, arXiv
2403.01164, balances the same three rates).
"""

import math
import time

from dovetail.solvers.solved import Solved


def seconds(share: float, cpu: float, link: float, gpu: float) -> float:
    """Seconds of a linear layer with ``share`` of it on the CPU."""
    return max(share * cpu, (1 - share) * max(link, gpu))


def solve(cpu: float, link: float, gpu: float) -> Solved[float]:
    """The best share and its seconds, which are their own bound. Raises ValueError for times that
    are negative or not finite."""
    begin = time.perf_counter()
    if not all(math.isfinite(t) and t >= 0 for t in (cpu, link, gpu)):
        raise ValueError(f"times {cpu}, {link}, {gpu}: they must be finite and not negative")
    there = max(link, gpu)
    share = there / (cpu + there) if there else 0.0
    found = seconds(share, cpu, link, gpu)
    return Solved(share, found, found, "optimal", time.perf_counter() - begin)
