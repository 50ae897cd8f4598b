"""Batch sizes and residency: the integer program of batch_problem.py, solved over all batches.

Batches are branched on, best floor first: a batch is only looked at while its floor, a bound known
before, leaves room for something better, and is then solved as a program of its own
(batch_model.py) that only admits what is good enough. The least of all bounds and floors bounds
every answer.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dovetail.solvers.batch_model import NO_LIMIT, BatchModel
from dovetail.solvers.batch_problem import Batch, Choice, check_batch, tiers_of
from dovetail.solvers.solved import Solved

_LEAST_WORK = 0.02
"""What every batch that is looked at may take, whatever was spent before."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Batches that were looked at, of how many, and CP-SAT's deterministic work on them."""

    batches: int
    of: int
    work: float


@dataclass(frozen=True, slots=True)
class Ranked:
    """Choices, best first; the first is the answer. ``effort`` is what they took."""

    choices: tuple[Choice, ...]
    objectives: tuple[int, ...]
    effort: Effort


def solve(
    batches: Sequence[Batch],
    capacities: Mapping[str, int],
    *,
    floors: Sequence[int] | None = None,
    near: float = 0.0,
    most: int | None = None,
    work: float = 10.0,
    blame: bool = True,
) -> Solved[Ranked]:
    """The fastest choice, and of every batch the fastest within ``near`` (a share) of it.

    ``floors`` are ticks that each batch takes at least; ``batches`` is only indexed where they
    leave room, so it may make its tables when asked. Answers of more than ``most`` ticks are not
    looked for. ``work`` is in CP-SAT's deterministic units, about seconds of one core. Where no
    batch fits, the status is ``infeasible`` and, with ``blame``, the first choice names the binding
    tiers; where none is within ``most``, ``bound`` is above ``most`` and there are no choices.
    Raises ValueError for malformed tables.
    """
    begin = time.perf_counter()
    search = _Search(batches, capacities, floors or [0] * len(batches), near, most)
    search.run(work)
    effort = Effort(search.looked, len(batches), search.work)
    if search.found:
        found = sorted(search.found, key=lambda pair: (pair[0], pair[1].batch))
        best = found[0][0]
        choices = [(ticks, c) for ticks, c in found if ticks <= best * (1 + near)]
        value = Ranked(tuple(c for _, c in choices), tuple(t for t, _ in choices), effort)
        bound = min(search.bound, best)
        status: Literal["optimal", "feasible"] = "optimal" if bound == best else "feasible"
        return Solved(value, best, bound, status, time.perf_counter() - begin)
    if most is None and not search.open:
        blamed = _blamed(batches, capacities, work) if blame else Choice(-1)
        value = Ranked((blamed,), (), effort)
        return Solved(value, float("inf"), None, "infeasible", time.perf_counter() - begin)
    value = Ranked((), (), effort)
    return Solved(value, float("inf"), search.bound, "feasible", time.perf_counter() - begin)


