"""Kernels, small enough for the interpreter, that cover every branch of the emitter."""

import dataclasses
from typing import Any

from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.kernel_parts import Activation, Place, Tile, Weights
from dovetail.ir.kernel_spec import (
    ActivateSpec,
    GemmSpec,
    KernelSpec,
    ReduceSpec,
    RouteSpec,
    SortSpec,
)

GPT_OSS = Activation("clamped", "interleaved", limit=0.75)  # low enough to be met


def up(**changes: Any) -> GemmSpec:
    """Gather and gated activation: 5 experts, 48 outputs over 64 inputs, two choices per token."""
    base = GemmSpec(
        "moe_up", 5, 48, 64, 2, "bf16", Tile(16, 32, 32), rows="gather", activation=Activation()
    )
    return dataclasses.replace(base, **changes)


def down(**changes: Any) -> GemmSpec:
    """Routing weight and scatter to slots."""
    base = GemmSpec(
        "moe_down", 5, 48, 64, 2, "bf16", Tile(16, 32, 32), store="slot", routed_weight=True
    )
    return dataclasses.replace(base, **changes)


SPLIT = Tile(16, 32, 32, split_k=2)
DENSE = {"experts": 1, "top_k": 1, "rows": "dense"}

KERNELS: dict[str, KernelSpec] = {
    "route softmax": RouteSpec("moe_route", 12, 3, renormalise=True),
    "route plain": RouteSpec("moe_route", 8, 2),
    "route groups by best": RouteSpec("moe_route", 20, 3, groups=4, top_groups=2, scale=16.0),
    "route groups by two best": RouteSpec(
        "moe_route", 40, 4, "sigmoid", True, True, 5, 2, "top2", 2.5
    ),
    "sort, one launch": SortSpec("moe_sort", 7, 16, 64),
    "sort, two launches": SortSpec("moe_sort", 7, 32, 1024, one_launch=False),
    "up fp32": up(x="fp32", out="fp32"),
    "up fp16": up(x="fp16", out="fp16"),
    "up bf16": up(),
    "up swapped": up(swap_ab=True),
    "up TMA": up(loads="tma", n=64),
    "up TMA swapped": up(loads="tma", n=64, swap_ab=True),
    "up ragged k": up(k=80),
    "up ragged k swapped": up(k=80, swap_ab=True),
    "up one choice": up(top_k=1),
    "up int8": up(weights=Weights("int8")),
    "up int8 kn": up(weights=Weights("int8", "kn")),
    "up int4": up(weights=Weights("int4", scale_k=32), swap_ab=True),
    "up int4 kn": up(weights=Weights("int4", "kn", 32)),
    "up fp8 blocks": up(weights=Weights("fp8", "nk", 32, 16), swap_ab=True),
    "up gpt-oss": up(activation=GPT_OSS, weights=Weights(order="kn"), bias=True),
    "up gpt-oss swapped": up(
        activation=GPT_OSS, weights=Weights(order="kn"), bias=True, swap_ab=True
    ),
    "up geglu": up(activation=Activation("geglu")),
    "up geglu tanh, pairs by TMA": up(
        activation=Activation("geglu_tanh", "interleaved"), loads="tma", n=64
    ),
    "up split k": up(activation=None, tile=SPLIT, n=96, out="fp32"),
    "down fp32": down(x="fp32", out="fp32"),
    "down fp16": down(x="fp16", out="fp16"),
    "down bf16": down(bias=True),
    "down int8 swapped": down(weights=Weights("int8"), swap_ab=True),
    "down int4 per output": down(weights=Weights("int4")),
    "down fp8, fp16": down(weights=Weights("fp8"), x="fp16", out="fp16"),
    "down fp8 TMA": down(weights=Weights("fp8"), loads="tma", n=64),
    "down split k": down(tile=SPLIT, out="fp32", bias=True, swap_ab=True),
    "down add": down(store="add", out="fp32"),
    "up placed, apart": up(place=Place((0, 48 * 64 + 8))),
    "up placed, one matrix": up(place=Place((16,)), bias=False, swap_ab=True),
    "up placed gpt-oss": up(
        activation=GPT_OSS, weights=Weights(order="kn"), bias=True, place=Place((8,), (9000,))
    ),
    "up placed, apart, kn, biases": up(
        weights=Weights(order="kn"),
        bias=True,
        place=Place((0, 3200), (6400, 6448)),
        x="fp32",
        out="fp32",
    ),
    "down placed": down(place=Place((3072,))),
    "down placed, split k, bias": down(
        tile=SPLIT, out="fp32", bias=True, place=Place((48,), (0,)), x="fp16"
    ),
    "up relu2": up(activation=Activation("relu2")),
    "up relu": up(activation=Activation("relu"), bias=True),
    "up silu": up(activation=Activation("silu"), swap_ab=True),
    "up gelu": up(activation=Activation("gelu"), place=Place((0,))),
    "up gelu tanh": up(activation=Activation("gelu_tanh")),
    "up reglu": up(activation=Activation("reglu")),
    "shared up": up(name="shared_up", **DENSE),
    "shared down": down(name="shared_down", store="row", routed_weight=False, **DENSE),
    "reduce": ReduceSpec("moe_reduce", 5, 48, 2),
    "reduce plain shared": ReduceSpec("moe_reduce", 5, 48, 2, 1, "plain", x="fp32", out="fp32"),
    "reduce gated shared, splits": ReduceSpec("moe_reduce", 5, 48, 2, 2, "gated", block=32),
    "reduce by address": ReduceSpec("moe_reduce", 5, 48, 2, out="fp32", by_address=True),
    "reduce by address, splits": ReduceSpec(
        "moe_reduce", 5, 48, 2, 2, x="fp32", out="fp32", block=32, by_address=True
    ),
    "activate": ActivateSpec("moe_activate", 48, 2, block=32),
    "activate gpt-oss": ActivateSpec("moe_activate", 48, 2, GPT_OSS, block=64),
}

