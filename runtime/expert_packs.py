"""Experts with few rows in packs: one product after the other, and all else at once.

An expert on its own takes its rows, activates them and adds them up in about a dozen operators,
whose fixed cost is most of the time where rows are few and matrices small. A pack of consecutive
experts takes, activates and adds up together; only the products stay apart, of the same shapes as
before, so that the outputs are the same to the last bit. They may be one call too (see
``expert_groups``).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.ir.gemm_tiles import tiles
from dovetail.runtime.expert_groups import Groups, Slots
from dovetail.runtime.packed import Packed
from dovetail.runtime.tokens import Routing

Part = Mapping[str, Tensor]
"""The weights of one expert by part."""


def packs(
    experts: Iterable[int], offsets: Sequence[int], most: int, sizes: Sequence[int]
) -> list[list[int]]:
    """Experts with rows, one after the other, in packs of at most ``most`` rows, padded to tiles of
    ``sizes`` (none: not padded); one with more rows than that is a pack of its own, and so is one
    that takes several tiles. Without ``most`` all are on their own."""
    taken = [expert for expert in experts if offsets[expert + 1] > offsets[expert]]
    if not most:
        return [[expert] for expert in taken]
    found: list[list[int]] = []
    room = 0
    for expert in taken:
        rows = offsets[expert + 1] - offsets[expert]
        own = tiles(rows, sizes) if sizes else [rows]
        padded = sum(own) if len(own) == 1 else most + 1
        if padded <= room:
            found[-1].append(expert)
            room -= padded
        else:
            found.append([expert])
            room = most - padded
    return found


@dataclass(frozen=True, slots=True)
class PackRows:
    """Where the rows of a pack are: ``rows`` are tokens and ``weights`` their routing weights, in
    the order of the pack; row i is at ``places[i]`` of the padded input, or at i if it is the same;
    ``ends`` close every expert's padded rows, in the input's order."""

    rows: Tensor
    weights: Tensor
    places: Tensor | None
    ends: list[int]

    @classmethod
    def of(
        cls,
        pack: Sequence[int],
        routing: Routing,
        sizes: Sequence[int],
        order: Sequence[int] | None = None,
    ) -> "PackRows":
        """The rows that the experts of a pack were given; ``order`` are the experts' places in the
        pack as the input has them, one after the other if there is none."""
        offsets = routing.offsets
        counts = [offsets[expert + 1] - offsets[expert] for expert in pack]
        padded = [sum(tiles(count, sizes)) if sizes else count for count in counts]
        ends, at, starts = [], 0, [0] * len(pack)
        for place in order or range(len(pack)):
            starts[place] = at
            at += padded[place]
            ends.append(at)
        shifts, done = [], 0
        for start, count in zip(starts, counts, strict=True):
            shifts.append(start - done)
            done += count
        slices = [slice(offsets[expert], offsets[expert + 1]) for expert in pack]
        if slices[-1].stop - slices[0].start == done:
            slices = [slice(slices[0].start, slices[-1].stop)]
        rows = torch.cat([routing.rows[each] for each in slices])
        weights = torch.cat([routing.weights[each] for each in slices])
        if at == done and not any(shifts):
            return cls(rows, weights, None, ends)
        moved = torch.tensor(shifts).repeat_interleave(torch.tensor(counts))
        return cls(rows, weights, torch.arange(done) + moved, ends)


def run_pack(
    function: Callable[[Tensor, Mapping[str, Packed]], Tensor],
    x: Tensor,
    routing: Routing,
    pack: Sequence[int],
    loaded: Sequence[Part],
    total: Tensor,
    sizes: Sequence[int],
    grouped: bool = False,
) -> None:
    """Add a pack's outputs for the step's tokens ``x [tokens, hidden]`` to ``total``; ``loaded``
    has the experts' weights, ``function`` runs one expert. With ``grouped`` the products of a part
    whose matrices stand at equal distances in memory are one call."""
    slots = Slots.of([next(iter(each.values())) for each in loaded]) if grouped else None
    where = PackRows.of(pack, routing, sizes, slots.order if slots else None)
    groups = None
    if slots is not None:
        loaded = [loaded[place] for place in slots.order]
        groups = Groups(slots, where.ends)
    taken = where.rows
    if where.places is not None:
        # Padding takes some token's rows: what comes of them is dropped.
        taken = torch.zeros(where.ends[-1], dtype=where.rows.dtype)
        taken.index_copy_(0, where.places, where.rows)
    weights = {
        part: Packed([each[part] for each in loaded], where.ends, groups) for part in loaded[0]
    }
    y = function(x.index_select(0, taken), weights)
    if where.places is not None:
        y = y.index_select(0, where.places)
    total.index_add_(0, where.rows, y.to(total.dtype).mul_(where.weights))
