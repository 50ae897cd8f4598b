"""Launch emitted kernels on torch tensors: grids from upper bounds, arguments by name."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor

from dovetail.codegen.kernels.emit import emit_kernel, file_name, load_source
from dovetail.codegen.kernels.launch_bounds import ceil_div, most_tiles, sort_parts
from dovetail.ir.kernel_spec import (
    ActivateSpec,
    GemmSpec,
    KernelSpec,
    ReduceSpec,
    RouteSpec,
    SortSpec,
)


def grid_of(spec: KernelSpec, tokens: int, top_k: int = 1) -> tuple[int, ...]:
    """The launch grid for ``tokens`` tokens; programs past the work return at once."""
    slots = tokens * top_k
    match spec:
        case RouteSpec():
            return (ceil_div(tokens, spec.tokens),)
        case SortSpec():
            return (spec.experts,) if spec.one_launch else (spec.experts, sort_parts(slots))
        case GemmSpec(rows="dense", tile=tile):
            return (ceil_div(tokens, tile.m) * ceil_div(spec.n, tile.n), tile.split_k)
        case GemmSpec(tile=tile):
            tiles = most_tiles(tokens * spec.top_k, spec.experts, tile.m)
            return (max(1, tiles) * ceil_div(spec.n, tile.n), tile.split_k)
        case ActivateSpec():
            return (tokens, ceil_div(spec.n, spec.block))
        case ReduceSpec():
            return (tokens, ceil_div(spec.n, spec.block))


def launch(
    module: ModuleType,
    spec: KernelSpec,
    grid: tuple[int, ...],
    values: Mapping[str, Any],
    function: str = "",
) -> None:
    """Run one kernel of an emitted module with the arguments that its signature names."""
    kernel = getattr(module, function or spec.name)
    kernel[grid](*(values[name] for name in kernel.arg_names), **module.OPTIONS)


class Kernel(Protocol):
    """A kernel that can be launched, from its source or from a binary."""

    def __call__(
        self, grid: tuple[int, ...], values: Mapping[str, Any], function: str = ""
    ) -> None:
        """Launch on the current stream with the arguments that the kernel names among ``values``;
        ``function`` is another function of the kernel's module than that of its name."""
        ...


class SourceKernel:
    """An emitted module whose functions Triton compiles at their first launch."""

    def __init__(self, spec: KernelSpec, module: ModuleType) -> None:
        self.spec, self.module = spec, module

    def __call__(
        self, grid: tuple[int, ...], values: Mapping[str, Any], function: str = ""
    ) -> None:
        """Launch; see ``Kernel``."""
        launch(self.module, self.spec, grid, values, function)


def source_kernel(spec: KernelSpec, folder: Path) -> Kernel:
    """The spec's kernel, its source written to ``folder``."""
    return SourceKernel(spec, load_source(emit_kernel(spec), folder, file_name(spec)))


def weight_descriptor(stored: Tensor, spec: GemmSpec) -> Any:
    """The TMA descriptor of the experts' matrices, seen as one matrix of rows [outputs, inputs]."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped]

    rows = stored.reshape(-1, stored.shape[-1])
    return TensorDescriptor.from_tensor(rows, [spec.tile_rows, spec.tile.k])
