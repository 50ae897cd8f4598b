"""First-fit allocation of token ranges in the KV store."""


class TokenSpace:
    """A range of ``size`` tokens that is taken in parts; neighbouring free parts merge, but not
    over the ``wall``, which no part crosses."""

    def __init__(self, size: int, wall: int = 0) -> None:
        self._wall = wall
        self._free = [part for part in ((0, wall), (wall, size - wall)) if part[1]]

    def take(self, size: int) -> int | None:
        """The start of a free part of ``size`` tokens, now taken; None if there is none."""
        for i, (start, length) in enumerate(self._free):
            if length >= size:
                rest = [(start + size, length - size)] if length > size else []
                self._free[i : i + 1] = rest
                return start
        return None

    def largest(self) -> int:
        """Tokens of the largest free part."""
        return max((length for _, length in self._free), default=0)

    def give(self, start: int, size: int) -> None:
        """Give a part back."""
        merged: list[tuple[int, int]] = []
        for begin, length in sorted([*self._free, (start, size)]):
            if merged and merged[-1][0] + merged[-1][1] == begin != self._wall:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((begin, length))
        self._free = merged
