"""GPU prediction: `layout, machine, workload -> time and bytes`, from simulated loop bodies.

Sequences are taken longest first in waves of as many as are in flight (static batching), each wave
a few prefill steps and its decode steps; with refill, prefill is spread over the decode steps. The
time of a decode step is piecewise linear in the context, so a few contexts are simulated and the
rest is interpolated.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dovetail.ir.placement import head_weights
from dovetail.ir.plan import Prediction
from dovetail.ir.timeline import Timeline
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout
from dovetail.passes.gpu_cost import GpuCosts, Shape
from dovetail.passes.gpu_memory import tier_bytes
from dovetail.passes.loop_body import Loop, StepWork, loop_body
from dovetail.passes.loop_simulate import pace, timeline

CONTEXTS = 3
"""Context lengths at which a wave's decode steps are simulated."""


@dataclass(frozen=True, slots=True)
class Phase:
    """``steps`` steps that all do ``work``."""

    work: StepWork
    steps: float


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
        if self.layout.dispatch.refill:
            yield from self._mixed(workload)
            return
        for seqs, length, waves in _waves(workload, self.layout.dispatch.seqs):
            for phase in self._wave(seqs, length, workload.new_tokens, contexts):
                yield Phase(phase.work, phase.steps * waves)

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

    def _wave(self, seqs: int, length: int, new: int, contexts: int) -> Iterator[Phase]:
        in_step = max(1, min(seqs, self.layout.dispatch.prefill_tokens // length))
        yield Phase(StepWork(None, Shape(in_step, length, 0)), seqs / in_step)
        for context, steps in _contexts(length, new - 1, contexts):
            yield Phase(StepWork(Shape(seqs, 1, context), None), steps)

    def _mixed(self, workload: Workload) -> Iterator[Phase]:
        """Continuous batching: steps that also take prompts in, and steps that only decode."""
        new, prompts = workload.new_tokens, workload.prompts
        dispatch = self.layout.dispatch
        seqs = min(dispatch.seqs, prompts)
        length = max(1, round(workload.prompt_tokens / prompts))
        decodes = prompts * (new - 1)
        most = max(1, min(seqs, dispatch.prefill_tokens // length))
        groups = dispatch.layer_groups
        if decodes < groups * math.ceil(prompts / most):
            # Nothing decodes beside most prompts, so they need not wait for their layers.
            groups = 1
        # Prompts that pass the groups of layers together are admitted every ``groups`` steps.
        turns = max(1, math.ceil(decodes / seqs / groups), math.ceil(prompts / most))
        steps = turns * groups
        admitted = math.ceil(prompts / turns)
        taking_in = min(steps, prompts / admitted * groups)
        work = Shape(round(decodes / steps), 1, length + new // 2)
        decode = work if work.seqs else None
        prompt = Shape(admitted, length, 0)
        yield Phase(StepWork(decode, prompt, groups if decode else 1), taking_in)
        if steps > taking_in and decode:
            yield Phase(StepWork(decode, None), steps - taking_in)


def _contexts(length: int, steps: int, most: int) -> Iterator[tuple[int, float]]:
    """Contexts in the middle of equal parts of a generation, and the steps of each."""
    parts = min(most, steps)
    for i in range(parts):
        yield length + round(steps * (i + 0.5) / parts), steps / parts


def _waves(workload: Workload, seqs: int) -> Iterator[tuple[int, int, int]]:
    """(sequences, mean prompt length, how many such waves), longest prompts first."""
    open_seqs = open_tokens = 0
    for length, count in workload.lengths:
        taken = min(count, seqs - open_seqs) if open_seqs else 0
        open_seqs, open_tokens, left = (
            open_seqs + taken,
            open_tokens + taken * length,
            count - taken,
        )
        if open_seqs == seqs:
            yield seqs, round(open_tokens / seqs), 1
            open_seqs = open_tokens = 0
        if left >= seqs:
            yield seqs, length, left // seqs
        if left % seqs:
            open_seqs, open_tokens = left % seqs, left % seqs * length
    if open_seqs:
        yield open_seqs, round(open_tokens / open_seqs), 1


def _kinds_of_layers(layout: Layout) -> list[tuple[int, int]]:
    """(a layer, how many layers are like it)."""
    device = layout.device
    assert device is not None
    found: dict[tuple[object, ...], list[int]] = {}
    for layer in range(len(layout.graph.layers)):
        key = (
            layout.graph.layers[layer],
            device.dense[layer],
            device.experts[layer],
            layout.dense_resident[layer],
            layout.experts_resident[layer],
        )
        found.setdefault(key, []).append(layer)
    return [(layers[0], len(layers)) for layers in found.values()]
