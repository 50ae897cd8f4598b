"""What a step of a GPU plan processes, and the loop over layers that it becomes: plain records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dovetail.passes.gpu.cost import Shape
from dovetail.solvers.loop_problem import LoopProblem

TICK = 1e-6
"""Seconds of one tick of the loop problem."""
Order = Mapping[str, tuple[tuple[str, int], ...]]
"""For every engine its operations in order, each with how many iterations it runs ahead."""


@dataclass(frozen=True, slots=True)
class StepGroup:
    """A group of sequences of a step that is to run, by the kind of its attention; ``layers`` are
    the first that it takes and that at which it stops (None: all)."""

    kind: str
    shape: Shape
    layers: tuple[int, int] | None = None

    def takes(self, layer: int) -> bool:
        """Whether the group goes through ``layer``."""
        return self.layers is None or self.layers[0] <= layer < self.layers[1]


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step processes: in decode ``seqs`` sequences with ``past`` tokens before; in prefill
    ``seqs`` prompts of ``q_len`` tokens. A mixed step has both; with ``layer_groups`` its prompts
    take only one of so many groups of layers (layered prefill). ``groups`` are those of a step that
    is to run; a step that is only predicted has groups of equal size."""

    decode: Shape | None
    prefill: Shape | None
    layer_groups: int = 1
    groups: tuple[StepGroup, ...] = ()

    @classmethod
    def of(cls, groups: tuple[StepGroup, ...]) -> "StepWork":
        """The work of these groups, all prompts as long as the longest."""
        parts = [[g.shape for g in groups if (g.kind == "prefill") is p] for p in (False, True)]
        decode, prefill = (
            Shape(sum(s.seqs for s in p), max(s.q_len for s in p), max(s.past for s in p))
            if p
            else None
            for p in parts
        )
        return cls(decode, prefill, 1, groups)

    @property
    def kind(self) -> Literal["decode", "prefill", "mixed"]:
        """What the step does."""
        if self.decode and self.prefill:
            return "mixed"
        return "decode" if self.decode else "prefill"

    @property
    def tokens(self) -> int:
        """New tokens of the step."""
        return sum(s.seqs * s.q_len for s in (self.decode, self.prefill) if s)

    @property
    def seqs(self) -> int:
        """Sequences that get a token."""
        return sum(s.seqs for s in (self.decode, self.prefill) if s)


@dataclass(frozen=True, slots=True)
class Loop:
    """The body of one kind of layer, the engines' order, what each operation is called in a
    timeline, the bytes that each link moves, and those of each operation that reads or copies."""

    problem: LoopProblem
    order: Order
    classes: Mapping[str, str]
    nbytes: Mapping[str, float]
    sizes: Mapping[str, float] = field(default_factory=dict)

    def loads(self) -> dict[str, float]:
        """Busy seconds of every engine in one iteration."""
        busy: dict[str, float] = {}
        for op in self.problem.ops:
            busy[op.engine] = busy.get(op.engine, 0.0) + op.duration * TICK
        return busy
