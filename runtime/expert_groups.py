"""A pack's matrices as one stack, where they stand at equal distances in memory.

Experts that were read together do: in a checkpoint one follows the other, though often in the order
of their names (0, 1, 10, 11, 2), and experts without rows leave gaps. ``grouped_mm`` then takes the
products of a pack in one call, without a copy of a weight: on a CPU torch multiplies one group
after the other, of the same shapes as before, so that outputs are the same to the last bit and
oneDNN meets no shape that it would not meet otherwise; what is saved is the way there and back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

GROUPED = (torch.float32, torch.bfloat16, torch.float16)
"""The types of ``grouped_mm``."""
WORD = 16
"""Rows have to be whole words of so many bytes."""
FEWEST = 12
"""With fewer products in a call, finding out where the matrices are takes what the call saves: half
a microsecond for each of 64 products (256 x 128, bf16, Zen 5), less than nothing for each of 8."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Where the experts of a pack stand: ``order`` are their places in the pack as memory has
    them, ``numbers`` the slots that they have there, out of ``count`` of one size."""

    order: list[int]
    numbers: list[int]
    count: int

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> "Slots | None":
        """The slots of a pack's matrices of one part; None for fewer than FEWEST, for a type that
        ``grouped_mm`` has not (weights in fewer bits), for matrices at unequal distances, and where
        more slots would be empty than taken: an empty one takes nearly the time that a product in
        a group saves."""
        if len(weights) < FEWEST or weights[0].dtype not in GROUPED:
            return None
        addresses = [weight.data_ptr() for weight in weights]
        order = sorted(range(len(addresses)), key=addresses.__getitem__)
        apart = [addresses[b] - addresses[a] for a, b in pairwise(order)]
        size = min(apart)
        if not size or any(step % size for step in apart):
            return None
        numbers = [0]
        for step in apart:
            numbers.append(numbers[-1] + step // size)
        count = numbers[-1] + 1
        return cls(order, numbers, count) if count <= 2 * len(weights) else None


class Groups:
    """The slots of a pack whose experts, in the order of memory, have their last rows before
    ``ends``."""

    def __init__(self, slots: Slots, ends: Sequence[int]) -> None:
        self._slots = slots
        filled, at = [0] * slots.count, 0
        for number, end in zip(slots.numbers, ends, strict=True):
            filled[number] = end
        for number, end in enumerate(filled):
            at = filled[number] = end or at
        self._ends = torch.tensor(filled, dtype=torch.int32)

    def linear(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor | None:
        """``x [rows, in]`` -> ``[rows, out]``, each group's rows with its matrix ``[out, in]``;
        None if ``grouped_mm`` does not take these, by their type, shape and place."""
        stack = self._stack(weights)
        if stack is None or x.dtype != stack.dtype or not x.is_contiguous() or not _words(x):
            return None
        return F.grouped_mm(x, stack.transpose(1, 2), offs=self._ends)

    def _stack(self, weights: Sequence[Tensor]) -> Tensor | None:
        """``[slots, out, in]`` over the matrices and what is between them; None if they are not at
        this pack's slots."""
        first, numbers = weights[0], self._slots.numbers
        if first.dim() != 2 or not _words(first):
            return None
        base, item = first.data_ptr(), first.element_size()
        size = (weights[1].data_ptr() - base) // numbers[1]
        places = (base + number * size for number in numbers)
        if (
            size <= 0
            or size % item
            or any(w.data_ptr() != at for w, at in zip(weights, places, strict=True))
        ):
            return None
        shape = (self._slots.count, *first.shape)
        strides = (size // item, *first.stride())
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if (first.storage_offset() + last + 1) * item > first.untyped_storage().nbytes():
            return None
        return first.as_strided(shape, strides)


def _words(matrix: Tensor) -> bool:
    """Whether a matrix is dense in one of its axes and steps along the other by whole words."""
    short, long = sorted(matrix.stride())
    return short == 1 and long * matrix.element_size() % WORD == 0
