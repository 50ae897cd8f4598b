"""What a GPU executor needs beside its program: where weights and KV are, and how much runs where.

`step, settings -> groups`: which sequences' attention runs where; `experts -> loads`: what each of
a layer's copies brings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from dovetail.ir.batching import Admission, Group, Step
from dovetail.ir.moves import Tier


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """A layer's experts by name: in hbm, in ram and on disk; those of the latter two that the CPU
    computes in every step, the others being copied."""

    hbm: tuple[int, ...]
    ram: tuple[int, ...]
    disk: tuple[int, ...]
    cpu: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Dealing:
    """How experts are dealt to CPU and GPU once routing is known (HybriMoE, arXiv 2504.05897): the
    CPU takes at most ``most``, whose time is ``base`` and ``per_row`` seconds, where a copy takes
    ``copy`` seconds; it takes at most ``reads`` experts that are on disk."""

    most: int
    copy: float
    base: float
    per_row: float
    reads: int


@dataclass(frozen=True, slots=True)
class GpuSettings:
    """``embed``, ``head`` and ``dense[i]`` are the tiers of those units, ``experts[i]`` layer i's.

    The KV of tokens below ``admission.wall`` is in hbm, of the others in ram; ``attention_cpu``
    percent of what is in ram is the CPU's, the rest is copied in every step into buffers of
    ``kv_slot_tokens`` tokens. ``dealing[i]`` where layer i's experts are dealt out in each step.
    """

    admission: Admission
    embed: Tier
    head: Tier
    dense: tuple[Tier, ...]
    experts: tuple[LayerExperts | None, ...]
    dealing: tuple[Dealing | None, ...]
    attention_cpu: int
    kv_slot_tokens: int
    accumulated: bool
    expert_rows: int
    head_rows: int
    step_tokens: int
    block: int
    buckets: tuple[int, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class GpuGroup:
    """Sequences whose attention runs together, where (a kind of ir.gpu_tasks), and the tier of
    their KV."""

    kind: Literal["prefill", "hbm", "cpu", "copied"]
    home: Literal["hbm", "ram"]
    group: Group


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """The experts that one copy brings, by where they are."""

    ram: tuple[int, ...]
    disk: tuple[int, ...]

    @property
    def experts(self) -> tuple[int, ...]:
        """All of them, in the order in which they are in its buffer."""
        return (*self.ram, *self.disk)


def gpu_groups(step: Step, settings: GpuSettings) -> tuple[GpuGroup, ...]:
    """A step's groups as a program has them: prompts, then what decodes with its KV in hbm, on the
    CPU, and with KV that is copied."""
    wall = settings.admission.wall
    found: list[GpuGroup] = []
    in_ram: list[Group] = []
    for group in step.groups:
        home: Literal["hbm", "ram"] = "hbm" if group.members[0].offset < wall else "ram"
        if group.prefill:
            found.append(GpuGroup("prefill", home, group))
        elif home == "ram":
            in_ram.append(group)
    found += [
        GpuGroup("hbm", "hbm", group)
        for group in step.groups
        if not group.prefill and group.members[0].offset < wall
    ]
    left = round(sum(len(g.members) for g in in_ram) * settings.attention_cpu / 100)
    rest: list[Group] = []
    for group in in_ram:
        mine = min(left, len(group.members))
        left -= mine
        if mine:
            found.append(GpuGroup("cpu", "ram", _rows(group, 0, mine)))
        if mine < len(group.members):
            rest.append(_rows(group, mine, len(group.members)))
    for group in rest:
        found += [GpuGroup("copied", "ram", part) for part in _fitting(group, settings)]
    return tuple(found)


def _rows(group: Group, first: int, last: int) -> Group:
    """Some rows of a group that decodes."""
    return replace(group, members=group.members[first:last], lengths=group.lengths[first:last])


def _fitting(group: Group, settings: GpuSettings) -> Iterator[Group]:
    """Parts of a group whose KV, its new tokens included, fits one buffer each."""
    rows = max(1, settings.kv_slot_tokens // (group.past + 1))
    for first in range(0, len(group.members), rows):
        yield _rows(group, first, min(first + rows, len(group.members)))


def expert_loads(
    ram: Sequence[int], disk: Sequence[int], count: int, reading: Sequence[int]
) -> tuple[ExpertLoad, ...]:
    """Experts dealt out to ``count`` copies as evenly as can be, those on disk to the copies that
    are ``reading``."""
    on_disk: list[tuple[int, ...]] = [()] * count
    for j, load in enumerate(reading):
        first, last = (len(disk) * k // len(reading) for k in (j, j + 1))
        on_disk[load] = tuple(disk[first:last])
    in_ram: list[list[int]] = [[] for _ in range(count)]
    for expert in ram:
        load = min(range(count), key=lambda i: (len(in_ram[i]) + len(on_disk[i]), i))
        in_ram[load].append(expert)
    return tuple(ExpertLoad(tuple(a), b) for a, b in zip(in_ram, on_disk, strict=True))


def deal(
    dealing: Dealing, experts: LayerExperts, counts: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(experts that the CPU computes, experts that are copied) for these tokens by expert: those
    with the fewest tokens go to the CPU, as many as make the longer of both shortest."""
    on_disk = set(experts.disk)
    wanted = [e for e in (*experts.ram, *experts.disk) if counts[e]]
    wanted.sort(key=lambda e: (counts[e], e))
    best, seconds, reads, host = 0, len(wanted) * dealing.copy, 0, 0.0
    for taken, expert in enumerate(wanted[: dealing.most], 1):
        reads += expert in on_disk
        host += dealing.base + dealing.per_row * counts[expert]
        if reads > dealing.reads:
            break
        both = max(host, (len(wanted) - taken) * dealing.copy)
        if both < seconds:
            best, seconds = taken, both
    return wanted[:best], wanted[best:]
