"""Overlap: `predictor, workload -> pipeline moves`, from the modulo schedule of every loop body.

The solver's schedule is cut into one order per engine, which the simulator follows (and an executor
can, with queues and events); a move is made only where that beats the policy's own order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from dovetail.ir.moves import Move, Pipeline
from dovetail.ir.plan import Certificate
from dovetail.ir.workload import Workload
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.loop.body import TICK, Loop, Order, StepWork
from dovetail.passes.loop.simulate import pace, steady_schedule
from dovetail.solvers import modulo_schedule
from dovetail.solvers.loop_bounds import lowest_period
from dovetail.solvers.loop_problem import Hold, LoopProblem, ModuloSchedule, Op
from dovetail.solvers.retime import retime

WORK, QUICK = 0.6, 0.01
"""Deterministic work of the solver for one loop body, a unit of which takes a few seconds: for a
plan, and to compare schedules, for which its list schedules and the policy's own order do."""
DEEP = 2.0
"""Work for a body whose proof is not close after ``WORK``."""
ENOUGH, CLOSE = 0.015, 0.02
"""Shares by which a shorter period would not be worth looking for: for the search, and for what a
plan says of itself. Where ``CLOSE`` is not reached, the search that is ``DEEP`` aims at half."""
RESOLUTION = 1500
"""Ticks of a period that the solver sees; finer ones only cost it time."""

Items = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
"""An order as pairs, by which a cache knows it."""


@dataclass(frozen=True, slots=True)
class Overlapped:
    """Pipeline moves and what is proved about every loop body."""

    moves: tuple[Move, ...]
    certificates: tuple[Certificate, ...]


def overlap(predictor: GpuPredictor, workload: Workload, work: float = WORK) -> Overlapped:
    """Pipeline moves for the steps of a workload, one kind of step and layer after the other, with
    so much of the solver's ``work`` for each."""
    moves: list[Move] = []
    certificates: list[Certificate] = []
    for step, (layer, _) in product(predictor.longest(workload), predictor.kinds):
        loop = predictor.loop(step, layer)
        before = pace(loop).period
        low = lowest_period(loop.problem) * TICK
        best, bound, order = before, low, loop.order
        # What needs no solver may prove that the policy's own order is best.
        if before > low * (1 + ENOUGH):
            best, solved, order = _solved(loop, before, work)
            bound = max(low, solved)
        moves += _moves(step, layer, loop, order)
        certificates.append(
            Certificate(
                name=f"{step.kind} layer {layer}: period",
                objective=best,
                bound=bound,
                status="optimal" if best <= bound * 1.001 else "feasible",
            )
        )
    return Overlapped(tuple(moves), tuple(certificates))


def _solved(loop: Loop, before: float, work: float) -> tuple[float, float, Order]:
    """The solver's period in seconds, or ``before`` where its order is no better, what it proved,
    and the order."""
    problem, order = loop.problem, tuple(loop.order.items())
    body = (problem.ops, problem.holds, tuple(problem.pools.items()), problem.chains)
    found, bound, items = _searched(*body, order, work, ENOUGH)
    low = max(bound, lowest_period(problem) * TICK)
    if work >= WORK and low < min(found, before) * (1 - CLOSE):
        order = items if found < before else order
        deep, deeper, better = _searched(*body, order, DEEP, CLOSE / 2)
        bound = max(bound, deeper)
        found, items = (deep, better) if deep < found else (found, items)
    if found < before * (1 - 1e-6):
        return found, bound, dict(items)
    return before, bound, loop.order


@lru_cache(maxsize=512)
def _searched(
    ops: tuple[Op, ...],
    holds: tuple[Hold, ...],
    pools: tuple[tuple[str, int], ...],
    chains: tuple[tuple[str, ...], ...],
    order: Items,
    work: float,
    enough: float,
) -> tuple[float, float, Items]:
    """The period of the solver's order, its bound, and that order. Schedules that differ in other
    steps have many a body in common, which is solved once."""
    loop = Loop(LoopProblem(ops, holds, dict(pools), chains), dict(order), {}, {})
    own = steady_schedule(loop)
    grain = max(1, round(own.period / RESOLUTION))
    coarse = _coarser(loop.problem, grain)
    starts = {name: start // grain for name, start in own.starts.items()}
    begin = retime(coarse, ModuloSchedule(max(1, own.period // grain), starts))
    solved = modulo_schedule.solve(coarse, work=work, start=begin, enough=enough)
    bound = _finer(coarse, grain, solved.bound or 0) * TICK
    if solved.status == "infeasible":
        return math.inf, bound, order
    better = replace(loop, order=order_of(loop.problem, solved.value))
    return pace(better).period, bound, tuple(better.order.items())


def _coarser(problem: LoopProblem, grain: int) -> LoopProblem:
    """The problem in ticks ``grain`` times as long, durations rounded down."""
    ops = tuple(replace(op, duration=op.duration // grain) for op in problem.ops)
    return replace(problem, ops=ops)


def _finer(coarse: LoopProblem, grain: int, bound: float) -> float:
    """What a bound of the coarser problem proves of the original, in the original's ticks.

    Any schedule of the original with period T gives one of the coarser problem: divide all by
    ``grain``, and round T up. Only ops that take no coarse tick, and yet hold units for one, may
    then be too short: put in one tick after each of them.
    """
    if grain == 1:
        return bound
    held = {x for hold in coarse.holds for x in (hold.first, *(name for name, _ in hold.last))}
    instant = sum(op.name in held and op.duration == 0 for op in coarse.ops)
    return max(0.0, (bound - instant - 1) * grain)


def order_of(problem: LoopProblem, schedule: ModuloSchedule) -> Order:
    """Every engine's operations in the order of one period, with how far ahead each one is."""
    order: dict[str, list[tuple[int, int, int, str]]] = {}
    for index, op in enumerate(problem.ops):
        turn, at = divmod(schedule.starts[op.name], schedule.period)
        # Operations that take no time tie: those of earlier iterations go first.
        order.setdefault(op.engine, []).append((at, -turn, index, op.name))
    return {
        engine: tuple(
            (name, turn - min(t for _, t, _, _ in items)) for _, turn, _, name in sorted(items)
        )
        for engine, items in order.items()
    }


def _moves(work: StepWork, layer: int, loop: Loop, order: Order) -> Iterator[Pipeline]:
    for engine, items in order.items():
        if items != loop.order[engine]:
            names, ahead = zip(*items, strict=True)
            yield Pipeline(work.kind, layer, engine, tuple(names), tuple(ahead))
