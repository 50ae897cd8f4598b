"""Expert loads: `routing, layer, tokens -> how many tokens each expert gets in a step`.

Without a trace every expert is as likely as the others. With traces a layer's shares are the mean
of theirs; experts that no placement names have those of a mean layer. In both cases tokens choose
on their own, so the tokens of an expert are multinomial: ``draws`` are such steps, the same ones
each time they are asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dovetail.ir.task_graph import Experts
from dovetail.ir.workload import Routing

Floats = NDArray[np.float64]
BUCKETS = 12
"""Groups of experts of like load that stand for all of a layer's."""
DRAWS = 6
"""Steps that stand for all in what depends on the greatest load."""


@dataclass(frozen=True, slots=True)
class Load:
    """``count`` experts that get tokens in a step, ``rows`` each on average."""

    count: float
    rows: float


ANY = -1
"""Instead of a layer's number: the mean of all layers, for experts that nothing names."""


class ExpertLoads:
    """How a workload's tokens are spread over experts."""

    def __init__(self, routing: Sequence[Routing] = ()) -> None:
        self._routing = tuple(routing)
        self._shares: dict[int, Floats] = {}
        self._known: dict[tuple[object, ...], tuple[Load, ...]] = {}

    @property
    def traced(self) -> bool:
        """Whether there is a trace."""
        return bool(self._routing)

    def shares(self, layer: int, experts: Experts) -> Floats:
        """Share of a layer's choices that each expert gets, ``[experts]``, adding up to 1; of ANY
        layer in an order of no meaning."""
        if not self._routing:
            return np.full(experts.count, 1 / experts.count)
        if layer not in self._shares:
            self._shares[layer] = self._any(experts) if layer == ANY else self._mean(layer)
        return self._shares[layer]

    def _mean(self, layer: int) -> Floats:
        loads = [np.array(r.loads[layer], dtype=np.float64) for r in self._routing]
        mean: Floats = np.mean([load / load.sum() for load in loads], axis=0)
        return mean

    def _any(self, experts: Experts) -> Floats:
        layers = [i for i, load in enumerate(self._routing[0].loads) if len(load) == experts.count]
        profile: Floats = np.mean([np.sort(self._mean(layer)) for layer in layers], axis=0)
        order = np.random.default_rng(0).permutation(len(profile))
        return profile[order]

    def hit(self, layer: int, experts: Experts, tokens: float) -> Floats:
        """Share of the steps of ``tokens`` tokens in which each expert gets any, ``[experts]``."""
        chosen = np.minimum(1.0, self.shares(layer, experts) * experts.top_k)
        found: Floats = 1 - (1 - chosen) ** tokens
        return found

    def of(
        self, layer: int, experts: Experts, which: Sequence[int] | None, tokens: float
    ) -> tuple[Load, ...]:
        """The loads of these experts of a layer, or of all, when ``tokens`` tokens choose; experts
        of like load are one entry. The counts are those of experts that get any."""
        if not self._routing:
            hit = 1 - (1 - experts.top_k / experts.count) ** tokens
            if not hit:
                return ()
            count = experts.count if which is None else len(which)
            return (Load(count * hit, tokens * experts.top_k / (experts.count * hit)),)
        key = (layer, None if which is None else tuple(which), tokens)
        if key not in self._known:
            shares = self.shares(layer, experts)
            if which is not None:
                shares = shares[list(which)]
            self._known[key] = tuple(_loads(np.sort(shares), experts.top_k, tokens))
        return self._known[key]

    def draws(self, layer: int, experts: Experts, tokens: int) -> NDArray[np.int64]:
        """Tokens of every expert in ``DRAWS`` steps, ``[draws, experts]``."""
        generator = np.random.default_rng((layer + 1, tokens))
        shares = self.shares(layer, experts)
        return generator.multinomial(tokens * experts.top_k, shares / shares.sum(), size=DRAWS)


def _loads(shares: Floats, top_k: int, tokens: float) -> list[Load]:
    chosen = np.minimum(1.0, shares * top_k)
    hit = 1 - (1 - chosen) ** tokens
    found = []
    for some, hits in zip(
        np.array_split(chosen, BUCKETS), np.array_split(hit, BUCKETS), strict=True
    ):
        count = float(hits.sum())
        if count > 1e-9:
            found.append(Load(count, max(1.0, tokens * float(some.sum()) / count)))
    return found
