"""The budget of a tuning in wall seconds, and what there is to show after a trial."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True)
class Clock:
    """Wall seconds of a budget."""

    budget: float
    now: Callable[[], float] = time.monotonic
    begin: float = field(init=False)

    def __post_init__(self) -> None:
        self.begin = self.now()

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return self.now() - self.begin

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.budget - self.spent


@dataclass(frozen=True, slots=True)
class Tick:
    """What there is to show after a trial; ``best`` is its ratio to the untuned plan's time."""

    trial: int
    timed: int
    ruled_out: int
    best: float
    spent: float
    text: str
    phase: Literal["search", "gate"] = "search"
