"""Sizes of grids and buffers that hold for any routing, so that the host need not read counts."""

SORT_PART = 16384
"""Slots that one program of the two-launch sort looks through."""
SORT_ONE_LAUNCH = 8192
"""Up to this many slots every program of the sort counts them all itself."""


def ceil_div(value: int, by: int) -> int:
    """``value / by``, rounded up."""
    return -(-value // by)


def most_tiles(slots: int, experts: int, tile_m: int) -> int:
    """The most row tiles that any routing of ``slots`` over ``experts`` can need.

    The worst case is one slot for every expert but one: cf. triton_kernels' bound on its blocks.
    """
    if slots <= experts:
        return slots
    return ceil_div(slots - experts + 1, tile_m) + experts - 1


def sort_parts(slots: int) -> int:
    """Parts of the two-launch sort."""
    return max(1, ceil_div(slots, SORT_PART))
