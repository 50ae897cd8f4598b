"""What the tuning bench finds in a cell, and all cells as a table."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NEAR = 1.02
"""A schedule within this factor of the best known counts as found."""
AIM = 1.03
"""What is exported should be within this factor of the best known."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one sampler found in a cell. ``ratio`` is that of the plan it exported to the untuned
    one in the race, with its interval, ``against_best`` that of the exported plan to the best
    known; ``found`` is the ratio of its best schedule, exported or not. ``near_trials`` and
    ``near_seconds`` are what it took to a schedule that the race found within NEAR of the best
    known: None if it had none."""

    sampler: str
    outcome: str
    reason: str
    timed: int
    ratio: float
    low: float
    high: float
    against_best: float
    found: float
    near_trials: int | None
    near_seconds: float | None


@dataclass(frozen=True, slots=True)
class Cell:
    """A checkpoint under a budget. ``others_cores`` is what else kept the machine busy.

    ``predicted`` has seconds of the untuned plan, by the machine's curves and with corrections of
    this cell (``own``) and of the checkpoint's other budget (``others``); ``trial_errors`` the
    median error, as a share, over all schedules that were timed.
    """

    checkpoint: str
    share: float
    budget: int
    workload: str
    seconds: float
    sample: tuple[int, int]
    untuned_seconds: float
    untuned_tokens_per_second: float
    best_tokens_per_second: float
    best_ratio: float
    others_cores: float
    samplers: tuple[Sampled, ...]
    factors: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    trial_errors: Mapping[str, float] = field(default_factory=dict)
    trials: int = 0


def table(cells: Sequence[Cell]) -> str:
    """All cells as Markdown."""
    lines = [
        "| checkpoint | ram | untuned tok/s | best tok/s | others, cores | sampler | outcome "
        "| exported ÷ untuned | exported ÷ best known | found ÷ best known | timed "
        "| to within 2 %: trials, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        for s in cell.samplers:
            near = f"{s.near_trials}, {s.near_seconds:.0f}" if s.near_seconds is not None else "-"
            lines.append(
                f"| {cell.checkpoint} | {cell.budget / 1e6:.0f} MB | "
                f"{cell.untuned_tokens_per_second:.1f} | {cell.best_tokens_per_second:.1f} | "
                f"{cell.others_cores:.2f} | {s.sampler} | {s.outcome} | "
                f"{s.ratio:.3f} [{s.low:.3f}, {s.high:.3f}] | {s.against_best:.3f} | "
                f"{s.found / cell.best_ratio:.3f} | {s.timed} | {near} |"
            )
    lines += [_aim(cells), *_errors(cells)]
    return "\n".join(lines)


def _aim(cells: Sequence[Cell]) -> str:
    found = []
    for name in {s.sampler: None for cell in cells for s in cell.samplers}:
        of = [(c, s) for c in cells for s in c.samplers if s.sampler == name]
        close = sum(s.found <= AIM * c.best_ratio for c, s in of)
        exported = sum(s.against_best <= AIM for _, s in of)
        found.append(f"{name} {close} and {exported} of {len(of)}")
    return (
        "\nCells in which the best schedule found, and what was exported, are within 3 % of the "
        "best known: " + "; ".join(found)
    )


def _errors(cells: Sequence[Cell]) -> list[str]:
    lines = []
    for name in ("curves", "own", "others"):
        off = [abs(c.untuned_seconds / c.predicted[name] - 1) for c in cells if name in c.predicted]
        if off:
            lines.append(
                f"\nPrediction of the untuned plan, {name}: median error "
                f"{statistics.median(off):.1%} over {len(off)} cells"
            )
    for name in ("curves", "others"):
        off = [c.trial_errors[name] for c in cells if name in c.trial_errors]
        if off:
            lines.append(
                f"\nPrediction of all {sum(c.trials for c in cells)} schedules timed, {name}: "
                f"median over the cells of their median error {statistics.median(off):.1%}"
            )
    return lines
