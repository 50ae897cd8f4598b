"""Weights that are in memory already, as units: what the weight store reads from a checkpoint, here
as views of a module's own tensors."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dovetail.ir.errors import CaptureError
from dovetail.ir.placement import dense_weights, embed_weights, experts_of, head_weights
from dovetail.ir.task_graph import Experts, ExpertTensor, TaskGraph, Weight

Tensors = dict[str, Tensor]
STACKED = {
    "gate_up": "gate_up_proj",
    "gate": "gate_up_proj",
    "up": "gate_up_proj",
    "down": "down_proj",
    "gate_up_bias": "gate_up_proj_bias",
    "down_bias": "down_proj_bias",
}
"""Where an expert's tensors are in transformers' stacked experts."""


class MemoryWeights:
    """The tensors of a model in memory, named as in ``state``; ``experts_path`` names the module
    with a layer's routed experts.

    Raises CaptureError if a tensor that the graph reads is missing or of another shape.
    """

    def __init__(
        self, graph: TaskGraph, state: Mapping[str, Tensor], experts_path: Callable[[int], str]
    ) -> None:
        self._graph, self._state, self._experts_path = graph, state, experts_path
        self._units: dict[tuple[str, int, range], list[Tensors]] = {}

    def tensors(self, kind: str, layer: int = -1, experts: range = range(0)) -> list[Tensors]:
        """The tensors of ``embed``, ``head``, ``dense[layer]`` or some of ``experts[layer]``, one
        mapping for every part of the unit."""
        key = (kind, layer, experts)
        if key not in self._units:
            self._units[key] = self._made(kind, layer, experts)
        return self._units[key]

    def rows(self, name: str, rows: Tensor, buffer: memoryview) -> Tensor:
        """The given rows of a matrix: ``[n] -> [n, width]``."""
        weight = next(w for w in embed_weights(self._graph) if w.fqn == name)
        return self._weight(weight, -1).index_select(0, rows)

    def _made(self, kind: str, layer: int, experts: range) -> list[Tensors]:
        if kind == "experts":
            spec = experts_of(self._graph, layer)
            assert spec is not None
            return [
                {t.part: self._expert(t, layer, e, spec) for t in spec.tensors} for e in experts
            ]
        weights: Mapping[str, tuple[Weight, ...]] = {
            "embed": embed_weights(self._graph),
            "head": head_weights(self._graph),
            "dense": dense_weights(self._graph.body(layer)) if layer >= 0 else (),
        }
        return [{w.fqn: self._weight(w, layer) for w in weights[kind]}]

    def _weight(self, weight: Weight, layer: int) -> Tensor:
        return self._checked(weight.fqn.format(layer=layer), weight.shape, weight.dtype)

    def _expert(self, tensor: ExpertTensor, layer: int, expert: int, spec: Experts) -> Tensor:
        name = f"{self._experts_path(layer)}.{STACKED.get(tensor.part, tensor.part)}"
        stacked = self._state.get(name)
        if stacked is None or stacked.shape[0] != spec.count:
            found = "missing" if stacked is None else f"of shape {list(stacked.shape)}"
            raise CaptureError(
                f"{name} is {found}, expected the stacked weights of {spec.count} experts"
            )
        one = stacked.detach()[expert]
        if tensor.part in ("gate", "up"):
            one = one.chunk(2, 0)[tensor.part == "up"]
        if tuple(one.shape) != tuple(tensor.shape):
            raise CaptureError(
                f"{name} has experts of shape {list(one.shape)}, expected {list(tensor.shape)}"
            )
        return one

    def _checked(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        found = self._state.get(name)
        if found is None or tuple(found.shape) != tuple(shape):
            what = "missing" if found is None else f"of shape {list(found.shape)}"
            raise CaptureError(f"{name} is {what}, expected shape {list(shape)}")
        wanted = getattr(torch, dtype)
        return found.detach() if found.dtype == wanted else found.detach().to(wanted)
