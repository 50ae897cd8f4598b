"""Choose the kernels of a layer: every tile that fits, ranked by predicted time.

The space is what tuned configurations of fused MoE kernels cover: 16 to 128 rows, 64 to 256
outputs, 32 to 128 along k, 4 or 8 warps, 2 to 5 stages, both operand orders, split k. Most of it is
refused by arithmetic; nothing is compiled here.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

from dovetail.codegen.kernels.arch import Arch, matrix_instruction
from dovetail.codegen.kernels.cost import LEAST_K, LEAST_N, predicted_seconds, refusal
from dovetail.codegen.kernels.launch_bounds import SORT_ONE_LAUNCH
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_layer import LayerKernels, LayerSpec
from dovetail.ir.kernel_parts import Dtype, Tile
from dovetail.ir.kernel_spec import GemmSpec, ReduceSpec, SortSpec

LADDER = (1, 16, 64, 256, 1024, 4096, 16384)
"""Token counts that layers are prepared for; a count runs on the next larger one's kernels."""
ROWS = (16, 32, 64, 128)
"""Rows, outputs and depth of tiles, and the compiler's options, that are worth trying."""
OUTPUTS = (LEAST_N, 128, 256)
DEPTHS = (LEAST_K, 64, 128)
WARPS = (4, 8)
STAGES = (2, 3, 4, 5)
SPLITS = (1, 2, 4)
_SPLIT_TOKENS = 256
"""Up to this many tokens a split k axis may pay: beyond, tiles alone fill the GPU."""


class Ranked(NamedTuple):
    """A spec and its predicted seconds."""

    seconds: float
    spec: GemmSpec


def variants(base: GemmSpec, arch: Arch, rows: int) -> Iterator[GemmSpec]:
    """Every legal spec of ``base``'s GEMM with ``rows`` rows per tile, pruned by arithmetic."""
    whole = base.activation is not None or base.store != "slot" or base.bucket[1] > _SPLIT_TOKENS
    splits = (1,) if whole else SPLITS
    orders = (False, True) if rows < 64 else (False,)
    loads: tuple[Literal["pointer", "tma"], ...] = ("pointer", "tma") if arch.tma else ("pointer",)
    for n, k, warps, stages, split, swap, load in itertools.product(
        OUTPUTS, DEPTHS, WARPS, STAGES, splits, orders, loads
    ):
        out: Dtype = "fp32" if split > 1 else base.out
        tile = Tile(rows, n, k, warps, stages, split_k=split)
        try:
            spec = dataclasses.replace(base, tile=tile, swap_ab=swap, loads=load, out=out)
        except InputError:
            continue
        if _worthwhile(spec, arch) and not refusal(spec, arch):
            yield spec


def _worthwhile(spec: GemmSpec, arch: Arch) -> bool:
    """Operand orders and loads that cannot win are left out.

    Swapping operands costs a transposed store, so it must gain the warp-group instruction; TMA
    frees the registers of addresses, which matters from 64 rows on.
    """
    if spec.swap_ab:
        plain = dataclasses.replace(spec, swap_ab=False)
        if matrix_instruction(spec, arch) == matrix_instruction(plain, arch):
            return False
    return spec.loads == "pointer" or spec.tile.m >= 64 or spec.swap_ab


def rank(
    base: GemmSpec,
    arch: Arch,
    tokens: int,
    rows: int,
    keep: int = 8,
    refused: Collection[GemmSpec] = (),
) -> list[Ranked]:
    """The ``keep`` fastest predicted variants not ``refused``; ties go to the smaller tile."""
    found = [
        Ranked(predicted_seconds(spec, arch, tokens), spec)
        for spec in variants(base, arch, rows)
        if spec not in refused
    ]
    return sorted(found, key=lambda item: (item.seconds, _size(item.spec)))[:keep]


def _size(spec: GemmSpec) -> tuple[int, ...]:
    tile = spec.tile
    return (
        tile.split_k,
        tile.warps,
        tile.n * tile.k,
        tile.stages,
        spec.swap_ab,
        spec.loads == "tma",
    )


