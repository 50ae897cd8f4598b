"""The space of a layer's CUDA kernels for one bucket of tokens: tile parameters and their values.

Both GEMMs of a layer share the rows of a tile, which the sort pads to; all else is each one's own.
Most of the space is refused by arithmetic (shared memory, registers: ``codegen/kernels/cost.py``)
before anything is compiled, so a measuring search spends its time on tiles that can run. With no
GPU, ``seconds`` ranks points by the cost model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.choose import (
    DEPTHS,
    OUTPUTS,
    ROWS,
    SPLITS,
    STAGES,
    WARPS,
    choose_layer,
    with_tiles,
)
from dovetail.codegen.kernels.cost import predicted_seconds, refusal
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_layer import LayerKernels, LayerSpec
from dovetail.ir.kernel_parts import Tile
from dovetail.ir.kernel_spec import GemmSpec
from dovetail.tuning.space import Ladders, Point

_OWN: Mapping[str, tuple[int, ...]] = {
    "outputs": OUTPUTS, "depth": DEPTHS, "warps": WARPS, "stages": STAGES, "split": SPLITS,
    "swap": (0, 1), "tma": (0, 1),
}  # fmt: skip
_GEMMS = ("up", "down")


@dataclass(frozen=True, slots=True)
class BuiltKernels:
    """A point's kernels, or why they need not be compiled."""

    kernels: LayerKernels | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class KernelSpace(Ladders):
    """Kernels of ``layer`` on ``arch`` for ``bucket``; the base point is the cost model's choice.

    Knobs are ``rows`` and, as in ``up_stages``, those of each GEMM.
    """

    layer: LayerSpec
    arch: Arch
    bucket: tuple[int, int]
    chosen: LayerKernels

    @classmethod
    def of(cls, layer: LayerSpec, arch: Arch, bucket: tuple[int, int]) -> "KernelSpace":
        """The whole space. Raises InputError where no tile fits."""
        chosen = choose_layer(layer, arch, bucket)
        base = {"rows": chosen.up.tile.m}
        ladders: dict[str, tuple[int, ...]] = {"rows": ROWS}
        for name in _GEMMS:
            spec: GemmSpec = getattr(chosen, name)
            base |= {f"{name}_{knob}": value for knob, value in _knobs(spec).items()}
            ladders |= {f"{name}_{knob}": values for knob, values in _OWN.items()}
        # A gated product whose k axis is split would have to be activated afterwards.
        fixed = {"up_split"} | ({"up_tma", "down_tma"} if not arch.tma or layer.up_place else set())
        kept = {name: values for name, values in ladders.items() if name not in fixed}
        return cls(base, kept, layer, arch, bucket, chosen)

    def build(self, point: Point) -> BuiltKernels:
        """The kernels of a point, or the first reason against them."""
        full = self.complete(point)
        made = {}
        for name in _GEMMS:
            try:
                made[name] = self._gemm(name, full)
            except InputError as error:
                return BuiltKernels(why=str(error))
            if why := refusal(made[name], self.arch):
                return BuiltKernels(why=f"{name}: {why}")
        return BuiltKernels(with_tiles(self.chosen, made["up"], made["down"]))

    def seconds(self, point: Point) -> float:
        """Predicted seconds of both GEMMs for the bucket's largest batch; infinite where the point
        cannot be built."""
        built = self.build(point).kernels
        if built is None:
            return math.inf
        return sum(
            predicted_seconds(spec, self.arch, self.bucket[1]) for spec in (built.up, built.down)
        )

    def _gemm(self, name: str, point: Point) -> GemmSpec:
        base: GemmSpec = getattr(self.chosen, name)
        own = {knob: point[f"{name}_{knob}"] for knob in _OWN}
        tile = Tile(
            point["rows"], own["outputs"], own["depth"], own["warps"], own["stages"],
            base.tile.group, own["split"],
        )  # fmt: skip
        out = "fp32" if tile.split_k > 1 else self.layer.x
        return replace(
            base, tile=tile, swap_ab=bool(own["swap"]), loads="tma" if own["tma"] else "pointer",
            out=out,
        )  # fmt: skip


def _knobs(spec: GemmSpec) -> dict[str, int]:
    tile = spec.tile
    return {
        "outputs": tile.n, "depth": tile.k, "warps": tile.warps, "stages": tile.stages,
        "split": tile.split_k, "swap": int(spec.swap_ab), "tma": int(spec.loads == "tma"),
    }  # fmt: skip
