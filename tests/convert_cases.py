"""What tests of converted experts share: tiny checkpoints in 16 bits, and a decoder of the formats
that is nothing but their definition."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests import families
from tests.e2e import support
from torch import Tensor

from dovetail.checkpoint import ModelFolder
from dovetail.ir.moves import ExpertFormat
from dovetail.ir.placement import experts_of
from dovetail.ir.task_graph import Experts, ExpertTensor, TaskGraph
from dovetail.passes.expert_precision import GROUP

LARGEST = {"int8": 127, "int4": 7}


@dataclass(frozen=True)
class Source:
    """A checkpoint in a folder of its own, and its task graph."""

    folder: ModelFolder
    graph: TaskGraph

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.folder.path

    def out(self, name: str) -> Path:
        """A place beside it."""
        return self.path.parent / name


def tiny_source(place: Path, family: str, **options: Any) -> Source:
    """A random model that computes in bfloat16; ``options`` differ from the tests' usual sizes."""
    if options:
        model = support.tiny_model(family, torch.bfloat16, **options)
    else:
        model = families.tiny_model(family).bfloat16()
    tiny = support.save_tiny(model, place / family)
    return Source(ModelFolder.open(tiny.folder), tiny.captured.graph)


def expert_layers(graph: TaskGraph) -> Iterator[tuple[int, Experts]]:
    """The layers that have routed experts."""
    for layer in range(len(graph.layers)):
        if (experts := experts_of(graph, layer)) is not None:
            yield layer, experts


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, as safetensors' own reader gives them."""
    return {
        key: tensor
        for path in folder.glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }


def source_tensor(
    weights: Mapping[str, Tensor], spec: Experts, tensor: ExpertTensor, layer: int, expert: int
) -> Tensor:
    """One expert's tensor of the checkpoint, a matrix as ``[outputs, inputs]``."""
    found = weights[tensor.key.format(layer=layer, expert=expert)]
    if tensor.stacked:
        found = found.view(spec.count, *tensor.shape)[expert]
    turned = len(tensor.shape) == 2 and (spec.transposed or tensor.transposed)
    return found.T if turned else found


def decoded(elements: Tensor, scales: Tensor, form: ExpertFormat) -> tuple[Tensor, Tensor]:
    """The matrix ``[outputs, inputs]`` that a converted one stands for, in float64, and the scale
    of each of its elements."""
    if form == "int8":
        return elements.T.double() * scales.double()[:, None], scales.double()[:, None]
    low, high = (elements & 15).double() - 8, (elements >> 4).double() - 8
    wide = scales.double().repeat_interleave(GROUP, 1)
    return torch.cat([low, high], 1) * wide, wide


def relative_error(matrix: Tensor, rounded: Tensor) -> float:
    """``||W - W'|| / ||W||``."""
    return float((matrix.double() - rounded).norm() / matrix.double().norm())
