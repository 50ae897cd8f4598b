"""Batch sizes and residency: the problem, its answers, and their independent checker.

A workload runs in steps; the times of like steps make a *span* that lasts as long as the busiest of
its *rows* (an engine, or a chain of engines that wait for each other). First one batch is chosen,
then for every role one option, and for every kind of unit how many stay in which tier:

    minimise  fixed + sum_s weight_s T_s + sum_o cost_o + sum_ut cost_ut x_ut
    rows      T_s >= start_r + sum_o load_or + sum_ut load_utr x_ut       for every row r of span s
    units     sum_t x_ut = count_u,  x_ut >= 0, whole
    tiers     taken_t + sum_o bytes_ot + sum_u size_ut x_ut + most_o shared_ot <= capacity_t

``shared`` is memory that roles use one after the other, so that only the largest counts. Times are
whole ticks, memory whole bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a role: ticks it adds to every row (less than 0 where it takes some off) and
    to the objective, bytes it takes of tiers, and bytes that it shares with other roles."""

    load: tuple[int, ...]
    cost: int = 0
    nbytes: Mapping[str, int] = field(default_factory=dict)
    shared: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Home:
    """What one unit does that stays in a tier: ticks of every row and of the objective, and bytes
    of tiers."""

    load: tuple[int, ...]
    cost: int = 0
    nbytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Units:
    """``count`` units of a kind, each in one of the ``homes``."""

    count: int
    homes: Mapping[str, Home]


@dataclass(frozen=True, slots=True)
class Span:
    """``weight`` times the busiest of these rows, from row ``first`` to before row ``last``."""

    weight: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A choice of batch sizes: its spans, the ticks that every row has before any choice, and the
    options and units that are left to choose."""

    fixed: int
    spans: tuple[Span, ...]
    start: tuple[int, ...]
    roles: tuple[tuple[Option, ...], ...]
    units: tuple[Units, ...]
    taken: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """An answer: the batch by number, the option of every role, and for every kind of unit how many
    are in each tier. ``binding`` names the tiers that are too small where there is no answer, and
    ``least`` the bytes that each tier needs at least when the others are as they are."""

    batch: int
    options: tuple[int, ...] = ()
    homes: tuple[Mapping[str, int], ...] = ()
    binding: tuple[str, ...] = ()
    least: Mapping[str, int] = field(default_factory=dict)


def objective(batch: Batch, choice: Choice) -> int:
    """The ticks of a choice, computed from the tables."""
    chosen = [role[place] for role, place in zip(batch.roles, choice.options, strict=True)]
    homes = [
        (units.homes[tier], count)
        for units, found in zip(batch.units, choice.homes, strict=True)
        for tier, count in found.items()
    ]
    rows = [
        start + sum(o.load[r] for o in chosen) + sum(h.load[r] * n for h, n in homes)
        for r, start in enumerate(batch.start)
    ]
    spans = sum(span.weight * max(rows[span.first : span.last]) for span in batch.spans)
    costs = sum(option.cost for option in chosen) + sum(home.cost * n for home, n in homes)
    return batch.fixed + spans + costs


def used(batch: Batch, choice: Choice) -> dict[str, int]:
    """The bytes that a choice takes of every tier."""
    chosen = [role[place] for role, place in zip(batch.roles, choice.options, strict=True)]
    total = dict(batch.taken)
    for option in chosen:
        for tier, nbytes in option.nbytes.items():
            total[tier] = total.get(tier, 0) + nbytes
    for units, found in zip(batch.units, choice.homes, strict=True):
        for home, count in found.items():
            for tier, nbytes in units.homes[home].nbytes.items():
                total[tier] = total.get(tier, 0) + nbytes * count
    for tier in sorted({tier for option in chosen for tier in option.shared}):
        most = max(option.shared.get(tier, 0) for option in chosen)
        total[tier] = total.get(tier, 0) + most
    return total


def check(batch: Batch, capacities: Mapping[str, int], choice: Choice) -> list[str]:
    """What makes ``choice`` no answer, one sentence each; empty if it is one."""
    return list(_faults(batch, capacities, choice))


def _faults(batch: Batch, capacities: Mapping[str, int], choice: Choice) -> Iterator[str]:
    if len(choice.options) != len(batch.roles) or len(choice.homes) != len(batch.units):
        yield f"{len(choice.options)} options and {len(choice.homes)} kinds of units are decided"
        return
    for role, place in zip(batch.roles, choice.options, strict=True):
        if not 0 <= place < len(role):
            yield f"option {place} of a role that has {len(role)}"
            return
    for units, found in zip(batch.units, choice.homes, strict=True):
        if sum(found.values()) != units.count or min(found.values(), default=0) < 0:
            yield f"units are {dict(found)}, expected {units.count} together"
        if unknown := sorted(set(found) - set(units.homes)):
            yield f"units are in {unknown}, which is no home of theirs"
            return
    for tier, nbytes in used(batch, choice).items():
        if nbytes > capacities.get(tier, nbytes):
            yield f"tier {tier!r}: {nbytes} bytes taken, capacity {capacities[tier]}"


def check_batch(batch: Batch) -> None:
    """Raises ValueError naming what makes ``batch`` malformed."""
    rows = len(batch.start)
    loads = [o.load for role in batch.roles for o in role]
    loads += [home.load for units in batch.units for home in units.homes.values()]
    wrong = []
    if any(len(load) != rows for load in loads):
        wrong.append(f"every load needs {rows} rows")
    if any(not 0 <= s.first < s.last <= rows or s.weight < 0 for s in batch.spans):
        wrong.append(f"spans must have rows of 0..{rows} and weights >= 0")
    if not all(batch.roles) or not all(units.homes for units in batch.units):
        wrong.append("every role needs an option and every kind of unit a home")
    if wrong:
        raise ValueError(f"these tables cannot be solved: {'; '.join(wrong)}")


def tiers_of(batches: Sequence[Batch]) -> tuple[str, ...]:
    """Every tier that something takes bytes of, sorted."""
    found: set[str] = set()
    for batch in batches:
        found |= set(batch.taken)
        for option in (o for role in batch.roles for o in role):
            found |= set(option.nbytes) | set(option.shared)
        for home in (h for units in batch.units for h in units.homes.values()):
            found |= set(home.nbytes)
    return tuple(sorted(found))