def choose_layer(
    layer: LayerSpec, arch: Arch, bucket: tuple[int, int], refused: Collection[GemmSpec] = ()
) -> LayerKernels:
    """The kernels for one bucket of token counts: both GEMMs share the sort's rows per tile.
    ``refused`` are specs that did not pass the gate: the next ones are taken.

    Raises InputError when no tile fits, which needs an architecture with less shared memory than
    two small tiles.
    """
    tokens = bucket[1]
    up, down = _up(layer, bucket), _down(layer, bucket)
    best: tuple[float, GemmSpec, GemmSpec] | None = None
    for rows in ROWS:
        ups = rank(up, arch, tokens, rows, 1, refused)
        downs = rank(down, arch, tokens, rows, 1, refused)
        if not ups or not downs:
            continue
        seconds = ups[0].seconds + downs[0].seconds
        if best is None or seconds < best[0]:
            best = seconds, ups[0].spec, downs[0].spec
    if best is None:
        raise InputError(
            f"layer {layer.name}: no tile fits {arch.name}; its shared memory is too small"
        )
    _, up, down = best
    return LayerKernels(
        arch=arch.name,
        bucket=bucket,
        route=layer.route,
        sort=SortSpec(
            "moe_sort", layer.experts, up.tile.m, one_launch=tokens * layer.top_k <= SORT_ONE_LAUNCH
        ),
        up=up,
        activate=None,
        down=down,
        reduce=_reduce(layer, down),
        **_shared(layer, arch, bucket, refused),
    )


def with_tiles(kernels: LayerKernels, up: GemmSpec, down: GemmSpec) -> LayerKernels:
    """A bucket's kernels with other GEMMs, which share the rows of a tile, and what follows from
    them."""
    assert up.tile.m == down.tile.m
    return dataclasses.replace(
        kernels,
        up=up,
        down=down,
        sort=dataclasses.replace(kernels.sort, tile_m=up.tile.m),
        reduce=dataclasses.replace(kernels.reduce, split_k=down.tile.split_k),
    )


def choose_ladder(
    layer: LayerSpec,
    arch: Arch,
    ladder: Sequence[int] = LADDER,
    refused: Collection[GemmSpec] = (),
) -> tuple[LayerKernels, ...]:
    """Kernels for every bucket of the ladder."""
    firsts = (1, *(last + 1 for last in ladder[:-1]))
    return tuple(
        choose_layer(layer, arch, (first, last), refused)
        for first, last in zip(firsts, ladder, strict=True)
    )


def _up(layer: LayerSpec, bucket: tuple[int, int]) -> GemmSpec:
    return GemmSpec(
        "moe_up", layer.experts, layer.inter, layer.hidden, layer.top_k, layer.x,
        Tile(16, 64, 32), layer.up, "gather", "row", layer.activation, layer.bias,
        out=layer.x, bucket=bucket, place=layer.up_place,
    )  # fmt: skip


def _down(layer: LayerSpec, bucket: tuple[int, int]) -> GemmSpec:
    return GemmSpec(
        "moe_down", layer.experts, layer.hidden, layer.inter, layer.top_k, layer.x,
        Tile(16, 64, 32), layer.down, "sorted", "slot", None, layer.bias, True,
        out=layer.x, bucket=bucket, place=layer.down_place,
    )  # fmt: skip


def _reduce(layer: LayerSpec, down: GemmSpec) -> ReduceSpec:
    shared = "gated" if layer.shared_gate else "plain" if layer.shared else "none"
    return ReduceSpec(
        "moe_reduce", layer.experts, layer.hidden, layer.top_k, down.tile.split_k, shared,  # type: ignore[arg-type]
        layer.x, "fp32" if layer.up_place else layer.x, by_address=layer.up_place is not None,
    )  # fmt: skip


def _shared(
    layer: LayerSpec, arch: Arch, bucket: tuple[int, int], refused: Collection[GemmSpec]
) -> dict[str, GemmSpec]:
    """The shared expert as a dense pair of GEMMs."""
    if not layer.shared:
        return {}
    up = dataclasses.replace(
        _up(layer, bucket), name="shared_up", experts=1, n=layer.shared, top_k=1, rows="dense",
        place=None,
        weights=dataclasses.replace(layer.up, format="plain", scale_k=0, scale_n=1), bias=False,
    )  # fmt: skip
    down = dataclasses.replace(
        _down(layer, bucket), name="shared_down", experts=1, k=layer.shared, top_k=1, rows="dense",
        store="row", routed_weight=False, bias=False, place=None,
        weights=dataclasses.replace(layer.down, format="plain", scale_k=0, scale_n=1),
    )  # fmt: skip
    chosen = {}
    for name, base in (("shared_up", up), ("shared_down", down)):
        ranked = [item for rows in ROWS for item in rank(base, arch, bucket[1], rows, 1, refused)]
        chosen[name] = min(ranked, key=lambda item: item.seconds).spec
    return chosen
