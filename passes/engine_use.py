"""Engine use: `graph, plan -> how much of the time every engine works, and what it waits for`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dovetail.ir.batching import Step
from dovetail.ir.plan import Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.simulate import Simulator, workload_steps

SHAPES = 24
"""Kinds of steps that are simulated to see how busy the engines are."""


@dataclass(frozen=True, slots=True)
class EngineUse:
    """What an engine does over the whole workload, set-up left out: ``seconds`` in all, ``busy``
    of them working, and those that it waits by what for: ``ready`` and a ring, ``room`` and a ring,
    ``phase`` and a phase, as in ``ready:experts``."""

    engine: str
    seconds: float
    busy: float
    waits: Mapping[str, float]

    @property
    def share(self) -> float:
        """Share of the time in which it works."""
        return self.busy / self.seconds


def engine_use(graph: TaskGraph, plan: Plan) -> tuple[EngineUse, ...]:
    """How busy every engine is over the workload, from one simulated step of each shape. With a
    GPU it is not known what an engine waits for."""
    layout = apply_moves(graph, plan.moves)
    if layout.device is not None:
        return _gpu_use(layout, plan)
    simulator = Simulator(layout, plan.machine, Costs(plan.machine))
    total = 0.0
    busy: dict[str, float] = defaultdict(float)
    waits: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for steps in _shapes(list(workload_steps(layout, plan.workload))):
        step, count = steps[len(steps) // 2], len(steps)
        total += count * simulator.step_seconds(step)[0]
        working, waiting = simulator.use(step)
        for engine in simulator.program.engines:
            busy[engine] += count * working[engine]
            for what, seconds in waiting.get(engine, {}).items():
                waits[engine][what] += count * seconds
    return tuple(
        EngineUse(name, total, busy[name], dict(waits[name])) for name in simulator.program.engines
    )


def _gpu_use(layout: Layout, plan: Plan) -> tuple[EngineUse, ...]:
    costs = GpuCosts(plan.machine, layout.graph.dtype, plan.workload.routing)
    predictor = GpuPredictor(layout, costs)
    busy: dict[str, float] = defaultdict(float)
    for phase in predictor.phases(plan.workload):
        for layer, count in predictor.kinds:
            for engine, seconds in predictor.loop(phase.work, layer).loads().items():
                busy[engine] += phase.steps * count * seconds
    found = predictor.predict(plan.workload)
    seconds = found.seconds - found.setup_seconds
    return tuple(EngineUse(engine, seconds, busy[engine], {}) for engine in sorted(busy))


def _shapes(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps by shape, lengths rounded as much as it takes to have few shapes."""
    quantum = 64
    while True:
        shapes: dict[tuple[object, ...], list[Step]] = defaultdict(list)
        for step in steps:
            shapes[_shape(step, quantum)].append(step)
        if len(shapes) <= SHAPES or quantum > max(
            g.past + g.q_len for s in steps for g in s.groups
        ):
            return list(shapes.values())
        quantum *= 2


def _shape(step: Step, quantum: int) -> tuple[object, ...]:
    return tuple(
        sorted(
            (
                group.prefill,
                len(group.members),
                -(-group.q_len // quantum),
                -(-group.past // quantum),
            )
            for group in step.groups
        )
    )
