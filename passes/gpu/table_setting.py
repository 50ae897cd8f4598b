"""GPU table setting: `setting -> what the tables of all batches share` (tables.py): limits, sizes,
and the records and units of the integer program.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property

from dovetail.ir.placement import experts_of
from dovetail.ir.task_graph import Experts
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.loads import LoopLoads
from dovetail.passes.gpu.memory import unit_sizes
from dovetail.passes.loop.work import TICK, StepWork
from dovetail.passes.policies.gpu import DEFAULTS, GpuSetting, buffers, ladders, moves

FINE, STEPS = 64, 16
"""Parts of a tick that rows tell apart, and parts of a step that weights of spans do."""
UNIT = TICK / FINE / STEPS
"""Seconds of one unit of the objective."""
KIB = 1024
"""Bytes are counted in KiB, rounded down."""
PLACES, OUTSIDE, ON_DISK, UNUSED = "expert places", "outside hbm", "on disk", "ram unused"
GROUPS = "rows of groups"
"""Limits that are not memory: what the CPU computes is not in hbm too; without buffers nothing is
outside hbm; nothing stays on disk unless ram is full, as policies fill it; and experts that run
group by group do so over the groups that attention has."""
EXPERT_ROWS = (int(DEFAULTS["expert_rows"]), 2048)
"""Rows of an expert's product that schedules may have: fewer take less memory and more launches,
so the program counts the memory of the fewest and the launches of the most."""
STAGED = 2
"""Loads that are read from disk and not yet copied, at most."""
FILLING = {True: 5, False: 65}
"""Experts that policies may leave room for in ram that is full, with small loads and with large."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A batch: sequences in flight, prompt tokens a step, and whether finished ones are
    replaced."""

    seqs: int
    prefill: int
    refill: bool


@dataclass(frozen=True, slots=True)
class ExpertWay:
    """The CPU's percent of the experts, experts in a load, and loads that have a buffer: none where
    all experts are in hbm. All groups' tokens run together, or else group by group of at most
    ``rows`` sequences, with buffers for two whole layers."""

    cpu: int
    chunk: int
    slots: int
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Body:
    """Layers of one kind: one of them, how many there are, and their experts."""

    layer: int
    count: int
    experts: Experts | None


class Setting:
    """What the tables of all batches share."""

    def __init__(self, setting: GpuSetting, costs: GpuCosts) -> None:
        self.setting, self.costs = setting, costs
        made = moves(replace(setting, hbm=1 << 62, ram=1 << 62), {**DEFAULTS, "seqs": 1})
        assert made is not None
        self.layout = apply_moves(setting.graph, made)
        self.sizes = unit_sizes(setting.graph)
        self.steps = ladders(setting)
        self.loads = LoopLoads(self.layout, costs)
        self.rows: dict[tuple[StepWork, int], dict[Hashable, tuple[int, ...]]] = {}

    @property
    def capacities(self) -> dict[str, int]:
        """The limits of all batches."""
        setting, experts = self.setting, self.experts
        memory = {"hbm": setting.hbm // KIB + 1, "ram": setting.ram // KIB + 1}
        limits = {PLACES: experts, OUTSIDE: experts, ON_DISK: experts}
        limits[GROUPS] = int(self.steps["rows"][-1])
        return memory | limits | {UNUSED: -setting.ram // KIB}

    @cached_property
    def experts(self) -> int:
        """Experts of all layers together."""
        return sum(self.sizes.experts)

    @cached_property
    def layered(self) -> tuple[int, int]:
        """Experts in a load, and buffers, of schedules that keep two whole layers."""
        return buffers(self.setting, {**DEFAULTS, "layers": 2})

    @cached_property
    def always(self) -> int:
        """Bytes that every schedule reads before the first step: all but the experts."""
        sizes = self.sizes
        experts = sum(n * size for n, size in zip(sizes.experts, sizes.expert, strict=True))
        resident = sum(sizes.dense) + sizes.head + sizes.embed
        return min(resident, self.setting.graph.weight_bytes - experts)

    @cached_property
    def bodies(self) -> tuple[Body, ...]:
        """The kinds of layers."""
        graph = self.setting.graph
        first = {body: layer for layer, body in reversed(list(enumerate(graph.layers)))}
        return tuple(
            Body(layer, graph.layers.count(body), experts_of(graph, layer))
            for body, layer in first.items()
        )
