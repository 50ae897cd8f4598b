"""Llama 4 multiplies an expert's input by its routing weight, not its output, and warms attention
without positions up with the position."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.capture.forms import ExpertsForm, set_form
from dovetail.capture.positions import current_positions
from dovetail.ir.errors import CaptureError


def experts(module: nn.Module) -> None:
    """Route ``Llama4TextMoe`` through the experts operator: with one expert a token, the weighted
    input goes in and the weight there is one."""
    own: Any = module
    fqn = f"{own._dovetail_fqn}.experts"
    if own.top_k != 1:
        raise CaptureError(
            f"{own._dovetail_fqn} sends a token to {own.top_k} experts, each with its own weighted "
            "input; dovetail knows Llama 4 with one expert a token, as all its checkpoints have"
        )

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, own.hidden_dim)
        logits = F.linear(x, own.router.weight)
        value, index = torch.topk(logits, own.top_k, dim=1)
        weight = torch.sigmoid(value.float()).to(x.dtype)
        y = torch.ops.dovetail.experts(x * weight, index, torch.ones_like(weight), fqn)
        return own.shared_expert(x) + y, logits

    def activation(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        out: Tensor = up * own.experts.act_fn(gate)
        return out

    module.forward = forward
    count, hidden, wide = own.experts.gate_up_proj.shape
    tensors = {
        "gate_up": ("gate_up_proj", (hidden, wide)),
        "down": ("down_proj", tuple(own.experts.down_proj.shape[1:])),
    }
    set_form(
        own.experts,
        ExpertsForm(count, tensors, activation, transposed=frozenset({"gate_up", "down"})),
    )


def temperature(module: nn.Module) -> None:
    """Scale queries by their own positions; transformers takes them from the cache's length, which
    is not that of every sequence in a batch of ours."""
    own: Any = module
    if not own.attn_temperature_tuning or own.use_rope:
        return
    own.attn_temperature_tuning = False
    project = own.q_proj.forward

    def forward(hidden_states: Tensor) -> Tensor:
        positions = current_positions().float() + 1.0
        scale = torch.log1p(torch.floor(positions / own.floor_scale)) * own.attn_scale + 1.0
        q: Tensor = project(hidden_states)
        scaled: Tensor = (q * scale.unsqueeze(-1)).to(q.dtype)
        return scaled

    own.q_proj.forward = forward
