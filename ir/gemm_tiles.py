"""Row counts of 16-bit matrix products: which tiles cover how many rows.

For every shape that it meets, oneDNN generates code and keeps it: about 0.75 MB and 2 ms each,
measured in torch 2.13 for bfloat16. Rows are therefore cut into tiles of few sizes, the last one
padded, so that a run with ever-changing batches meets few shapes and its memory can be planned.
"""

from collections.abc import Sequence

LADDERS = (
    (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256),
    (8, 16, 32, 64, 96, 128, 256),
    (8, 32, 96, 256),
    (16, 128),
    (32,),
)
"""Tile sizes to choose from, finest first: finer ones pad less and keep more generated code. A tile
of 256 rows runs at the full rate already."""


def tiles(rows: int, sizes: Sequence[int]) -> list[int]:
    """Tile sizes that cover ``rows``, out of ascending ``sizes``: whole ones of the largest, then
    the smallest that holds the rest, or two where the second lets the first be much smaller."""
    largest = sizes[-1]
    found = [largest] * (rows // largest)
    rest = rows % largest
    if not rest:
        return found
    above = next(size for size in sizes if size >= rest)
    below = max((size for size in sizes if size < rest), default=0)
    if below:
        second = next(size for size in sizes if size >= rest - below)
        # Two calls instead of one are worth it from an eighth of the rows saved.
        if below + second <= above * 7 // 8:
            return [*found, below, second]
    return [*found, above]
