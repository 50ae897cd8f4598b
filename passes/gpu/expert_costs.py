"""Expert costs: `loads of experts -> seconds on one GPU and on the CPU`.

An expert takes the longer of its arithmetic and its memory traffic. Tokens choose experts on their
own, so what an expert gets varies from step to step: means are taken over three loads, and what
depends on the greatest load over whole drawn steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.ir.errors import PlanError
from dovetail.ir.machine import Accelerator, Curve, Machine
from dovetail.ir.task_graph import ITEMSIZE, Experts
from dovetail.ir.workload import Routing
from dovetail.passes.cost import Costs, Workers
from dovetail.passes.expert_loads import ExpertLoads, Load
from dovetail.solvers import expert_assignment

Floats = NDArray[np.float64]
EXPERT_KERNELS = 3
"""Launches of a chunk of experts: two grouped products and what joins them."""


@dataclass(frozen=True, slots=True)
class Deal:
    """A step's experts by where they run, on average: seconds of those that hbm holds, how many are
    copied and their seconds, and seconds and tokens of the CPU's."""

    held: float
    copies: float
    copied: float
    host: float
    host_rows: float


class GpuExpertCosts:
    """Seconds of routed experts on a machine's GPU and CPU; ``loads`` is how tokens choose."""

    def __init__(self, machine: Machine, dtype: str, routing: Sequence[Routing] = ()) -> None:
        if machine.accelerator is None:
            raise PlanError(
                f"machine {machine.name!r} has no accelerator, which this schedule needs; name a "
                "machine that has one, or plan for the cpu"
            )
        self.machine, self.gpu = machine, machine.accelerator
        self.loads = ExpertLoads(routing)
        self._dtype, self._item = dtype, ITEMSIZE[dtype]
        self._host = Costs(machine)
        self._workers = Workers(dtype, (256,), machine.workers)
        self._one: dict[tuple[int, str, float], float] = {}
        self._slowest: dict[tuple[object, ...], float] = {}
        self._deals: dict[tuple[object, ...], Deal] = {}
        self._traffics: dict[int, tuple[int, int, int]] = {}

    def expert_loads(self, experts: Experts, loads: Sequence[Load], tile: int) -> float:
        """Mean seconds of experts with these loads on one GPU, in products of ``tile`` rows at
        most: some experts get more, and reading the others' weights takes as long."""
        loads = [load for load in loads if load.rows > 0 and load.count > 0]
        if not loads:
            return 0.0
        seconds, launches = 0.0, 0.0
        for load in loads:
            pieces = max(1.0, load.rows / tile)
            rows = load.rows / pieces
            spread = math.sqrt(rows)
            weights = {rows - spread: 0.25, rows: 0.5, rows + spread: 0.25}
            one = sum(w * self._expert(experts, max(1.0, n)) for n, w in weights.items())
            seconds += pieces * load.count * one
            launches = max(launches, pieces)
        return seconds + launches * EXPERT_KERNELS * self.gpu.op_seconds

    def _expert(self, experts: Experts, rows: float) -> float:
        flops, nbytes, more = self._traffic(experts)
        return max(
            rows * flops / self.gemm.at(rows), (nbytes + rows * more) / self.gpu.hbm_bandwidth
        )

    def _traffic(self, experts: Experts) -> tuple[int, int, int]:
        """FLOPs of a token in one expert, the expert's bytes, and bytes that a token moves."""
        key = id(experts)
        if key not in self._traffics:
            more = (2 * experts.hidden + 4 * experts.intermediate) * self._item
            self._traffics[key] = 2 * experts.parameters, experts.nbytes, more
        return self._traffics[key]

    def _each(self, experts: Experts, rows: Floats) -> Floats:
        """Seconds of one expert with each of these numbers of tokens; 0 for none."""
        curve = self.gemm
        rates = np.interp(np.log2(np.maximum(rows, curve.x[0])), np.log2(curve.x), curve.y)
        flops, nbytes, more = self._traffic(experts)
        seconds: Floats = np.maximum(
            rows * flops / rates, (nbytes + rows * more) / self.gpu.hbm_bandwidth
        )
        return np.where(rows > 0, seconds, 0.0)

    def host_experts(self, experts: Experts, count: float, rows: float) -> float:
        """Seconds of ``count`` experts over ``rows`` tokens each on all of the CPU's workers."""
        if rows <= 0 or count <= 0:
            return 0.0
        key = (id(experts), "host", rows)
        if key not in self._one:
            self._one[key] = self._host.expert_seconds(experts, self._workers, rows, 1 << 30)
        return count * self._one[key] / self._host_speedup

    def host_loads(self, experts: Experts, loads: Sequence[Load]) -> float:
        """Seconds of experts with these loads on all of the CPU's workers."""
        return sum(self.host_experts(experts, load.count, load.rows) for load in loads)

    def imbalance(self, layer: int, experts: Experts, tokens: float) -> float:
        """How much longer the GPU with the most to do takes than all do on average, with a layer's
        experts dealt out in turn: the mean of drawn steps."""
        gpus, n = self.gpu.count, round(tokens)
        if gpus < 2 or n < 1:
            return 1.0
        key = (layer, id(experts), n)
        if key not in self._slowest:
            seconds = self._each(experts, self.loads.draws(layer, experts, n).astype(np.float64))
            shares = np.stack([seconds[:, g::gpus].sum(axis=1) for g in range(gpus)])
            self._slowest[key] = float((shares.max(axis=0) / shares.mean(axis=0)).mean())
        return self._slowest[key]

    def dealt(
        self, layer: int, experts: Experts, held: Sequence[int], tokens: int, most: int
    ) -> Deal:
        """How experts are dealt to CPU and GPU in a step, as HybriMoE does (arXiv 2504.05897), when
        hbm holds ``held`` and the CPU may take ``most``; the mean of drawn steps."""
        key = (layer, id(experts), tuple(held), tokens, most)
        if key not in self._deals:
            draws = self.loads.draws(layer, experts, tokens)
            parts = [self._deal(experts, draw, frozenset(held), most) for draw in draws]
            # A token chooses no expert twice, so more experts are hit than when it may.
            hit = sum(load.count for load in self.loads.of(layer, experts, None, tokens))
            mean = np.mean(parts, axis=0) * max(1.0, hit / float((draws > 0).sum(axis=1).mean()))
            self._deals[key] = Deal(*(float(v) for v in mean))
        return self._deals[key]

    def _deal(
        self, experts: Experts, draw: NDArray[np.int64], held: frozenset[int], most: int
    ) -> tuple[float, float, float, float, float]:
        gpus = self.gpu.count
        hit = [e for e, n in enumerate(draw.tolist()) if n]
        on_gpu = (self._each(experts, draw[hit].astype(np.float64)) / gpus).tolist()
        on_cpu = [self.host_experts(experts, 1.0, float(draw[e])) for e in hit]
        one = experts.nbytes / self.gpu.h2d.at(experts.nbytes) / gpus
        copies = tuple(0.0 if e in held else one for e in hit)
        problem = expert_assignment.AssignProblem(tuple(on_cpu), tuple(on_gpu), copies)
        sides, _ = expert_assignment.by_load(problem)
        chosen = [i for i, here in enumerate(sides) if here]
        # Beyond what the CPU may take, the experts with the most tokens are copied after all.
        chosen = sorted(chosen, key=lambda i: (int(draw[hit[i]]), i))[:most]
        host = frozenset(chosen)
        launches = EXPERT_KERNELS * self.gpu.op_seconds
        there = [i for i, copy in enumerate(copies) if not copy]
        moved = [i for i, copy in enumerate(copies) if copy and i not in host]
        return (
            sum(on_gpu[i] for i in there) + launches * bool(there),
            float(len(moved)),
            sum(on_gpu[i] for i in moved) + launches * bool(moved),
            sum(on_cpu[i] for i in host),
            float(sum(int(draw[hit[i]]) for i in host)),
        )

    def all_to_all(self, experts: Experts, tokens: float) -> float:
        """Seconds of sending ``tokens`` of one GPU to their experts' GPUs and back."""
        others = self.gpu.count - 1
        if not others or not self.gpu.peer_bandwidth:
            return 0.0
        nbytes = 2 * tokens * experts.top_k * experts.hidden * self._item * others / self.gpu.count
        return nbytes / self.gpu.peer_bandwidth + 2 * self.gpu.op_seconds

    @property
    def gemm(self) -> Curve:
        """The GPU's matrix products in the model's type."""
        return curve_of(self.gpu, "gemm", self._dtype)

    @property
    def _host_speedup(self) -> float:
        machine = self.machine
        return machine.workers * (machine.keeps("cpu", "cpu") if machine.workers > 1 else 1.0)


def curve_of(gpu: Accelerator, name: str, dtype: str) -> Curve:
    """An accelerator's curve ``gemm`` or ``attention`` for a type. Raises PlanError without one."""
    curves = gpu.gemm if name == "gemm" else gpu.attention
    if dtype not in curves:
        raise PlanError(
            f"accelerator {gpu.name!r} has no {name} curve for {dtype}, found "
            f"{', '.join(curves) or 'none'}; add one to the machine file"
        )
    return curves[dtype]