LAYERS: dict[str, LayerSpec] = {
    "qwen3-like": LayerSpec(
        "a", 8, 128, 64, 3, RouteSpec("moe_route", 8, 3, renormalise=True), "fp32"
    ),
    "deepseek-v3-like": LayerSpec(
        "b", 16, 128, 64, 4,
        RouteSpec("moe_route", 16, 4, "sigmoid", True, True, 4, 2, "top2", 2.5),
        up=Weights("fp8", scale_k=64, scale_n=64), down=Weights("fp8", scale_k=64, scale_n=64),
        shared=64,
    ),
    "gpt-oss-like": LayerSpec(
        "c", 4, 96, 96, 2, RouteSpec("moe_route", 4, 2, renormalise=True), "fp16",
        Weights(order="kn"), Weights(order="kn"), GPT_OSS, True,
    ),
    "qwen2-moe-like int8": LayerSpec(
        "d", 6, 128, 128, 2, RouteSpec("moe_route", 6, 2), "fp16",
        Weights("int8"), Weights("int4", scale_k=32), shared=64, shared_gate=True,
    ),
    "slots, gate and up apart": LayerSpec(
        "e", 6, 96, 64, 2, None, "bf16", up_place=Place((0, 96 * 64)),
        down_place=Place((2 * 96 * 64,)),
    ),
    "slots, gpt-oss-like": LayerSpec(
        "f", 4, 96, 96, 2, None, "fp16", Weights(order="kn"), Weights(order="kn"), GPT_OSS, True,
        up_place=Place((0,), (2 * 96 * 96,)), down_place=Place((19008,), (28224,)),
    ),
    "slots, no gate": LayerSpec(
        "g", 5, 64, 96, 3, None, "fp32", down=Weights(order="kn"), activation=Activation("relu2"),
        up_place=Place((6144,)), down_place=Place((0,)),
    ),
}  # fmt: skip
