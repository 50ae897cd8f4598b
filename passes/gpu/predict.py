"""GPU prediction: `layout, machine, workload -> time and bytes`, from simulated loop bodies.

The time of a decode step is piecewise linear in the context, so a few contexts are simulated and
the rest is interpolated (phases.py).
"""

import math
from collections.abc import Iterator, Mapping

from dovetail.ir.placement import head_weights
from dovetail.ir.plan import Prediction
from dovetail.ir.timeline import Timeline
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout
from dovetail.passes.gpu.cost import GpuCosts, Shape
from dovetail.passes.gpu.memory import tier_bytes
from dovetail.passes.gpu.phases import CONTEXTS, Phase, phases
from dovetail.passes.loop.body import Loop, StepWork, loop_body
from dovetail.passes.loop.simulate import pace, timeline


class GpuPredictor:
    """Predicts a layout on a machine with a GPU."""

    def __init__(self, layout: Layout, costs: GpuCosts) -> None:
        assert layout.device is not None
        self.layout, self.costs = layout, costs
        self._known: dict[StepWork, tuple[float, dict[str, float], dict[str, float]]] = {}
        self.kinds = _kinds_of_layers(layout)

    def estimate(self, workload: Workload) -> float:
        """Seconds for the workload, decode simulated at one context only."""
        return sum(phase.steps * self.step(phase.work)[0] for phase in self.phases(workload, 1))

    def predict(self, workload: Workload) -> Prediction:
        """Time and bytes of the workload, every sequence at its full length."""
        seconds = setup = self._setup_bytes() / self.costs.machine.disk.peak
        steps = 0.0
        classes: dict[str, float] = {}
        moved: dict[str, float] = {}
        for phase in self.phases(workload):
            one, parts, nbytes = self.step(phase.work)
            seconds += phase.steps * one
            steps += phase.steps
            for name, value in parts.items():
                classes[name] = classes.get(name, 0.0) + phase.steps * value
            for engine, value in nbytes.items():
                moved[engine] = moved.get(engine, 0.0) + phase.steps * value
        tiers = tier_bytes(self.layout, self.costs.gpu.count)
        ram = tiers.pop("ram")
        return Prediction(
            seconds=seconds,
            setup_seconds=setup,
            steps=math.ceil(steps),
            tokens=workload.prompts * workload.new_tokens,
            disk_bytes=round(moved.get("disk", 0.0)) + self._setup_bytes(),
            bytes=ram | {"process": self.costs.machine.process_bytes},
            classes=classes,
            tiers=tiers,
            link_bytes={name: round(n) for name, n in moved.items() if name != "disk"},
        )

    def phases(self, workload: Workload, contexts: int = CONTEXTS) -> Iterator[Phase]:
        """The steps of the workload, equal ones together."""
        known: dict[StepWork, float] = {}
        for phase in phases(self.layout.dispatch, workload, contexts):
            if phase.steps > 0:
                known[phase.work] = known.get(phase.work, 0.0) + phase.steps
        yield from (Phase(work, steps) for work, steps in known.items())

    def longest(self, workload: Workload) -> dict[StepWork, float]:
        """Of each kind of step that which takes longest in all, with its seconds, in a run's
        order."""
        found: dict[str, tuple[float, StepWork]] = {}
        for phase in self.phases(workload):
            seconds = phase.steps * self.step(phase.work)[0]
            if seconds > found.get(phase.work.kind, (0.0, phase.work))[0]:
                found[phase.work.kind] = (seconds, phase.work)
        return {work: seconds for seconds, work in found.values()}

    def step(self, work: StepWork) -> tuple[float, dict[str, float], dict[str, float]]:
        """Seconds of a step, its busy seconds by task class, and the bytes of every link."""
        if work not in self._known and work.layer_groups > 1:
            self._known[work] = self._layered(work)
        if work not in self._known:
            total, ramp = self._ends(work), 0.0
            classes: dict[str, float] = {}
            moved: dict[str, float] = {}
            for layer, count in self.kinds:
                loop = self.loop(work, layer)
                found = pace(loop)
                total += count * found.period
                ramp = max(ramp, found.ramp)
                for op in loop.problem.ops:
                    name = loop.classes[op.name]
                    classes[name] = classes.get(name, 0.0) + count * op.duration * 1e-6
                for engine, nbytes in loop.nbytes.items():
                    moved[engine] = moved.get(engine, 0.0) + count * nbytes
            self._known[work] = (total + ramp, classes, moved)
        return self._known[work]

    def _layered(self, work: StepWork) -> tuple[float, dict[str, float], dict[str, float]]:
        """``step`` where one group of layers takes prompts in and the others only decode."""
        mixed, decode = (self.step(StepWork(work.decode, p)) for p in (work.prefill, None))
        share = 1 / work.layer_groups

        def blend(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
            names = dict.fromkeys([*one, *other])
            return {n: share * one.get(n, 0.0) + (1 - share) * other.get(n, 0.0) for n in names}

        seconds = share * mixed[0] + (1 - share) * decode[0]
        return seconds, blend(mixed[1], decode[1]), blend(mixed[2], decode[2])

    def loop(self, work: StepWork, layer: int) -> Loop:
        """The loop body of a layer."""
        return loop_body(self.layout, self.costs, work, layer)

    def loops(self, workload: Workload) -> Iterator[Loop]:
        """The loop body of every kind of step and layer."""
        for phase in self.phases(workload):
            for layer, _ in self.kinds:
                yield self.loop(phase.work, layer)

    def steady(self, workload: Workload, layers: int = 4) -> Timeline:
        """A few layers of the step that takes most of the workload's time."""
        phase = max(self.phases(workload), key=lambda p: p.steps * self.step(p.work)[0])
        layer = max(self.kinds, key=lambda kind: kind[1])[0]
        return timeline(self.loop(phase.work, layer), layers)

    def _ends(self, work: StepWork) -> float:
        """Seconds before the first and after the last layer."""
        layout, costs = self.layout, self.costs
        graph, device = layout.graph, layout.device
        assert device is not None
        shape = Shape(max(1, math.ceil(work.seqs / costs.gpu.count)), 1, 0)
        parts = costs.group(graph.epilogue, shape)
        seconds = parts.before + parts.after + parts.tail
        if not device.head:
            nbytes = sum(w.nbytes for w in head_weights(graph))
            seconds += nbytes / costs.gpu.h2d.peak
        return seconds

    def _setup_bytes(self) -> int:
        """What is read before the first step: the weights that ram and hbm hold."""
        tiers = tier_bytes(self.layout, self.costs.gpu.count)
        resident = tiers["ram"]["resident"] + tiers["hbm"]["resident"] * self.costs.gpu.count
        return min(self.layout.graph.weight_bytes, resident)


def _kinds_of_layers(layout: Layout) -> list[tuple[int, int]]:
    """(a layer, how many layers are like it)."""
    return [(layers[0], len(layers)) for layers in alike_layers(layout)]


def alike_layers(layout: Layout) -> list[list[int]]:
    """The layers, those that are placed alike together."""
    device = layout.device
    assert device is not None
    found: dict[tuple[object, ...], list[int]] = {}
    for layer in range(len(layout.graph.layers)):
        key = (
            layout.graph.layers[layer],
            device.dense[layer],
            device.experts[layer],
            # Experts that a placement names have the loads of their own layer.
            layer if device.which[layer] or layout.ram_which[layer] else -1,
            layout.dense_resident[layer],
            layout.experts_resident[layer],
        )
        found.setdefault(key, []).append(layer)
    return list(found.values())
