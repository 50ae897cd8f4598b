"""Experts as an executor keeps them: in slots, in no order, some of them not there."""

import torch
from torch import Tensor

from dovetail.codegen.kernels.addresses import slot_addresses
from dovetail.ir.kernel_parts import DTYPE_BYTES
from dovetail.ir.kernel_spec import GemmSpec


def expert_elements(specs: list[GemmSpec]) -> int:
    """Elements of one expert that holds what these GEMMs read, to a whole number of 16 bytes."""
    most = 0
    for spec in specs:
        assert spec.place is not None
        share = spec.outputs // len(spec.place.matrices)
        most = max(most, *(at + share * spec.k for at in spec.place.matrices))
        most = max(most, *(at + share for at in spec.place.biases), 0)
    unit = 16 // DTYPE_BYTES[specs[0].x]
    return -(-most // unit) * unit


def put(expert: Tensor, spec: GemmSpec, matrix: Tensor, bias: Tensor | None) -> None:
    """Write a matrix [outputs, inputs] and bias [outputs] of an expert where the spec reads them.

    ``expert`` is one flat slot of the weights' dtype.
    """
    assert spec.place is not None
    halves = matrix.chunk(len(spec.place.matrices))
    for at, half in zip(spec.place.matrices, halves, strict=True):
        stored = half.T if spec.weights.order == "kn" else half
        expert[at : at + half.numel()] = stored.reshape(-1)
    if bias is not None:
        for at, part in zip(spec.place.biases, bias.chunk(len(halves)), strict=True):
            expert[at : at + part.numel()] = part


def taken(expert: Tensor, spec: GemmSpec) -> tuple[Tensor, Tensor | None]:
    """The matrix [outputs, inputs] and bias [outputs] that the spec reads from an expert's flat
    slot: what ``put`` wrote."""
    assert spec.place is not None
    share = spec.outputs // len(spec.place.matrices)
    parts = [expert[at : at + share * spec.k] for at in spec.place.matrices]
    turned = spec.weights.order == "kn"
    matrix = torch.cat(
        [p.view(spec.k, share).T if turned else p.view(share, spec.k) for p in parts]
    )
    if not spec.bias:
        return matrix, None
    share = spec.outputs // len(spec.place.biases)
    return matrix, torch.cat([expert[at : at + share] for at in spec.place.biases])


def scattered(count: int, elements: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A pool [slots, elements] with two slots more than experts, and the slot of each expert, int32
    [count]; the last expert has none (-1) where there are two or more."""
    pool = torch.full((count + 2, elements), torch.nan, dtype=dtype, device=device)
    slots = torch.randperm(count + 2)[:count].to(torch.int32)
    if count > 1:
        slots[-1] = -1
    return pool, slots.to(device)


def placed_weights(
    spec: GemmSpec, matrix: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, list[int]]:
    """The pool with all experts of ``matrix`` [experts, outputs, inputs], the table of their
    addresses, and which experts are not there."""
    elements = expert_elements([spec])
    pool, slots = scattered(spec.experts, elements, matrix.dtype, str(matrix.device))
    for expert, slot in enumerate(slots.tolist()):
        if slot >= 0:
            put(pool[slot], spec, matrix[expert], None if bias is None else bias[expert])
    stride = elements * DTYPE_BYTES[spec.x]
    absent = [expert for expert, slot in enumerate(slots.tolist()) if slot < 0]
    return pool, slot_addresses(pool, stride, slots), absent
