"""The drift guard: a run that routes otherwise than its plan was made for says so.

How many rows an expert's product has decides which tiles are best and how evenly workers share a
layer, so a plan is tuned for a distribution of loads. The guard counts the tokens of every expert
while a run goes on and compares the busiest one's share with the plan's.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dovetail.ir.batching import Group
from dovetail.ir.placement import experts_of
from dovetail.ir.plan import Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.runtime.routing_sink import RoutingSink

DRIFT = 1.5
"""A skew this many times the plan's, or this small a part of it, is another distribution."""
EVERY = 32
"""Steps between two looks at the counts."""
ENOUGH = 64
"""Tokens per expert of a layer, on average, below which chance alone explains a skew."""


def expert_counts(graph: TaskGraph) -> dict[int, int]:
    """The number of experts of every layer that has some."""
    layers = range(len(graph.layers))
    return {i: e.count for i in layers if (e := experts_of(graph, i))}


class LoadCounter:
    """Counts the tokens of every expert, layer by layer (a routing sink)."""

    def __init__(self, experts: Mapping[int, int]) -> None:
        self._experts = experts
        self.counts: dict[int, Tensor] = {}

    def routed(self, step: int, layer: int, groups: Sequence[Group], experts: Tensor) -> None:
        """Add the choices of a layer's tokens."""
        counted = torch.bincount(experts.reshape(-1), minlength=self._experts[layer])
        before = self.counts.get(layer)
        self.counts[layer] = counted if before is None else before + counted

    @property
    def mean(self) -> float:
        """Tokens of an expert on average, in the layer that saw the fewest."""
        return min((float(c.float().mean()) for c in self.counts.values()), default=0.0)

    @property
    def skew(self) -> float:
        """The busiest expert's tokens over the mean, in the layer where that is largest."""
        found = [float(c.max() / c.float().mean()) for c in self.counts.values() if c.sum()]
        return max(found, default=0.0)


class Sinks:
    """Several routing sinks as one."""

    def __init__(self, sinks: Sequence[RoutingSink]) -> None:
        self._sinks = tuple(sinks)

    def routed(self, step: int, layer: int, groups: Sequence[Group], experts: Tensor) -> None:
        """Tell each."""
        for sink in self._sinks:
            sink.routed(step, layer, groups, experts)

    @property
    def or_none(self) -> RoutingSink | None:
        """The one sink there is, or all as one, or None where there is none to tell."""
        return self if len(self._sinks) > 1 else next(iter(self._sinks), None)


class RoutingGuard(LoadCounter):
    """Compares loads with those that a plan was tuned for, every EVERY steps, and says so once."""

    def __init__(self, experts: Mapping[int, int], planned: float) -> None:
        super().__init__(experts)
        self._planned = planned
        self._steps = 0
        self._said = False

    @classmethod
    def for_plan(cls, plan: Plan, graph: TaskGraph) -> "RoutingGuard | None":
        """The guard of a plan; None where the plan does not say how experts were loaded."""
        planned = plan.tuning.load_skew if plan.tuning is not None else 0.0
        return cls(expert_counts(graph), planned) if planned > 0 else None

    def warning(self, *, last: bool = False) -> str | None:
        """To be called after every step: one line if experts are loaded otherwise than when the
        plan was tuned; None if not, if it was said, or if nothing can be said yet."""
        self._steps += 1
        due = last or self._steps % EVERY == 0
        if self._said or not due or self.mean < ENOUGH:
            return None
        found, planned = self.skew, self._planned
        if planned / DRIFT <= found <= planned * DRIFT:
            return None
        self._said = True
        return (
            f"experts are loaded otherwise than the plan was tuned for: the busiest one has "
            f"{found:.2f} times the mean, {planned:.2f} then; tune again with prompts like these "
            "(`dovetail tune --workload PROMPTS.jsonl`)"
        )
