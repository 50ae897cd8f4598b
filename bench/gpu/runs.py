"""What came of running whole models, and what it says of the targets."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

LINK_TARGET = 0.85
"""Share of the link's bound in offloaded decode that the CUDA work is to reach on Mixtral."""


@dataclass(frozen=True, slots=True)
class Run:
    """One way to run a model: seconds of all prompts, of a step that only decodes, and, of ours,
    what the simulator says of all and what the link would need for such a step at its measured
    rate. ``same`` is the share of tokens that are plain transformers'."""

    model: str
    place: str
    way: str
    tokens: int = 0
    seconds: float = 0.0
    decode: float = 0.0
    predicted: float = 0.0
    link: float = 0.0
    same: float | None = None
    skipped: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"link_share": self.link_share}

    @property
    def link_share(self) -> float:
        """Link's bound over a measured step: 1 would be a link that is never idle."""
        return self.link / self.decode if self.decode else 0.0


def end_to_end_verdicts(runs: Sequence[Run]) -> list[str]:
    """The target of offloaded decode, and ours against the others in the same place."""
    lines = []
    for run in runs:
        ours = run.way.startswith("dovetail") and run.decode > 0
        if ours and run.place == "offloaded" and run.model.startswith("Mixtral"):
            word = "met" if run.link_share >= LINK_TARGET else "MISSED"
            lines.append(f"{word}: {run.model}: {run.link_share:.0%} of the link's bound")
        for other in runs if ours else ():
            same = (other.model, other.place) == (run.model, run.place)
            if same and not other.way.startswith("dovetail") and other.decode:
                ratio = other.decode / run.decode
                lines.append(f"{run.model}, {run.place}: {run.way} {ratio:.2f} × {other.way}")
    return lines
