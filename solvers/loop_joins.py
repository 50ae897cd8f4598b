"""Joins of a loop: the instants at which all ops of a set have ended, as ops of no duration.

Where several ops wait for the same set of ops, the instant at which the last of these ends recurs
every period like the start of an op, but it is the start of none: everything that comes after it
and before its next occurrence takes place within one period. Joins run on engines of their own, so
the loop with them has the schedules of the loop without.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from dovetail.solvers.loop_problem import LoopProblem, Op

Waits = tuple[int, frozenset[str]]


def with_joins(problem: LoopProblem) -> LoopProblem:
    """``problem`` with a join for every set of at least two ops, of iterations equally far back,
    for which two ops or more wait."""
    waits = {op.name: tuple(_waits(op)) for op in problem.ops}
    sets = {names for found in waits.values() for _, names in found if len(names) > 1}
    # A set counts for an op that waits for more than the set.
    users = Counter(
        part for found in waits.values() for _, names in found for part in sets if part <= names
    )
    shared = sorted(sorted(part) for part in sets if users[part] > 1)
    joins = {frozenset(part): f"join {place}" for place, part in enumerate(shared)}
    ops = [Op(name, name, 0, tuple((x, 0) for x in sorted(part))) for part, name in joins.items()]
    for op in problem.ops:
        more = [
            (name, distance)
            for distance, names in waits[op.name]
            for part, name in joins.items()
            if part <= names
        ]
        ops.append(replace(op, after=(*op.after, *more)))
    return replace(problem, ops=tuple(ops))


def _waits(op: Op) -> Iterator[Waits]:
    """The ops of each distance for which ``op`` waits."""
    for distance in sorted({distance for _, distance in op.after}):
        yield distance, frozenset(x for x, d in op.after if d == distance)
