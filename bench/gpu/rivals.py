"""Other ways to run a layer's experts, each a function of tokens, ids and weights; or why not."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dovetail.codegen.kernels.layer import LayerWeights
from dovetail.ir.kernel_layer import LayerSpec

Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, logits, ids, routing weights) to y; triton_kernels routes from the logits itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rival:
    """A way to run the experts, or the reason that it is left out."""

    name: str
    run: Experts | None
    skipped: str = ""
    graph: bool = True
    """Whether it can be captured in a CUDA graph: transformers says that its own cannot."""


def rivals(layer: LayerSpec, weights: LayerWeights) -> Iterator[Rival]:
    """Every rival for a layer with plain bfloat16 SwiGLU experts."""
    for name, make in (
        ("torch grouped_mm", _torch_grouped),
        ("transformers grouped_mm", _transformers),
        ("vLLM fused_experts", _vllm),
        ("triton_kernels matmul_ogs", _triton_kernels),
    ):
        try:
            yield Rival(name, make(layer, weights), graph=make is not _transformers)
        except (ImportError, AttributeError, TypeError) as error:
            yield Rival(name, None, f"{type(error).__name__}: {error}")


def grouped_mm() -> Callable[..., Tensor]:
    """torch's grouped matrix product, by whichever name this release has it."""
    functional: Any = torch.nn.functional
    found = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise AttributeError(f"torch {torch.__version__} has no grouped_mm")
    product: Callable[..., Tensor] = found
    return product


def _torch_grouped(layer: LayerSpec, weights: LayerWeights) -> Experts:
    """Sort, gather, product, activation, product, weighted sum: one torch call each."""
    product = grouped_mm()
    up, down = weights.up.transpose(1, 2), weights.down.transpose(1, 2)

    def run(x: Tensor, logits: Tensor, ids: Tensor, routed: Tensor) -> Tensor:
        flat, order = ids.reshape(-1).sort(stable=True)
        bins = torch.arange(layer.experts, device=x.device, dtype=flat.dtype)
        offsets = torch.searchsorted(flat, bins, right=True).int()
        gate, lift = product(x[order // layer.top_k], up, offs=offsets).chunk(2, dim=-1)
        rows = product(torch.nn.functional.silu(gate) * lift, down, offs=offsets)
        rows = rows * routed.reshape(-1, 1)[order].to(rows.dtype)
        slots = torch.empty_like(rows).index_copy_(0, order, rows)
        return slots.reshape(len(x), layer.top_k, -1).sum(1)

    return run


def _transformers(layer: LayerSpec, weights: LayerWeights) -> Experts:
    """transformers' experts module with its grouped_mm implementation."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=layer.hidden,
        intermediate_size=layer.inter,
        num_local_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(weights.up, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(weights.down, requires_grad=False)

    def run(x: Tensor, logits: Tensor, ids: Tensor, routed: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = experts(x, ids.long(), routed.to(x.dtype))
        return y

    return run


def _vllm(layer: LayerSpec, weights: LayerWeights) -> Experts:
    """vLLM's Triton kernels with the configuration it ships for this GPU, if it has one."""
    from vllm.model_executor.layers.fused_moe import fused_experts  # type: ignore

    def run(x: Tensor, logits: Tensor, ids: Tensor, routed: Tensor) -> Tensor:
        y: Tensor = fused_experts(x, weights.up, weights.down, routed, ids)
        return y

    return run


def _triton_kernels(layer: LayerSpec, weights: LayerWeights) -> Experts:
    """OpenAI's triton_kernels; its activation is gpt-oss's, which costs the same."""
    from triton_kernels.matmul_ogs import (  # type: ignore
        FnSpecs,
        FusedActivation,
        matmul_ogs,
    )
    from triton_kernels.routing import routing  # type: ignore
    from triton_kernels.swiglu import swiglu_fn  # type: ignore

    up, down = (w.transpose(1, 2).contiguous() for w in (weights.up, weights.down))
    swiglu = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (1.702, None), 2)

    def run(x: Tensor, logits: Tensor, ids: Tensor, routed: Tensor) -> Tensor:
        data, gather, scatter = routing(logits, layer.top_k)
        h = matmul_ogs(x, up, None, data, gather_indx=gather, fused_activation=swiglu)
        y: Tensor = matmul_ogs(h, down, None, data, scatter_indx=scatter, gammas=data.gate_scal)
        return y

    return run
