"""Items of several blocks onto devices, so that flows between blocks stay on a device.

    minimise  sum over edges (a,b,W) of  sum_{i,j} W[i,j] C[x_a(i), x_b(j)]      x_b(i): device of i
    with      at most count[b,g] items and limit[b] weight of block b on device g

A block is a layer's experts (edges are transitions: ExFlow, 2024; MoETuner, 2025) or groups of
tokens (edges are choices: Speculative MoE, 2025). With the other blocks fixed, one block is an
assignment problem, so blocks are solved in turn: without limits by minimum-cost flow, and within
them by swaps. expert_affinity_solve.py goes on from there. The bound lets every item choose alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ortools.graph.python import min_cost_flow

from dovetail.solvers.solved import Solved

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Assignment = tuple[Ints, ...]
_LESS = 1e-9
_UNITS = 1 << 24


@dataclass(frozen=True, slots=True)
class Block:
    """Items by ``weight[item]``; a device takes at most ``count[device]`` of them, and of their
    weight at most ``limit``."""

    weight: Floats
    count: Ints
    limit: float


@dataclass(frozen=True, slots=True)
class Edge:
    """``flow[i, j]`` between item i of block ``first`` and item j of block ``second``."""

    first: int
    second: int
    flow: Floats


@dataclass(frozen=True, slots=True)
class AffinityProblem:
    """Blocks, edges, and the ``cost[device, device]`` of a unit of flow (0 to itself)."""

    blocks: tuple[Block, ...]
    edges: tuple[Edge, ...]
    cost: Floats


def crossing_cost(problem: AffinityProblem, x: Assignment) -> float:
    """The objective of devices ``x[block][item]``."""
    return float(
        sum((e.flow * problem.cost[np.ix_(x[e.first], x[e.second])]).sum() for e in problem.edges)
    )


def excess(block: Block, devices: Ints) -> float:
    """Weight above the limit, over all devices."""
    load = np.bincount(devices, weights=block.weight, minlength=len(block.count))
    return float(np.maximum(load - block.limit, 0).sum())


def check(problem: AffinityProblem, solved: Solved[Assignment]) -> list[str]:
    """What is wrong with an answer; empty if it keeps counts, limits, objective and bound."""
    problems = []
    for b, (block, devices) in enumerate(zip(problem.blocks, solved.value, strict=True)):
        count = np.bincount(devices, minlength=len(block.count))
        if len(devices) != len(block.weight) or (count > block.count).any():
            problems.append(f"block {b}: a device has more items than it takes")
        elif excess(block, devices) > 1e-6 * block.weight.sum() and solved.status != "infeasible":
            problems.append(f"block {b}: a device is over the limit {block.limit}")
    if not problems:
        value = crossing_cost(problem, solved.value)
        scale = max(value, 1.0)
        if abs(value - solved.objective) > 1e-6 * scale:
            problems.append(f"the crossing cost is {value}, not {solved.objective}")
        if solved.bound is not None and value < solved.bound - 1e-6 * scale:
            problems.append(f"{value} is below the bound {solved.bound}")
    return problems


def block_costs(problem: AffinityProblem, x: Sequence[Ints], b: int) -> Floats:
    """Cost of every device for every item of block ``b``, ``[item, device]``, as the other blocks
    are."""
    total = np.zeros((len(problem.blocks[b].weight), len(problem.cost)))
    for edge in problem.edges:
        if edge.second == b:
            total += edge.flow.T @ problem.cost[x[edge.first]]
        if edge.first == b:
            total += edge.flow @ problem.cost[:, x[edge.second]].T
    return total


def assign(cost: Floats, count: Ints) -> Ints:
    """Devices of least total ``cost[item, device]`` with at most ``count[device]`` items each, by
    minimum-cost flow (costs rounded to 2**-24 of their range)."""
    items, devices = cost.shape
    span = float(np.ptp(cost)) or 1.0
    units = np.rint((cost - cost.min()) / span * _UNITS).astype(np.int64)
    flow = min_cost_flow.SimpleMinCostFlow()
    tail = np.concatenate([np.repeat(np.arange(items), devices), items + np.arange(devices)])
    head = np.concatenate(
        [items + np.tile(np.arange(devices), items), np.full(devices, items + devices)]
    )
    room = np.concatenate([np.ones(items * devices, np.int64), count])
    price = np.concatenate([units.ravel(), np.zeros(devices, np.int64)])
    arcs = flow.add_arcs_with_capacity_and_unit_cost(tail, head, room, price)
    supply = np.concatenate([np.ones(items, np.int64), np.zeros(devices, np.int64), [-items]])
    flow.set_nodes_supplies(np.arange(items + devices + 1), supply)
    status = flow.solve()
    assert status == flow.OPTIMAL, status
    used = np.asarray(flow.flows(arcs[: items * devices])).reshape(items, devices)
    return np.asarray(used.argmax(1))


def alternate(problem: AffinityProblem, x: list[Ints], sweeps: int = 30) -> list[Ints]:
    """Blocks in turn, each assigned exactly as the others are, without limits, up and down until
    nothing improves."""
    best, x = crossing_cost(problem, tuple(x)), list(x)
    for sweep in range(sweeps):
        order = range(len(x)) if sweep % 2 == 0 else range(len(x) - 1, -1, -1)
        for b in order:
            x[b] = assign(block_costs(problem, x, b), problem.blocks[b].count)
        value = crossing_cost(problem, tuple(x))
        if value >= best * (1 - _LESS):
            return x
        best = value
    return x


def start(problem: AffinityProblem, seed: int) -> list[Ints]:
    """A first block at random, and every further one as the blocks before it want it."""
    rng = np.random.default_rng(seed)
    x: list[Ints] = []
    for b, block in enumerate(problem.blocks):
        edges = [e for e in problem.edges if max(e.first, e.second) == b]
        if edges:
            known = AffinityProblem(problem.blocks[: b + 1], tuple(edges), problem.cost)
            x.append(assign(block_costs(known, x, b), block.count))
        else:
            places = np.repeat(np.arange(len(block.count)), block.count)
            places = places[np.argsort(np.arange(len(places)) % len(block.weight), kind="stable")]
            x.append(rng.permutation(places[: len(block.weight)]))
    return x


def swap(problem: AffinityProblem, x: list[Ints], sweeps: int = 50) -> list[Ints]:
    """Pairs of items change places, or an item moves into an open one, while that brings a block
    nearer to its limit or, within it, lowers the objective."""
    x = list(x)
    for _ in range(sweeps):
        moved = False
        for b, block in enumerate(problem.blocks):
            found = swap_block(block, block_costs(problem, x, b), x[b])
            moved |= bool((found != x[b]).any())
            x[b] = found
        if not moved:
            return x
    return x


def swap_block(block: Block, cost: Floats, devices: Ints) -> Ints:
    """The swaps of one block: the best pair at a time, its open places being items of no weight."""
    items, g = cost.shape
    open_places = block.count - np.bincount(devices, minlength=g)
    at = np.concatenate([devices, np.repeat(np.arange(g), open_places)])
    price = np.vstack([cost, np.zeros((len(at) - items, g))])
    weight = np.concatenate([block.weight, np.zeros(len(at) - items)])
    load = np.bincount(at, weights=weight, minlength=g)
    every = np.arange(len(at))
    slack = _LESS * max(float(weight.sum()), 1e-300)
    while True:
        here = price[:, at] - price[every, at][:, None]
        gain = here + here.T
        heavier = weight[None, :] - weight[:, None]
        after = load[at][:, None] + heavier
        over = np.maximum(after - block.limit, 0)
        before = np.maximum(load[at] - block.limit, 0)
        worse = over + over.T - before[:, None] - before[None, :]
        gain[at[:, None] == at[None, :]] = np.inf
        gain[worse > slack] = np.inf
        relief = np.where(np.isfinite(gain), worse, 0.0)
        if relief.min() < -slack:
            gain = np.where(relief < -slack, relief * 1e12 + gain, np.inf)
        i, j = np.unravel_index(int(gain.argmin()), gain.shape)
        if gain[i, j] >= -_LESS * max(1.0, float(np.abs(price).max())):
            return np.asarray(at[:items])
        load[at[i]] += weight[j] - weight[i]
        load[at[j]] += weight[i] - weight[j]
        at[i], at[j] = at[j], at[i]


def lower_bound(problem: AffinityProblem) -> float:
    """What no assignment is below: on every edge, each item of one side has the places of the other
    side to itself, the cheapest for its largest flows."""
    total = 0.0
    for edge in problem.edges:
        sides = []
        for flow, other in ((edge.flow, edge.second), (edge.flow.T, edge.first)):
            count = problem.blocks[other].count
            rows = []
            for prices in problem.cost:
                slots = np.sort(np.repeat(prices, count))[: flow.shape[1]]
                rows.append(-np.sort(-flow, axis=1) @ slots)
            sides.append(float(np.min(rows, axis=0).sum()))
        total += max(sides)
    return total
