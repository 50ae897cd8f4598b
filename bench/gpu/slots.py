"""Experts by address, as the executor runs them: the layer's weights in slots, in no order."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dovetail.codegen.gate.placed import put
from dovetail.codegen.kernels.addresses import slot_addresses
from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.choose import choose_ladder
from dovetail.codegen.kernels.experts_runner import ExpertsRunner
from dovetail.codegen.kernels.launch import Kernel, source_kernel
from dovetail.codegen.kernels.layer import LayerWeights
from dovetail.ir.kernel_layer import LayerKernels, LayerSpec
from dovetail.ir.kernel_parts import Place
from dovetail.ir.kernel_spec import KernelSpec

Load = Callable[[KernelSpec, Path], Kernel]


def placed(layer: LayerSpec) -> LayerSpec:
    """The routed experts of a layer, gate and up after each other, then down."""
    matrix = layer.inter * layer.hidden
    return dataclasses.replace(
        layer, route=None, up_place=Place((0, matrix)), down_place=Place((2 * matrix,))
    )


class Slots:
    """A layer's experts in a pool, and what runs them from there."""

    def __init__(
        self, layer: LayerSpec, weights: LayerWeights, arch: Arch, counts: Sequence[int]
    ) -> None:
        self.layer, self.counts = placed(layer), counts
        self.ladder: tuple[LayerKernels, ...] = choose_ladder(self.layer, arch, counts)
        elements = 3 * layer.inter * layer.hidden
        device = weights.up.device
        self.pool = torch.empty(layer.experts, elements, dtype=weights.up.dtype, device=device)
        order = torch.randperm(layer.experts)
        for expert, slot in enumerate(order.tolist()):
            put(self.pool[slot], self.ladder[0].up, weights.up[expert], None)
            put(self.pool[slot], self.ladder[0].down, weights.down[expert], None)
        stride = elements * self.pool.itemsize
        self.table = slot_addresses(self.pool, stride, order.to(torch.int32).to(device))
        self.sums = torch.zeros(max(counts), layer.hidden, device=device)

    def runner(self, folder: Path, load: Load = source_kernel) -> Callable[..., Tensor]:
        """A function of (x, ids, routing weights) that gives y in float32."""
        device = str(self.pool.device)
        run = ExpertsRunner(self.layer, self.ladder, max(self.counts), device, folder, load)

        def forward(x: Tensor, ids: Tensor, routed: Tensor) -> Tensor:
            sums = self.sums[: len(x)].zero_()
            run.begin(x, ids, routed)
            run.run(self.table, sums)
            return sums

        return forward
