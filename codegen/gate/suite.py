"""The kernels that the gate compiles: what is chosen for published layers, on each architecture."""

import dataclasses
from collections.abc import Iterator

from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.choose import choose_layer
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.kernel_parts import Activation, Place, Tile, Weights
from dovetail.ir.kernel_spec import ActivateSpec, GemmSpec, KernelSpec, ReduceSpec, RouteSpec

DECODE, PREFILL = (2, 16), (1025, 4096)

QWEN3_30B = LayerSpec(
    "Qwen3-30B-A3B", 128, 2048, 768, 8, RouteSpec("moe_route", 128, 8, renormalise=True)
)
MIXTRAL_8X7B = LayerSpec(
    "Mixtral-8x7B", 8, 4096, 14336, 2, RouteSpec("moe_route", 8, 2, renormalise=True)
)
DEEPSEEK_V2_LITE = LayerSpec(
    "DeepSeek-V2-Lite", 64, 2048, 1408, 6, RouteSpec("moe_route", 64, 6), shared=2816
)
_FP8 = Weights("fp8", scale_k=128, scale_n=128)
DEEPSEEK_V3 = LayerSpec(
    "DeepSeek-V3", 256, 7168, 2048, 8,
    RouteSpec("moe_route", 256, 8, "sigmoid", True, True, 8, 4, "top2", 2.5),
    up=_FP8, down=_FP8, shared=2048,
)  # fmt: skip
GPT_OSS_20B = LayerSpec(
    "gpt-oss-20b", 32, 2880, 2880, 4, RouteSpec("moe_route", 32, 4, renormalise=True),
    up=Weights(order="kn"), down=Weights(order="kn"),
    activation=Activation("clamped", "interleaved"), bias=True,
)  # fmt: skip
_OLMOE = LayerSpec("OLMoE-1B-7B", 64, 2048, 1024, 8, RouteSpec("moe_route", 64, 8))
OLMOE_INT8 = dataclasses.replace(
    _OLMOE, name="OLMoE-1B-7B int8", up=Weights("int8"), down=Weights("int8")
)
QWEN3_30B_IN_SLOTS = dataclasses.replace(
    QWEN3_30B, name="Qwen3-30B-A3B in slots", route=None,
    up_place=Place((0, 768 * 2048)), down_place=Place((2 * 768 * 2048,)),
)  # fmt: skip
GPT_OSS_20B_IN_SLOTS = dataclasses.replace(
    GPT_OSS_20B, name="gpt-oss-20b in slots", route=None,
    up_place=Place((0,), (2880 * 5760,)),
    down_place=Place((2880 * 5760 + 5760,), (2880 * 5760 + 5760 + 2880 * 2880,)),
)  # fmt: skip
OLMOE_INT4 = dataclasses.replace(
    _OLMOE,
    name="OLMoE-1B-7B int4",
    up=Weights("int4", scale_k=128),
    down=Weights("int4", scale_k=128),
)


def gate_suite(arch: Arch) -> Iterator[tuple[str, KernelSpec]]:
    """(layer and bucket, kernel) of everything that is compiled for ``arch``, no kernel twice."""
    seen: set[KernelSpec] = set()
    for label, spec in _all(arch):
        if spec not in seen:
            seen.add(spec)
            yield label, spec


LIKE_OTHERS = ("sm_86", "sm_89")
"""The same instructions as sm_80 with less shared memory: a few kernels stand for all."""


def _all(arch: Arch) -> Iterator[tuple[str, KernelSpec]]:
    few = arch.name in LIKE_OTHERS
    in_slots: tuple[tuple[LayerSpec, tuple[int, int], tuple[str, ...]], ...] = (
        (QWEN3_30B_IN_SLOTS, DECODE, ("up",) if few else ("up", "down", "reduce")),
        (QWEN3_30B_IN_SLOTS, PREFILL, ("up",)),
        (GPT_OSS_20B_IN_SLOTS, DECODE, ("up",) if arch.name == "sm_90" else ()),
    )
    for layer, bucket, names in in_slots:
        chosen = choose_layer(layer, arch, bucket)
        label = f"{layer.name}, {bucket[1]} tokens"
        yield from ((label, getattr(chosen, name)) for name in names)
    if not few:
        yield from _more(arch)


def _more(arch: Arch) -> Iterator[tuple[str, KernelSpec]]:
    for layer, bucket, names in (
        (QWEN3_30B, DECODE, ("route", "sort", "up", "down", "reduce")),
        (QWEN3_30B, PREFILL, ("sort", "up", "down")),
        (DEEPSEEK_V3, DECODE, ("route", "up", "down", "shared_up", "shared_down", "reduce")),
        (GPT_OSS_20B, DECODE, ("up", "down")),
        (OLMOE_INT8, DECODE, ("up", "down")),
        (OLMOE_INT8, PREFILL, ("up",)),
        (OLMOE_INT4, DECODE, ("up", "down")),
    ):
        chosen = choose_layer(layer, arch, bucket)
        label = f"{layer.name}, {bucket[1]} tokens"
        yield from ((label, getattr(chosen, name)) for name in names)
    yield from _variants(arch)


def _variants(arch: Arch) -> Iterator[tuple[str, KernelSpec]]:
    """Kernels that no layer above is given."""
    stages = 3 if arch.backend == "cuda" else 2
    base = GemmSpec(
        "moe_up", 128, 768, 2048, 8, "bf16", Tile(16, 128, 64, 4, stages),
        rows="gather", activation=Activation(), swap_ab=True, bucket=(1, 16),
    )  # fmt: skip
    yield "swapped operands", base
    if arch.tma:
        yield "swapped operands, TMA", dataclasses.replace(base, loads="tma")
    split = Tile(16, 64, 64, 4, 3, split_k=4)
    sums = dataclasses.replace(
        base, activation=None, n=1536, tile=split, swap_ab=False, out="fp32", x="fp16"
    )
    yield "split k, then activation", sums
    yield "split k, then activation", ActivateSpec("moe_activate", 768, 4, out="fp16")
    yield (
        "geglu, fp16",
        dataclasses.replace(
            base, activation=Activation("geglu_tanh"), swap_ab=False, x="fp16", out="fp16"
        ),
    )
    yield "add into tokens", GemmSpec(
        "moe_down", 128, 2048, 768, 8, "bf16", Tile(32, 64, 64, 4, 3),
        store="add", routed_weight=True, out="fp32",
    )  # fmt: skip
    if arch.name == "sm_90":
        yield "no gate", dataclasses.replace(base, activation=Activation("relu2"), swap_ab=False)
    yield "gated shared expert", ReduceSpec("moe_reduce", 60, 2048, 4, 1, "gated")


def broken_suite(arch: Arch) -> Iterator[tuple[str, GemmSpec]]:
    """(what the gate must say, spec) of tiles that must not pass: controls of the gate itself."""
    base = GemmSpec(
        "moe_up", 128, 768, 2048, 8, "bf16", Tile(128, 128, 64, 4, 3),
        rows="gather", activation=Activation(),
    )  # fmt: skip
    if arch.backend == "cuda":
        yield "spills", base
        yield "shared memory", dataclasses.replace(base, tile=Tile(128, 256, 128, 8, 4))
    else:
        yield "shared memory", dataclasses.replace(base, tile=Tile(128, 128, 64, 4, 4))
