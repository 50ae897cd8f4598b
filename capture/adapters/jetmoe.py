"""JetMoE sorts tokens by expert with sizes that follow from the data, and adds one bias at the
end."""

from typing import Any

import torch
from torch import Tensor, nn

from dovetail.capture.forms import ExpertsForm, set_form


def experts(module: nn.Module) -> None:
    """Route ``JetMoeMoE`` through the experts operator."""
    own: Any = module

    def forward(layer_input: Tensor) -> Tensor:
        seqs, length, width = layer_input.shape
        x = layer_input.reshape(-1, width)
        value, index = own.router.layer(x).float().topk(own.router.top_k, dim=1)
        weight = torch.softmax(value, dim=1).type_as(x)
        y = torch.ops.dovetail.experts(x, index, weight, own._dovetail_fqn)
        out: Tensor = y.view(seqs, length, width) + own.bias
        return out

    def activation(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        out: Tensor = own.activation(gate) * up
        return out

    module.forward = forward
    up, down = own.input_linear.weight, own.output_linear.weight
    tensors = {
        "gate_up": ("input_linear.weight", tuple(up.shape[1:])),
        "down": ("output_linear.weight", tuple(down.shape[1:])),
    }
    set_form(module, ExpertsForm(up.shape[0], tensors, activation))


def gating(module: nn.Module) -> None:
    """Let ``JetMoeTopKGating`` give results of the right sizes where there is no data: it counts
    each expert's tokens, and any counts with the right sum will do."""
    own: Any = module

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
        logits = own.layer(hidden_states).float()
        value, index = logits.topk(own.top_k, dim=1)
        count = index.numel()
        order = index.flatten()
        sizes = [count] + [0] * (own.num_experts - 1)
        return order, order // own.top_k, value.type_as(hidden_states).flatten(), sizes, logits

    module.forward = forward
