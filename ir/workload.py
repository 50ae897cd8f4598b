"""The workload: what is to be done."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dovetail.ir import codec


@dataclass(frozen=True, slots=True)
class Routing:
    """How often tokens of a routing trace chose each expert: ``loads[i]`` are the choices of layer
    i's experts, empty where a layer has none. ``name`` and ``digest`` say which trace it is."""

    name: str
    digest: str
    tokens: int
    loads: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of these lengths (tokens), each continued by at most ``new_tokens``.

    ``lengths`` holds (length, how many prompts), longest first, so that thousands of prompts
    stay a short record. ``routing`` are traces of such prompts; without any, routing is taken as
    uniform.
    """

    lengths: tuple[tuple[int, int], ...]
    new_tokens: int
    routing: tuple[Routing, ...] = field(default=(), metadata=codec.LATER)

    def __post_init__(self) -> None:
        if not self.lengths or any(n < 1 or count < 1 for n, count in self.lengths):
            raise ValueError(
                f"a workload needs prompts of at least one token, found {self.lengths}"
            )
        if self.new_tokens < 1:
            raise ValueError(f"new_tokens must be at least 1, found {self.new_tokens}")
        if list(self.lengths) != sorted(set(self.lengths), reverse=True):
            raise ValueError("lengths of a workload must be distinct and longest first")

    @classmethod
    def of(cls, lengths: Sequence[int], new_tokens: int) -> "Workload":
        """The workload of prompts with these lengths."""
        counts: dict[int, int] = {}
        for length in lengths:
            counts[length] = counts.get(length, 0) + 1
        return cls(tuple(sorted(counts.items(), reverse=True)), new_tokens)

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return sum(count for _, count in self.lengths)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(length * count for length, count in self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.lengths[0][0]

    def each(self) -> list[int]:
        """The length of every prompt, longest first."""
        return [length for length, count in self.lengths for _ in range(count)]