class _Search:
    """Branch and bound over batches."""

    def __init__(
        self,
        batches: Sequence[Batch],
        capacities: Mapping[str, int],
        floors: Sequence[int],
        near: float,
        most: int | None,
    ) -> None:
        self._batches, self._capacities, self._floors = batches, capacities, floors
        self._near, self._most = near, most
        self.found: list[tuple[int, Choice]] = []
        self._bounds: dict[int, int] = {}
        self._beyond = NO_LIMIT
        self.open = False
        self.looked, self.work = 0, 0.0

    @property
    def bound(self) -> int:
        """What no answer beats."""
        return min(self._beyond, *self._bounds.values(), NO_LIMIT)

    def run(self, work: float) -> None:
        """Looks at batches while their floors leave room, and again, only for what is better than
        the best, at those of which too little was proved."""
        order = sorted(range(len(self._batches)), key=lambda b: (self._floors[b], b))
        for number in order:
            limit = self._limit()
            if limit is not None and self._floors[number] > limit:
                # What follows is no better than this floor.
                self._beyond = self._floors[number]
                break
            self.looked += 1
            self._look(number, limit, max(_LEAST_WORK, (work - self.work) / 8))
        if self.found:
            best = min(ticks for ticks, _ in self.found)
            for number in sorted(self._bounds, key=lambda b: (self._bounds[b], b)):
                if self._bounds[number] < best and self.work < work:
                    self._look(number, best - 1, (work - self.work) / 2)
                    best = min(ticks for ticks, _ in self.found)

    def _limit(self) -> int | None:
        """The most ticks that are still of interest."""
        if not self.found:
            return self._most
        best = min(ticks for ticks, _ in self.found)
        near = int(best * (1 + self._near)) if self._near else best - 1
        return near if self._most is None else min(near, self._most)

    def _look(self, number: int, limit: int | None, work: float) -> None:
        batch = self._batches[number]
        check_batch(batch)
        answer = BatchModel(batch, number, self._capacities).fastest(limit, work)
        self.work += answer.work
        self.open |= answer.status == "unknown"
        bound = answer.bound
        if answer.status == "infeasible" and limit is not None:
            # It may hold an answer, though none within the limit.
            bound = limit + 1
        self._bounds[number] = max(bound, self._floors[number], self._bounds.get(number, 0))
        if answer.choice is not None:
            self.found = [pair for pair in self.found if pair[1].batch != number]
            self.found.append((answer.objective, answer.choice))


def _blamed(batches: Sequence[Batch], capacities: Mapping[str, int], work: float) -> Choice:
    """The fewest tiers whose capacities alone leave no answer, and what each tier needs at least
    when the others are as they are."""
    tiers = [tier for tier in tiers_of(batches) if tier in capacities]
    sets: Iterator[tuple[str, ...]] = itertools.chain.from_iterable(
        itertools.combinations(tiers, n) for n in range(1, len(tiers) + 1)
    )
    binding: tuple[str, ...] = ()
    for some in sets:
        held = {tier: capacities[tier] for tier in some}
        if not _fits(batches, held, work):
            binding = some
            break
    least = {}
    for tier in tiers:
        others = {name: size for name, size in capacities.items() if name != tier}
        nbytes = _least(batches, others, tier, work)
        if nbytes is not None:
            least[tier] = nbytes
    return Choice(-1, binding=binding, least=least)


def _fits(batches: Sequence[Batch], capacities: Mapping[str, int], work: float) -> bool:
    return any(
        BatchModel(batch, number, capacities).leanest("", work).status != "infeasible"
        for number, batch in enumerate(batches)
        if all(_at_least(batch, tier) <= size for tier, size in capacities.items())
    )


def _least(
    batches: Sequence[Batch], capacities: Mapping[str, int], tier: str, work: float
) -> int | None:
    """The least bytes of ``tier`` with these capacities of others; None if they leave nothing."""
    best: int | None = None
    order = sorted(range(len(batches)), key=lambda b: (_at_least(batches[b], tier), b))
    for number in order:
        batch = batches[number]
        if best is not None and _at_least(batch, tier) >= best:
            break
        if all(_at_least(batch, name) <= size for name, size in capacities.items()):
            answer = BatchModel(batch, number, capacities).leanest(tier, work)
            if answer.status != "infeasible":
                best = min(answer.bound, best if best is not None else answer.bound)
    return best


def _at_least(batch: Batch, tier: str) -> int:
    """Bytes of ``tier`` that a batch takes whatever is chosen, quickly."""
    total = batch.taken.get(tier, 0)
    total += sum(min(o.nbytes.get(tier, 0) for o in role) for role in batch.roles)
    for units in batch.units:
        each = min(home.nbytes.get(tier, 0) for home in units.homes.values())
        total += units.count * each
    shared = [min(o.shared.get(tier, 0) for o in role) for role in batch.roles]
    return total + max(shared, default=0)
