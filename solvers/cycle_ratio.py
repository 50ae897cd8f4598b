"""Difference constraints with a period: the smallest integer T for which starts exist.

    s_v >= s_u + w - d T     for every edge (u, v, w, d)

has a solution if and only if no cycle has sum(w) > T sum(d). Newton's method on the largest cycle
ratio (Cochet-Terrasson et al., 1998): longest paths at T, and where a cycle shows that T is too
small, the ratio of that cycle is the next T.
"""

from collections.abc import Iterable, Sequence

Edge = tuple[str, str, int, int]


def smallest_period(
    nodes: Iterable[str], edges: Sequence[Edge], low: int = 1
) -> tuple[int, dict[str, int]] | None:
    """The smallest T >= ``low`` and the earliest starts >= 0 at that T; None if no T will do."""
    period, names = low, list(nodes)
    while True:
        starts, cycle = _earliest(names, edges, period)
        if not cycle:
            return period, starts
        ticks, distance = sum(w for _, _, w, _ in cycle), sum(d for *_, d in cycle)
        if distance <= 0:
            return None
        period = -(-ticks // distance)


def _earliest(
    names: list[str], edges: Sequence[Edge], period: int
) -> tuple[dict[str, int], list[Edge]]:
    """Longest paths from a common origin (Bellman, 1958), or a cycle that has none."""
    starts = dict.fromkeys(names, 0)
    by: dict[str, Edge] = {}
    while True:
        moved = False
        for edge in edges:
            u, v, ticks, distance = edge
            if (start := starts[u] + ticks - distance * period) > starts[v]:
                starts[v], by[v], moved = start, edge, True
        if not moved:
            return starts, []
        if cycle := _cycle(by):
            return starts, cycle


def _cycle(by: dict[str, Edge]) -> list[Edge]:
    """A cycle among the edges that set the starts: it is longer than its periods allow."""
    seen: dict[str, str] = {}
    for origin in by:
        node = origin
        while node in by and node not in seen:
            seen[node] = origin
            node = by[node][0]
        if node in by and seen[node] == origin:
            cycle = [by[node]]
            while (node := cycle[-1][0]) != cycle[0][1]:
                cycle.append(by[node])
            return cycle
    return []
