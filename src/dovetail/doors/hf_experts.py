"""dovetail's experts in transformers: ``experts_implementation="dovetail"``."""

from typing import Any

import torch
from torch import Tensor, nn

from dovetail.runtime.routed_experts import ExpertWeights, run_experts, run_experts_traced


def weights_of(module: nn.Module) -> ExpertWeights:
    """The stacked weights of an experts module of transformers, as it names them."""
    own: Any = module
    part = "gate_up_proj" if own.has_gate else "up_proj"
    up_bias = getattr(own, f"{part}_bias") if own.has_bias else None
    down_bias = own.down_proj_bias if own.has_bias else None
    up, transposed = getattr(own, part), bool(own.is_transposed)
    return ExpertWeights(up, own.down_proj, up_bias, down_bias, transposed)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Routed experts as transformers calls them: ``[tokens, hidden]`` -> ``[tokens, hidden]``.

    On a processor every expert runs once over its tokens; under a tracer the same in operators
    that it can follow; on other devices transformers' grouped products, which are kernels there.
    """
    own: Any = module
    if hidden_states.device.type not in ("cpu", "meta"):
        from transformers.integrations.moe import grouped_mm_experts_forward

        out: Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return out
    activate = own._apply_gate if own.has_gate else own.act_fn
    finish = own.post_expert_norm if own.has_post_expert_norm else None
    run = run_experts_traced if _traced(hidden_states) else run_experts
    return run(hidden_states, top_k_index, top_k_weights, weights_of(module), activate, finish)


def _traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or x.device.type == "meta"
