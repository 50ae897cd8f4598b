"""What every solver returns."""

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Solved(Generic[T]):
    """An answer and what is known of it: its ``objective``, a ``bound`` that no answer can beat
    (None where none is known), whether it is ``optimal``, only ``feasible``, or the problem is
    ``infeasible``, and the seconds that solving took."""

    value: T
    objective: float
    bound: float | None
    status: Literal["optimal", "feasible", "infeasible"]
    seconds: float
