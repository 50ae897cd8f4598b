"""Tier placement of a GPU plan: `moves, routing -> moves`, what gains most goes to hbm.

A step brings to the GPU what hbm does not hold: from ram over the link, from disk over both. Dense
layers are needed in every step; an expert, where experts are fetched once routing is known, in the
share of steps in which a token chooses it. Every trace is a scenario, and the worst of them counts
(max-min robust), so that a placement does not serve one kind of prompt alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dovetail.ir.moves import Move, Place, Tier
from dovetail.ir.placement import experts_of
from dovetail.ir.plan import Certificate
from dovetail.ir.task_graph import TaskGraph
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.expert_loads import ExpertLoads
from dovetail.passes.gpu.memory import tier_bytes, unit_sizes
from dovetail.passes.policies.gpu import GpuSetting
from dovetail.solvers import tier_placement
from dovetail.solvers.tier_placement import Item, TierProblem

WORK = 1.0
"""Deterministic work of the solver; about as many seconds."""
TIERS: tuple[Tier, ...] = ("hbm", "ram", "disk")
Unit = tuple[str, int, int]
"""What an item is: kind, layer, and the expert or -1."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Moves with the solver's placement, and what is proved of the copies that it leaves: ``bound``
    seconds a step that no placement beats."""

    moves: tuple[Move, ...]
    name: str
    bound: float
    units: tuple[Unit, ...]
    problem: TierProblem

    def certificate(self, layout: Layout) -> Certificate:
        """What is proved of a layout's placement, whether it is the solver's or not."""
        tiers = [_tier(layout, unit) for unit in self.units]
        objective = max(tier_placement.step_seconds(self.problem, tiers))
        best = objective <= self.bound * (1 + tier_placement.SAME)
        # A placement with smaller buffers may hold more than the problem gives it.
        bound = min(self.bound, objective)
        return Certificate(self.name, objective, bound, "optimal" if best else "feasible")


def _tier(layout: Layout, unit: Unit) -> int:
    """Where a layout has a unit, as a place in TIERS; experts without names in order."""
    kind, layer, expert = unit
    device = layout.device
    assert device is not None
    if kind == "experts":
        named = device.which[layer] or layout.ram_which[layer]
        if named:
            found = (expert in device.which[layer], expert in layout.ram_which[layer])
        else:
            hbm = device.experts[layer]
            found = (expert < hbm, expert < hbm + layout.experts_resident[layer])
    else:
        found = (device.dense[layer], layout.dense_resident[layer])
    return found.index(True) if any(found) else 2


def place(setting: GpuSetting, moves: Sequence[Move]) -> Placed | None:
    """The placement of weights of least copies in the worst trace, all else as in ``moves``; None
    where the solver found none that fits beside the rest."""
    graph = setting.graph
    layout = apply_moves(graph, moves)
    units, problem = _problem(setting, layout)
    solved = tier_placement.solve(problem, work=WORK)
    tiers = solved.value.tiers
    if tiers is None:
        return None
    kept = [m for m in moves if not (isinstance(m, Place) and m.unit in ("dense", "experts"))]
    named = bool(setting.workload.routing)
    made = (*kept, *_moves(graph, dict(zip(units, tiers, strict=True)), named))
    used = tier_bytes(apply_moves(graph, made), setting.gpus)
    limits = {"hbm": setting.hbm, "ram": setting.ram}
    if any(sum(used[tier].values()) > limit for tier, limit in limits.items()):
        return None
    traces = len(setting.workload.routing)
    plural = "" if traces == 1 else "s"
    over = f"the worst of {traces} trace{plural}" if traces else "uniform routing"
    name = f"placement: copies of a step, {over}"
    return Placed(made, name, solved.bound or 0.0, tuple(units), problem)


def _problem(setting: GpuSetting, layout: Layout) -> tuple[list[Unit], TierProblem]:
    graph, machine, gpus = setting.graph, setting.machine, setting.gpus
    gpu, device, sizes = machine.accelerator, layout.device, unit_sizes(setting.graph)
    assert gpu is not None and device is not None
    scenarios = [ExpertLoads((r,)) for r in setting.workload.routing] or [ExpertLoads()]
    # Only experts that are chosen in a step are fetched where that waits for the router.
    on_demand = device.by_load
    tokens = layout.dispatch.seqs
    always = (1.0,) * len(scenarios)
    items: list[Item] = []
    units: list[Unit] = []

    def add(unit: Unit, size: int, value: tuple[float, ...]) -> None:
        if size:
            units.append(unit)
            items.append(Item(f"{unit[0]} {unit[1]} {unit[2]}", size, value))

    # Every GPU has dense weights of its own, of experts only its share.
    for layer in setting.layers:
        add(("dense", layer, -1), sizes.dense[layer] * gpus, always)
        experts = experts_of(graph, layer)
        if experts is None:
            continue
        hits = [s.hit(layer, experts, tokens) for s in scenarios]
        for expert in range(experts.count):
            value = tuple(float(hit[expert]) for hit in hits) if on_demand else always
            add(("experts", layer, expert), sizes.expert[layer], value)
    used = tier_bytes(layout, gpus)
    rest = {tier: sum(parts.values()) - parts["resident"] for tier, parts in used.items()}
    rest["hbm"] += _more_rings(layout) + device.embed * sizes.embed + device.head * sizes.head
    rest["ram"] += (not device.embed) * sizes.embed + (not device.head) * sizes.head
    # A layer's experts are dealt out to the GPUs, so each may hold one more than its share.
    rounding = max(sizes.expert, default=0) * len(setting.layers) * (gpus - 1)
    link = 1 / (gpus * gpu.h2d.peak)
    problem = TierProblem(
        tuple(items),
        (
            max(0, (setting.hbm - rest["hbm"]) * gpus - rounding),
            max(0, setting.ram - rest["ram"] - _staging(layout, used["ram"]["staging"])),
            None,
        ),
        (0.0, link, link + 1 / machine.disk.peak),
    )
    return units, problem


def _more_rings(layout: Layout) -> int:
    """Bytes of buffers for what is in hbm now and may not be after."""
    device, sizes = layout.device, unit_sizes(layout.graph)
    assert device is not None
    more = 0
    if all(device.dense) and sizes.dense:
        more += layout.prefetch["dense"].slots * max(sizes.dense)
    complete = zip(device.experts, sizes.experts, strict=True)
    if sizes.expert and all(here == count for here, count in complete):
        more += layout.prefetch["experts"].slots * layout.chunk * max(sizes.expert)
    return more


def _staging(layout: Layout, now: int) -> int:
    """Bytes of ram for what may come from disk after, and does not now."""
    sizes = unit_sizes(layout.graph)
    experts = (layout.chunk * size for size in sizes.expert_read)
    largest = max([*sizes.dense_read, *experts], default=0)
    return max(0, 2 * largest - now)


def _moves(graph: TaskGraph, tiers: dict[Unit, int], named: bool) -> Iterator[Move]:
    """Place moves for what is in hbm or ram; experts by name where a trace says which matter."""
    layers = range(len(graph.layers))
    for tier in ("hbm", "ram"):
        found = tuple(i for i in layers if TIERS[tiers.get(("dense", i, -1), 2)] == tier)
        if found:
            yield Place("dense", "hbm" if tier == "hbm" else "ram", found)
    alike: dict[tuple[Tier, int], list[int]] = {}
    for layer in layers:
        for tier in TIERS[:2]:
            which = tuple(
                expert
                for (kind, at, expert), k in tiers.items()
                if kind == "experts" and at == layer and TIERS[k] == tier
            )
            if which and named:
                yield Place("experts", tier, (layer,), len(which), which)
            elif which:
                alike.setdefault((tier, len(which)), []).append(layer)
    for (tier, count), some in alike.items():
        yield Place("experts", tier, tuple(some), count)
