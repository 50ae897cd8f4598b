"""Run a layer's kernels on torch tensors: buffers sized once, launches in a straight line.

Every size that depends on routing stays on the device, so a forward pass reads nothing back and can
be captured in a CUDA graph; the same code runs in Triton's interpreter on CPU tensors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.codegen.kernels.launch import Kernel, grid_of, source_kernel, weight_descriptor
from dovetail.codegen.kernels.launch_bounds import SORT_PART, most_tiles, sort_parts
from dovetail.codegen.kernels.quantise import TORCH_DTYPES
from dovetail.codegen.kernels.routing import power_of_two
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_layer import LayerKernels, LayerSpec
from dovetail.ir.kernel_parts import DTYPE_BYTES
from dovetail.ir.kernel_spec import GemmSpec, KernelSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer's tensors, stored as its spec says: experts' matrices [experts, outputs, inputs] or
    transposed, float32 scales, biases [experts, outputs], the shared expert's pair, the router's
    correction [experts]."""

    up: Tensor
    down: Tensor
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    shared_up: Tensor | None = None
    shared_down: Tensor | None = None
    route_bias: Tensor | None = None


class LayerRunner:
    """A layer's kernels for every bucket, loaded, with buffers for ``tokens`` tokens.

    ``load`` gives the kernel of a spec, by default compiled from its emitted source in ``folder``.
    Raises InputError when no bucket holds ``tokens``, or routing is left to others.
    """

    def __init__(
        self,
        layer: LayerSpec,
        ladder: Sequence[LayerKernels],
        tokens: int,
        device: str,
        folder: Path,
        load: Callable[[KernelSpec, Path], Kernel] = source_kernel,
    ) -> None:
        if layer.up_place is not None or layer.route is None:
            raise InputError(
                f"layer {layer.name}: its experts lie at addresses or their routing is another's; "
                "ExpertsRunner runs such layers"
            )
        self.layer = layer
        self.ladder = sorted(ladder, key=lambda kernels: kernels.bucket)
        self._kernels: dict[KernelSpec, Kernel] = {
            spec: load(spec, folder) for kernels in ladder for spec in kernels.specs()
        }
        self._descriptors: dict[tuple[int, GemmSpec], Any] = {}
        self.bucket(tokens)
        used = [kernels for kernels in self.ladder if kernels.bucket[0] <= tokens]
        self.buffers = layer_buffers(layer, used, tokens, device)

    def bucket(self, tokens: int) -> LayerKernels:
        """The kernels for this many tokens."""
        return kernels_for(self.layer, self.ladder, tokens)

    def forward(
        self, x: Tensor, logits: Tensor, weights: LayerWeights, gate: Tensor | None = None
    ) -> Tensor:
        """y [tokens, hidden] of x [tokens, hidden] and router logits [tokens, experts] (float32).

        ``gate`` [tokens] holds the shared expert's logits. The result is a view of a buffer that
        the next call overwrites.
        """
        tokens = x.shape[0]
        kernels = self.bucket(tokens)
        buffers, slots = self.buffers, tokens * self.layer.top_k
        common: dict[str, Any] = buffers | {
            "num_tokens": tokens,
            "num_slots": slots,
            "num_rows": tokens,
            "part_ptr": buffers["part"].view(TORCH_DTYPES[kernels.down.out]),
        }
        route: dict[str, Any] = {"logits_ptr": logits, "bias_ptr": weights.route_bias}
        route |= {"weight_ptr": buffers["routed_weight_ptr"]}
        assert kernels.route is not None
        self._run(kernels.route, tokens, common | route)
        self._sort(kernels, tokens, common)
        up: dict[str, Any] = {"x_ptr": x, "y_ptr": buffers["hidden"]}
        up |= {"scale_ptr": weights.up_scale, "bias_ptr": weights.up_bias}
        self._gemm(kernels.up, tokens, weights.up, common | up)
        down: dict[str, Any] = {"x_ptr": buffers["hidden"], "y_ptr": common["part_ptr"]}
        down |= {"scale_ptr": weights.down_scale, "bias_ptr": weights.down_bias}
        self._gemm(kernels.down, tokens, weights.down, common | down)
        if kernels.shared_up is not None and kernels.shared_down is not None:
            assert weights.shared_up is not None and weights.shared_down is not None
            pair = {"x_ptr": x, "y_ptr": buffers["shared_hidden"]}
            self._gemm(kernels.shared_up, tokens, weights.shared_up, common | pair)
            pair = {"x_ptr": buffers["shared_hidden"], "y_ptr": buffers["shared_ptr"]}
            self._gemm(kernels.shared_down, tokens, weights.shared_down, common | pair)
        self._run(kernels.reduce, tokens, common | {"gate_ptr": gate})
        return self.buffers["y_ptr"][:tokens]

    def _run(self, spec: KernelSpec, tokens: int, values: Mapping[str, Any]) -> None:
        self._kernels[spec](grid_of(spec, tokens, self.layer.top_k), values)

    def _sort(self, kernels: LayerKernels, tokens: int, common: Mapping[str, Any]) -> None:
        sort, parts = kernels.sort, sort_parts(tokens * self.layer.top_k)
        values = {**common, "chunk": SORT_PART, "parts": parts}
        if not sort.one_launch:
            self._kernels[sort]((parts,), values, f"{sort.name}_count")
        self._run(sort, tokens, values)

    def _gemm(self, spec: GemmSpec, tokens: int, stored: Tensor, values: Mapping[str, Any]) -> None:
        operand: dict[str, Any] = {"w_ptr": stored}
        if spec.loads == "tma":
            key = (stored.data_ptr(), spec)
            if key not in self._descriptors:
                self._descriptors[key] = weight_descriptor(stored, spec)
            operand = {"w_desc": self._descriptors[key]}
        self._run(spec, tokens, {**values, **operand})


