"""A region of routed experts in a traced graph, as one module in the place of its nodes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dovetail.doors.traced_experts import Matched, node_of, strip_casts
from dovetail.runtime.routed_experts import ExpertWeights, run_experts


def extracted(
    root: nn.Module, nodes: tuple[fx.Node, ...], result: fx.Node, first: list[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """``nodes`` as a graph of its own, called with ``first`` and then with the returned nodes."""
    inner, places = fx.Graph(), {}
    outside = {source for node in nodes for source in node.all_input_nodes} - {*nodes, *first}
    others = [node for node in result.graph.nodes if node in outside]
    for node in (*first, *others):
        places[node] = inner.placeholder(node.name)
    for node in nodes:
        places[node] = inner.node_copy(node, places.__getitem__)
    inner.output(places[result])
    return fx.GraphModule(root, inner), others


class ExpertsRegion(nn.Module):
    """A region as a module: called with ``x, ids, shares, up, down, up_bias, down_bias`` and what
    else its nodes read.

    ``decide(kind, tokens, own, ours)`` says which of the two ways is to be used.
    """

    def __init__(
        self,
        own: fx.GraphModule,
        activation: fx.GraphModule,
        counts: tuple[int, int],
        top_k: int,
        decide: Callable[..., bool],
    ) -> None:
        super().__init__()
        self.own, self.activation = own, activation
        self._counts, self._top_k, self._decide = counts, top_k, decide

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        shares: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        *others: Any,
    ) -> Tensor:
        """``x [tokens, hidden]``, ``ids``, ``shares [tokens * top_k]`` -> ``[tokens, hidden]``."""
        own_others = others[: self._counts[0]]
        act_others = others[self._counts[0] :]

        def as_it_is() -> Tensor:
            out: Tensor = self.own(x, ids, shares, *own_others)
            return out

        def scheduled() -> Tensor:
            tokens = (-1, self._top_k)
            return run_experts(
                x.to(up.dtype),
                ids.view(tokens),
                shares.view(tokens),
                ExpertWeights(up, down, up_bias, down_bias, transposed=True),
                lambda h: self.activation(h, *act_others),
            )

        if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
            return as_it_is()
        ours = self._decide((up, down), x.numel() // x.shape[-1], as_it_is, scheduled)
        return scheduled() if ours else as_it_is()


def replace_region(gm: fx.GraphModule, matched: Matched, decide: Callable[..., bool]) -> None:
    """Put one ``ExpertsRegion`` in the place of the region's nodes."""
    first = [matched.x, matched.ids, matched.shares]
    own, own_others = extracted(gm, matched.nodes, matched.result, first)
    read = strip_casts(node_of(matched.down.args[0]))
    activation, act_others = extracted(gm, matched.activation, read, [matched.up])
    counts = (len(own_others), len(act_others))
    region = ExpertsRegion(own, activation, counts, matched.top_k, decide)
    name = f"experts_{matched.result.name}"
    gm.add_submodule(name, region)
    biases = (matched.up_bias, matched.down_bias)
    weights = (matched.up_weight, matched.down_weight, *biases)
    with gm.graph.inserting_after(matched.result):
        called = gm.graph.call_module(name, (*first, *weights, *own_others, *act_others))
    called.meta = dict(matched.result.meta)
    matched.result.replace_all_uses_with(called)
    for node in reversed(matched.nodes):
        gm.graph.erase_node(node)
