"""What a model's config says of its mixture-of-experts layers, as kernels need it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from dovetail.ir.errors import InputError
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.kernel_parts import Activation, Dtype, Weights
from dovetail.ir.kernel_spec import RouteSpec

_FUNCTIONS: dict[str, Literal["swiglu", "geglu", "geglu_tanh"]] = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
}
_DTYPES: dict[str, Dtype] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
FAMILIES = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"
)  # fmt: skip


def layer_of_config(config: Mapping[str, Any]) -> LayerSpec:
    """The mixture-of-experts layer of a transformers config.

    Raises InputError for a family without kernels, or an activation that they do not compute.
    """
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        raise InputError(
            f"model type {family!r} has no kernels: they are emitted for {', '.join(FAMILIES)}"
        )
    layer = _layer(family, config)
    if family == "gpt_oss":
        return _gpt_oss(layer)
    name = str(config.get("hidden_act", "silu"))
    if name not in _FUNCTIONS:
        known = ", ".join(_FUNCTIONS)
        raise InputError(f"hidden_act {name!r}: kernels compute {known}")
    return dataclasses.replace(layer, activation=Activation(_FUNCTIONS[name]))


def _layer(family: str, config: Mapping[str, Any]) -> LayerSpec:
    experts = _first(config, "n_routed_experts", "num_local_experts", "num_experts")
    top_k = _first(config, "num_experts_per_tok")
    own = family in ("mixtral", "olmoe", "gpt_oss")
    inter = _first(config, "intermediate_size" if own else "moe_intermediate_size")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r}: kernels compute in {', '.join(_DTYPES)}")
    shared = 0
    if family.startswith("deepseek"):
        shared = inter * int(config.get("n_shared_experts") or 0)
    if family == "qwen2_moe":
        shared = _first(config, "shared_expert_intermediate_size")
    return LayerSpec(
        name=family,
        experts=experts,
        hidden=_first(config, "hidden_size"),
        inter=inter,
        top_k=top_k,
        route=_route(family, config, experts, top_k),
        x=_DTYPES[dtype],
        shared=shared,
        shared_gate=family == "qwen2_moe",
    )


def _route(family: str, config: Mapping[str, Any], experts: int, top_k: int) -> RouteSpec:
    renormalise = bool(config.get("norm_topk_prob", family in ("mixtral", "gpt_oss")))
    route = RouteSpec("moe_route", experts, top_k, renormalise=renormalise)
    if not family.startswith("deepseek"):
        return route
    route = dataclasses.replace(route, scale=float(config.get("routed_scaling_factor") or 1.0))
    groups = int(config.get("n_group") or 1), int(config.get("topk_group") or 1)
    if family == "deepseek_v3":
        return dataclasses.replace(
            route, score="sigmoid", bias=True, group_score="top2",
            groups=groups[0], top_groups=groups[1],
        )  # fmt: skip
    if config.get("topk_method") != "group_limited_greedy":
        return route
    return dataclasses.replace(route, groups=groups[0], top_groups=groups[1])


def _gpt_oss(layer: LayerSpec) -> LayerSpec:
    """Biased, interleaved and transposed, with its own clamped activation."""
    return dataclasses.replace(
        layer,
        activation=Activation("clamped", "interleaved"),
        up=Weights(order="kn"),
        down=Weights(order="kn"),
        bias=True,
    )


def _first(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise InputError(f"config.json has no positive {' or '.join(names)}: kernels need it")
