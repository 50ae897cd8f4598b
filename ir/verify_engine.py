"""The state of engines and rings in an abstract execution, and how its errors name a place."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from dovetail.ir.errors import VerifyError
from dovetail.ir.notation import instruction_text, unit_text
from dovetail.ir.program import Flat, Free, Load, Ring

Clock = list[int]
"""By engine number, how many of its events are known to have happened."""
Unit = tuple[str, int, int]
"""Kind, layer (-1 outside of layers) and chunk of what is in a buffer."""


@dataclass(slots=True)
class Engine:
    """An engine's place in its list and what it knows. ``at`` is the step, the place in the step's
    list and the instruction; ``met`` its clock when it last waited for a phase; ``held`` the load
    of each ring that it has waited for and not freed. Of a ring that it loads, ``room`` is the load
    that room was last waited for, ``loading`` the one it has made and not signalled, and ``loads``
    counts those that it has signalled."""

    name: str
    number: int
    items: Iterator[tuple[int, int, Flat]]
    clock: Clock
    at: tuple[int, int, Flat] | None = None
    held: dict[str, Unit] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    frees: dict[str, int] = field(default_factory=dict)
    signalled: dict[str, int] = field(default_factory=dict)
    awaited: dict[str, int] = field(default_factory=dict)
    met: dict[str, Clock] = field(default_factory=dict)
    room: dict[str, int] = field(default_factory=dict)
    loading: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    ended: bool = False
    """Whether it has signalled the end of the step."""

    @property
    def step(self) -> int:
        """The step that it is in."""
        assert self.at is not None
        return self.at[0]

    def join(self, clock: Clock) -> None:
        """Learn what was known at ``clock``."""
        self.clock = [max(mine, other) for mine, other in zip(self.clock, clock, strict=True)]

    def place(self) -> str:
        """Where it is: ``cpu0 at run(prologue, ram) (step 0, instruction 0)``."""
        assert self.at is not None
        step, number, item = self.at
        if number < 0:
            return f"{self.name} at the start of step {step}"
        return f"{self.name} at {instruction_text(item)} (step {step}, instruction {number})"

    def error(self, text: str) -> VerifyError:
        """An error at its place."""
        return VerifyError(f"{self.place()}: {text}")


@dataclass(slots=True)
class RingState:
    """The loads of a ring so far, by number: what they brought, when they were ready, and when
    which worker freed them."""

    spec: Ring
    loads: dict[int, Unit] = field(default_factory=dict)
    ready: dict[int, Clock] = field(default_factory=dict)
    freed: dict[int, dict[int, Clock]] = field(default_factory=dict)

    def live(self, workers: int) -> list[str]:
        """Loads that not every worker has freed."""
        return [text_of(self.loads[n]) for n in sorted(self.loads) if len(self.freed[n]) < workers]


def unit_of(item: Load | Free) -> Unit:
    """The unit that a load brings or a free gives back."""
    if item.ring == "head":
        return ("head", -1, 0)
    return (item.ring, item.layer, item.chunk if item.ring == "experts" else 0)


def text_of(unit: Unit) -> str:
    """A unit as it is written."""
    return unit_text(*unit)
