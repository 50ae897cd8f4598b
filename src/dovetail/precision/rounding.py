"""Experts in fewer bits, one after the other: `checkpoint, layer -> tensors and their errors`."""

import math
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from dovetail.codegen.kernels.quantise import pack, unpack
from dovetail.ir.errors import CheckpointError
from dovetail.ir.kernel_parts import Weights
from dovetail.ir.moves import ExpertFormat
from dovetail.ir.placement import experts_of
from dovetail.ir.task_graph import SCALE, Experts, TaskGraph
from dovetail.passes.expert_precision import weights_of
from dovetail.runtime.direct_io import Reader
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.weight_store import Tensors, WeightStore

PIECE_VALUES = 1 << 17
"""Weights of a matrix that a thread rounds at a time: what it makes of them stays in the caches."""


@dataclass(frozen=True, slots=True)
class RoundedExpert:
    """One expert's converted tensors by part, and of each matrix ``||W - W'|| / ||W||``.

    What is not a matrix lies in the reader's buffer, until the next expert is read.
    """

    tensors: Tensors
    errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some outputs of a matrix as they are stored; the squares of what was lost, and of all."""

    stored: Tensor
    scales: Tensor
    lost: float
    norm: float


class Rounding:
    """Reads a checkpoint's routed experts and rounds them, a piece of a matrix a thread."""

    def __init__(self, graph: TaskGraph, index: CheckpointIndex, form: ExpertFormat) -> None:
        self._graph, self._index = graph, index
        self._weights = weights_of(form)
        self._reader = Reader()
        # Operators on pieces gain nothing from threads of their own.
        self._pool = ThreadPoolExecutor(
            len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,)
        )

    def experts(self, layer: int) -> Iterator[RoundedExpert]:
        """The experts of a layer in order. Raises CheckpointError for weights that cannot be read
        or are not finite."""
        experts = experts_of(self._graph, layer)
        assert experts is not None
        # A store of the layer's own, since it remembers every unit that it was asked for.
        store = WeightStore(self._graph, self._index, self._reader)
        buffer = memoryview(b"")
        for expert in range(experts.count):
            unit = store.unit("experts", layer, range(expert, expert + 1))
            if len(buffer) < unit.nbytes:
                buffer = memoryview(mmap.mmap(-1, unit.nbytes))
            [source] = store.read(unit, buffer, streamed=False)
            yield self._rounded(experts, source, f"expert {expert} in layer {layer}")

    def _rounded(self, experts: Experts, source: Tensors, name: str) -> RoundedExpert:
        made: Tensors = {}
        errors: list[float] = []
        for tensor in experts.tensors:
            matrix = source[tensor.part]
            if len(tensor.shape) != 2:
                made[tensor.part] = matrix
                continue
            if experts.transposed or tensor.transposed:
                matrix = matrix.T
            stored, scales, error = rounded_matrix(matrix, self._weights, self._pool)
            if not math.isfinite(error):
                raise CheckpointError(
                    f"{self._index.directory}: {tensor.part} of {name} holds infinities or NaN, "
                    "expected finite weights; the files are damaged: download the checkpoint again"
                )
            made |= {tensor.part: stored, tensor.part + SCALE: scales}
            errors.append(error)
        return RoundedExpert(made, tuple(errors))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        # The pool's threads have set the number of threads to come, too: undo it.
        torch.set_num_threads(torch.get_num_threads())
        self._reader.close()


def rounded_matrix(
    matrix: Tensor, weights: Weights, pool: ThreadPoolExecutor
) -> tuple[Tensor, Tensor, float]:
    """``matrix [outputs, inputs]`` as ``quantise.pack`` stores it, its scales, and its error
    ``||W - W'|| / ||W||``, which is not finite if the matrix is not.

    Outputs have scales of their own, so that some of them are like a matrix of its own.
    """
    rows = max(1, PIECE_VALUES // matrix.shape[1])
    # Turned, if at all, once they are together: elements that lie in rows are rounded faster.
    round_piece = partial(_round, weights=replace(weights, order="nk"))
    pieces = list(pool.map(round_piece, torch.split(matrix, rows)))
    stored = torch.cat([p.stored for p in pieces])
    scales = torch.cat([p.scales for p in pieces])
    norm = sum(p.norm for p in pieces)
    error = math.sqrt(sum(p.lost for p in pieces) / norm) if norm else 0.0
    return stored.T.contiguous() if weights.order == "kn" else stored, scales, error


def _round(matrix: Tensor, weights: Weights) -> _Piece:
    stored, scales = pack(matrix[None], weights)
    assert scales is not None
    lost = unpack(stored, scales, weights)[0].sub_(matrix).square_().sum()
    return _Piece(stored[0], scales[0], float(lost), float(matrix.double().square_().sum()))
