"""Run routed experts wherever their weights lie: in pool slots, resident, some now and some later.

A layer's tokens are sorted by expert once; its products can then be launched in pieces, each for
the experts whose addresses it is given, as their weights arrive. All sizes that depend on routing
stay on the device: the host reads nothing back, and the calls can be captured in a CUDA graph.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail.codegen.kernels.launch import Kernel, grid_of, source_kernel
from dovetail.codegen.kernels.launch_bounds import SORT_PART, sort_parts
from dovetail.codegen.kernels.layer import kernels_for, layer_buffers
from dovetail.codegen.kernels.quantise import TORCH_DTYPES
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_layer import LayerKernels, LayerSpec
from dovetail.ir.kernel_spec import KernelSpec


class ExpertsRunner:
    """The experts of every layer that ``layer`` describes, one layer at a time::

        runner.begin(x, ids, weights)     # sorts the tokens by expert
        runner.run(addresses, sums)       # experts whose address is not 0; any number of times

    ``addresses`` [experts] (int64, on the device) says where each expert's bytes begin, laid out as
    the layer's ``up_place`` and ``down_place`` say; ``addresses.py`` makes such tables from slots
    and from tensors. Each ``run`` adds its experts' weighted outputs to ``sums`` [tokens, hidden]
    (float32), so experts of elsewhere (on the CPU, on another device) are simply never run.

    Work goes to the current stream, in order; buffers for up to ``tokens`` tokens are allocated
    here, once. Two streams need two runners. ``load`` gives the kernel of a spec, by default
    compiled from its emitted source in ``folder`` at the first launch. Raises InputError when no
    bucket holds ``tokens``.
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
        if layer.up_place is None or layer.down_place is None or layer.shared:
            raise InputError(
                f"layer {layer.name}: this runner takes routed experts at addresses; LayerRunner "
                "runs layers that are stacked in tensors, with their shared expert"
            )
        self.layer, self.tokens = layer, tokens
        self.ladder = sorted(ladder, key=lambda kernels: kernels.bucket)
        kernels_for(layer, self.ladder, tokens)
        used = [kernels for kernels in self.ladder if kernels.bucket[0] <= tokens]
        self._kernels: dict[KernelSpec, Kernel] = {
            spec: load(spec, folder) for kernels in used for spec in kernels.specs()
        }
        self.buffers = layer_buffers(layer, used, tokens, device)
        self._now: LayerKernels | None = None
        self._values: dict[str, Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the runner's buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def begin(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Take the tokens x [tokens, hidden] with their experts ``ids`` (any integer dtype; numbers
        that are not the layer's experts' mean none) and routing ``weights``, both [tokens, top_k],
        and sort them by expert. x is read until the last ``run``. Raises InputError for other
        shapes."""
        layer, tokens = self.layer, len(x)
        self._check(x, ids, weights)
        buffers = self.buffers
        buffers["id_ptr"][:tokens].copy_(ids)
        buffers["routed_weight_ptr"].view(-1, layer.top_k)[:tokens].copy_(weights)
        self._now = now = kernels_for(layer, self.ladder, tokens)
        parts = sort_parts(tokens * layer.top_k)
        self._values = buffers | {
            "num_tokens": tokens,
            "num_slots": tokens * layer.top_k,
            "part_ptr": buffers["part"].view(TORCH_DTYPES[now.down.out]),
            "tokens": x,
            "chunk": SORT_PART,
            "parts": parts,
        }
        if not now.sort.one_launch:
            self._kernels[now.sort]((parts,), self._values, f"{now.sort.name}_count")
        self._launch(now.sort, {})

    def run(self, addresses: Tensor, sums: Tensor) -> None:
        """Add what the experts whose address is not 0 make of the tokens of ``begin`` to ``sums``
        [tokens, hidden], float32 and contiguous. Raises InputError before ``begin``, or for another
        kind of sums."""
        now, layer = self._now, self.layer
        if now is None:
            raise InputError(f"layer {layer.name}: run comes after begin")
        expected = (self._values["num_tokens"], layer.hidden)
        if sums.shape != expected or sums.dtype != torch.float32 or not sums.is_contiguous():
            raise InputError(
                f"layer {layer.name}: found sums {list(sums.shape)} of {sums.dtype}, expected "
                f"contiguous {list(expected)} of torch.float32"
            )
        hidden, part = self.buffers["hidden"], self._values["part_ptr"]
        there = {"expert_at_ptr": addresses}
        self._launch(now.up, there | {"x_ptr": self._values["tokens"], "y_ptr": hidden})
        self._launch(now.down, there | {"x_ptr": hidden, "y_ptr": part})
        self._launch(now.reduce, there | {"y_ptr": sums})

    def _launch(self, spec: KernelSpec, values: dict[str, Any]) -> None:
        grid = grid_of(spec, self._values["num_tokens"], self.layer.top_k)
        self._kernels[spec](grid, {**self._values, **values})

    def _check(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        layer, tokens = self.layer, len(x)
        chosen = (tokens, layer.top_k)
        expected = (tokens, layer.hidden), chosen, chosen, TORCH_DTYPES[layer.x]
        found = tuple(x.shape), tuple(ids.shape), tuple(weights.shape), x.dtype
        if found != expected or tokens > self.tokens or not x.is_contiguous():
            raise InputError(
                f"layer {layer.name}: found x {list(found[0])} of {x.dtype}, ids {list(found[1])} "
                f"and weights {list(found[2])}, expected contiguous [tokens, {layer.hidden}] of "
                f"{expected[3]} and twice [tokens, {layer.top_k}], at most {self.tokens} tokens"
            )
