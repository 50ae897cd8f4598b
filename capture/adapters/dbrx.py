"""DBRX keeps the experts of a layer in three tall matrices, the last one the other way round."""

from typing import Any

import torch
from torch import Tensor, nn

from dovetail.capture.forms import ExpertsForm, set_form


def experts(module: nn.Module) -> None:
    """Route ``DbrxExperts`` through the experts operator."""
    own: Any = module
    shape = (own.ffn_hidden_size, own.hidden_size)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, own.hidden_size)
        y = torch.ops.dovetail.experts(x, top_k_index, top_k_weights, own._dovetail_fqn)
        out: Tensor = y.view(hidden_states.shape[0], -1, own.hidden_size)
        return out

    def activation(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        out: Tensor = own.mlp.activation_fn(gate) * up
        return out

    module.forward = forward
    tensors = {"gate": ("mlp.w1", shape), "up": ("mlp.v1", shape), "down": ("mlp.w2", shape)}
    set_form(
        module, ExpertsForm(own.num_experts, tensors, activation, transposed=frozenset({"down"}))
    )
