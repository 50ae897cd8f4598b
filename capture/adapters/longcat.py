"""LongCat has experts that hand a token back as it is."""

from typing import Any

import torch
from torch import Tensor, nn

from dovetail.capture.forms import ExpertsForm, set_form


def experts(module: nn.Module) -> None:
    """Route ``LongcatFlashExperts`` through the experts operator; a token's identity experts add
    the token with the sum of their weights, and count as expert 0 with weight 0."""
    own: Any = module
    count = own.num_routed_experts

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        same = top_k_index >= count
        index = top_k_index.masked_fill(same, 0)
        weight = top_k_weights.masked_fill(same, 0.0)
        y = torch.ops.dovetail.experts(hidden_states, index, weight, own._dovetail_fqn)
        kept = (top_k_weights - weight).sum(-1, keepdim=True)
        out: Tensor = y + (hidden_states * kept).to(hidden_states.dtype)
        return out

    def activation(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        out: Tensor = own.act_fn(gate) * up
        return out

    module.forward = forward
    tensors = {
        "gate_up": ("gate_up_proj", tuple(own.gate_up_proj.shape[1:])),
        "down": ("down_proj", tuple(own.down_proj.shape[1:])),
    }
    set_form(module, ExpertsForm(count, tensors, activation))
