"""Routed experts of a GPU plan on the plan's kernels: `experts where they lie -> sums`."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dovetail.codegen.kernels.addresses import expert_addresses
from dovetail.codegen.kernels.experts_runner import ExpertsRunner
from dovetail.ir.plan import Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.kernels.planned import ladder_kernels
from dovetail.runtime.gpu_experts import ExpertFunction, Routing, TorchExperts
from dovetail.runtime.weight_store import Tensors


class KernelExperts:
    """Runs experts by the kernels of ``plan``, whose sources go to ``folder``, on steps of up to
    ``tokens`` tokens; bodies that the plan has none for (it says why) by torch, ``rows`` at a time.

    In Triton's interpreter it gives transformers' tokens; it has not run on a GPU.
    """

    def __init__(
        self, plan: Plan, graph: TaskGraph, tokens: int, rows: int, device: str, folder: Path
    ) -> None:
        self._graph, self._device = graph, device
        self._plain = TorchExperts(rows)
        self._runners: dict[str, ExpertsRunner] = {}
        self._begun: dict[str, Routing] = {}
        self.nbytes = 0
        for ladder in plan.ladders:
            kernels = ladder_kernels(plan, ladder)
            runner = ExpertsRunner(ladder.layer, kernels, tokens, device, folder)
            self.nbytes += runner.nbytes
            self._runners |= dict.fromkeys(ladder.bodies, runner)

    def run(
        self,
        layer: int,
        function: ExpertFunction,
        experts: Sequence[int],
        weights: Sequence[Tensors],
        routing: Routing,
        x: Tensor,
        sums: Tensor,
    ) -> None:
        """As ``Experts.run``; the tokens are sorted once for all experts of a layer."""
        runner = self._runners.get(self._graph.body(layer).name)
        if runner is None:
            self._plain.run(layer, function, experts, weights, routing, x, sums)
            return
        if not experts:
            return
        rows = slice(routing.start, routing.start + len(routing.index))
        key = runner.layer.name
        if self._begun.get(key) is not routing:
            runner.begin(x[rows], routing.index, routing.weight)
            self._begun[key] = routing
        # An expert lies in one piece, which begins with its first tensor.
        first = [min(held.values(), key=lambda t: t.data_ptr()) for held in weights]
        there = dict(zip(experts, first, strict=True))
        runner.run(expert_addresses(there, routing.count, self._device), sums[rows])