def kernels_for(layer: LayerSpec, ladder: Sequence[LayerKernels], tokens: int) -> LayerKernels:
    """The first kernels of the rising ``ladder`` for so many tokens; raises InputError if none."""
    for kernels in ladder:
        if tokens <= kernels.bucket[1]:
            return kernels
    raise InputError(
        f"layer {layer.name}: {tokens} tokens, its kernels are for at most "
        f"{ladder[-1].bucket[1]}; split the batch or choose a longer ladder"
    )


def layer_buffers(
    layer: LayerSpec, ladder: Sequence[LayerKernels], tokens: int, device: str
) -> dict[str, Tensor]:
    """Every intermediate tensor, as large as the most demanding bucket needs it."""
    return {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in _buffer_shapes(layer, ladder, tokens).items()
    }


def buffer_bytes(layer: LayerSpec, ladder: Sequence[LayerKernels], tokens: int) -> int:
    """Bytes of the buffers that a runner for so many tokens takes."""
    found = _buffer_shapes(layer, ladder, tokens).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in found)


def _buffer_shapes(
    layer: LayerSpec, ladder: Sequence[LayerKernels], tokens: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    rows = tiles = part_bytes = 0
    for kernels in ladder:
        count = min(tokens, kernels.bucket[1])
        most = most_tiles(count * layer.top_k, layer.experts, kernels.up.tile.m)
        tiles, rows = max(tiles, most), max(rows, most * kernels.up.tile.m)
        width = DTYPE_BYTES[kernels.down.out] * kernels.down.tile.split_k
        part_bytes = max(part_bytes, count * layer.top_k * layer.hidden * width)
    dtype, slots = TORCH_DTYPES[layer.x], tokens * layer.top_k
    bins = power_of_two(layer.experts + 1)
    found = {
        "id_ptr": ((tokens, layer.top_k), torch.int32),
        "routed_weight_ptr": ((slots,), torch.float32),
        "slot_ptr": ((rows,), torch.int32),
        "tile_expert_ptr": ((tiles,), torch.int32),
        "count_ptr": ((layer.experts,), torch.int32),
        "num_rows_ptr": ((1,), torch.int32),
        "partial_ptr": ((sort_parts(slots), bins), torch.int32),
        "hidden": ((rows, layer.inter), dtype),
        "part": ((part_bytes,), torch.uint8),
    }
    if layer.up_place is not None:
        return found
    return found | {
        "shared_hidden": ((tokens, max(1, layer.shared)), dtype),
        "shared_ptr": ((tokens, layer.hidden), dtype),
        "y_ptr": ((tokens, layer.hidden), dtype),
    }
