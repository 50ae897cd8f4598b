"""The bookkeeping of a loop body: its operations, what they hold, and what they are called."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from dovetail.ir.machine import Curve
from dovetail.passes.apply_moves import Layout
from dovetail.passes.device import Device
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.loop.work import TICK, Order, StepWork
from dovetail.solvers.loop_problem import Hold, LoopProblem, Op

After = tuple[str, int]
"""An operation and how many iterations earlier it ended."""


@dataclass(slots=True)
class Builder:
    """The loop body of layer ``layer`` in a step that does ``work``, as far as it is built.

    ``stages`` are the places of operations between the barriers of a layer, for schedules that have
    barriers; an operation without one has its engine's order alone. ``turns`` are the first
    operations of the GPU, where they are not in the order in which they were added. A ``fine`` body
    has every group and load by itself, as they run; others bundle them, as a solver wants them.
    """

    layout: Layout
    costs: GpuCosts
    work: StepWork
    layer: int
    fine: bool = False
    ops: list[Op] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    pools: dict[str, int] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    nbytes: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    chains: list[tuple[str, ...]] = field(default_factory=list)
    stages: dict[str, int] = field(default_factory=dict)
    turns: list[tuple[str, int]] = field(default_factory=list)

    @property
    def device(self) -> Device:
        """What lies in hbm and what the CPU computes."""
        assert self.layout.device is not None
        return self.layout.device

    @property
    def sent(self) -> float:
        """Share of what is copied to the GPU that is computed there; the rest is the CPU's."""
        return 1 - self.device.linears_cpu / 100

    def contend(self) -> None:
        """Slow the CPU by the share of the time in which copies read the same memory: what it
        computes is bound by that (link rates leave for the CPU what they do not take)."""
        machine, busy = self.costs.machine, dict.fromkeys(("cpu", "h2d"), 0)
        for op in self.ops:
            busy[op.engine] = busy.get(op.engine, 0) + op.duration
        if not busy["cpu"] or not busy["h2d"]:
            return
        keeps = machine.slowdown.get("cpu|h2d", self.costs.beside_copies)
        factor = 1 / (1 - (1 - keeps) * busy["h2d"] / max(busy.values()))
        self.ops = [
            replace(op, duration=round(op.duration * factor)) if op.engine == "cpu" else op
            for op in self.ops
        ]

    def problem(self) -> LoopProblem:
        """The loop problem of what was built."""
        return LoopProblem(tuple(self.ops), tuple(self.holds), dict(self.pools), tuple(self.chains))

    def op(
        self,
        name: str,
        engine: str,
        seconds: float,
        after: Sequence[After],
        kind: str,
        nbytes: float = 0.0,
    ) -> str:
        """Add an operation; ``kind`` is its class in a timeline. Returns its name."""
        self.ops.append(Op(name, engine, round(max(0.0, seconds) / TICK), tuple(after)))
        self.classes[name] = kind
        if nbytes:
            self.nbytes[engine] = self.nbytes.get(engine, 0.0) + nbytes
            self.sizes[name] = nbytes
        return name

    def copy(self, name: str, engine: str, nbytes: float, after: Sequence[After], kind: str) -> str:
        """Add a copy over a link."""
        curve: Curve = self.costs.gpu.h2d if engine == "h2d" else self.costs.gpu.d2h
        seconds = nbytes / curve.at(max(1.0, nbytes)) if nbytes else 0.0
        return self.op(name, engine, seconds, after, kind, nbytes)

    def read(self, name: str, nbytes: float, unit: str, after: Sequence[After] = ()) -> list[After]:
        """Read weights from disk into ram, if there are any; what has to be waited for."""
        if nbytes <= 0:
            return []
        rate = self.costs.machine.disk.at(min(self.layout.prefetch[unit].block, nbytes))
        op = self.op(f"read_{name}", "disk", nbytes / rate, after, f"load:{unit}", nbytes)
        return [(op, 0)]

    def bring(
        self, name: str, nbytes: float, missing: float, unit: str, after: Sequence[After] = ()
    ) -> str:
        """Copy weights to the GPU, ``missing`` bytes of them from disk through ram."""
        read = self.read(name, missing, unit, after)
        copy = self.copy(f"copy_{name}", "h2d", nbytes, read or after, f"copy:{unit}")
        if read:
            self.pools.setdefault("staging", 2)
            self.holds.append(Hold("staging", 1, f"read_{name}", ((copy, 0),)))
        return copy

    def after(self, name: str, more: Iterable[After]) -> None:
        """Make an operation wait for others too."""
        at = next(i for i, op in enumerate(self.ops) if op.name == name)
        op = self.ops[at]
        self.ops[at] = Op(op.name, op.engine, op.duration, (*op.after, *more))

    def hold(self, pool: str, first: str, last: Sequence[str], later: int = 0) -> None:
        """Hold one unit of a pool from one operation until others, ``later`` iterations on."""
        self.holds.append(Hold(pool, 1, first, tuple((name, later) for name in last)))

    def chain(self, names: Sequence[str]) -> None:
        """Let operations that are interchangeable run in the order given."""
        if len(names) > 1:
            self.chains.append(tuple(names))

    def order(self) -> Order:
        """Every engine's operations as the policy orders them, or as its pipeline moves say."""
        order: dict[str, list[tuple[str, int]]] = {}
        staged = sorted(self.ops, key=lambda op: self.stages.get(op.name, 0))
        for op in staged:
            order.setdefault(op.engine, []).append((op.name, 0))
        if self.turns:
            own = {name for name, _ in order["gpu0"]}
            turns = [item for item in self.turns if item[0] in own]
            named = {name for name, _ in turns}
            order["gpu0"] = [*turns, *(item for item in order["gpu0"] if item[0] not in named)]
        if self.layout.paged and "h2d" in order:
            order["h2d"] = _interleaved(order["h2d"])
        for move in self.layout.pipelines:
            if (move.work, move.layer) == (self.work.kind, self.layer):
                given = sorted(name for name, _ in order.get(move.engine, ()))
                # A workload of another size has other bundles: then the policy's order stands.
                if given == sorted(move.ops):
                    order[move.engine] = list(zip(move.ops, move.ahead, strict=True))
        return {engine: tuple(items) for engine, items in order.items()}


def _interleaved(items: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The next layer's weights in between this layer's other transfers (CGOPipe)."""
    pages = [(name, 1) for name, _ in items if name.startswith(("copy_dense", "copy_experts"))]
    others = [item for item in items if (item[0], 1) not in pages]
    merged: list[tuple[str, int]] = []
    if not others:
        return pages
    for i, item in enumerate(others):
        # A group's hidden states are waited for now, the page behind them in the next layer.
        merged.append(item)
        merged += pages[len(pages) * i // len(others) : len(pages) * (i + 1) // len(others)]
    return merged
