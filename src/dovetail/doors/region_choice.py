"""Which implementation of a region is used: measured against the module as it is, and remembered.

A region is a submodule for which there is more than one way to compute the same. The module's own
way, ``eager``, is always measured too, in pairs with every other one, and stays unless another
is clearly faster: so a compiled module is never slower than eager by more than noise.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dovetail.ir import codec
from dovetail.ir.errors import PlanError
from dovetail.ir.record_file import fields, load_record, write_whole
from dovetail.tuning.staleness import Grade, compare, environment_here
from dovetail.tuning_db.database import default_path

EAGER = "eager"
VERSION = 1
LEAST_GAIN = 0.97
"""Another implementation must take at most this share of eager's time, in the median of pairs."""
WON = 0.75
"""And be faster than eager in at least this share of the pairs."""
ROUNDS, ROUND_SECONDS = (3, 15), 0.4
"""Fewest and most rounds of pairs, and the seconds after which no further one begins."""
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Choice:
    """What was measured for ``region``s of one kind at up to ``tokens`` tokens, and what is used.

    ``samples`` has the seconds of every implementation, round by round; ``refused`` those that
    could not be used, and why.
    """

    region: str
    tokens: int
    winner: str
    samples: Mapping[str, tuple[float, ...]]
    refused: Mapping[str, str]
    source: Literal["measured", "stored", "given"] = "measured"

    def ratio(self, name: str) -> float:
        """Median over the rounds of the seconds of ``name`` over those of eager."""
        return _ratio(self.samples[name], self.samples[EAGER])


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """What `dovetail.compile` decided for a module in memory. JSON, and nothing in it is run.

    ``regions`` maps the path of every region to its kind.
    """

    version: int
    module: str
    environment: Mapping[str, str]
    regions: Mapping[str, str]
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()
    """What was not recognised, and why."""

    def digest(self) -> str:
        """Hex sha256 over what was decided: equal decisions, equal digests, whatever the times."""
        decided = sorted((c.region, c.tokens, c.winner) for c in self.choices)
        return codec.digest([self.module, dict(self.regions), [list(d) for d in decided]])


def save_module_plan(plan: ModulePlan, path: Path) -> None:
    """Write the plan; a crash leaves either the old file or the new one."""
    write_whole(json.dumps(fields(plan), indent=1) + "\n", path)


def load_module_plan(path: Path) -> ModulePlan:
    """Read a module's plan; raises PlanError on a file that is missing, malformed or altered."""
    return load_record(path, ModulePlan, VERSION, "module plan", "save_plan(path)")


def bucket_of(tokens: int) -> int:
    """The bucket of a number of tokens: the next power of two."""
    return 1 << max(0, tokens - 1).bit_length()


def measure(kind: str, tokens: int, runs: Mapping[str, Run], refused: Mapping[str, str]) -> Choice:
    """Time ``runs`` (eager among them) side by side and choose."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    least, most = ROUNDS
    # The first round warms caches up and is not counted.
    for number in range(most + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                samples[name].append(time.perf_counter() - start)
        if number >= least and time.perf_counter() - begin > ROUND_SECONDS:
            break
    kept = {name: tuple(seconds) for name, seconds in samples.items()}
    return Choice(kind, tokens, winner(kept), kept, dict(refused))


def winner(samples: Mapping[str, Sequence[float]]) -> str:
    """The implementation with the least median ratio to eager, if it is clearly faster; a tie goes
    to eager, then to the first by name, so that equal samples give equal choices."""
    base = samples[EAGER]
    best = (1.0, EAGER)
    for name in sorted(samples):
        ratio = _ratio(samples[name], base)
        wins = sum(a < b for a, b in zip(samples[name], base, strict=True))
        if name != EAGER and ratio <= LEAST_GAIN and wins >= WON * len(base):
            best = min(best, (ratio, name))
    return best[1]


def _ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(samples, base, strict=True))


class ChoiceStore:
    """Choices of earlier processes, a file per kind of region in the cache folder.

    ``get`` returns a choice with what may be done with it: of this environment it is used, of a
    near one its winner is timed against eager once more, and any other is measured anew.
    """

    def __init__(self) -> None:
        self._folder = default_path().parent / "regions"
        self._here = environment_here()

    def get(self, kind: str, tokens: int) -> tuple[Choice, Grade] | None:
        """The stored choice for regions of this kind and bucket, and how far away it was made."""
        try:
            plan = load_module_plan(self._path(kind))
        except PlanError:
            return None
        grade = compare(plan.environment, self._here).grade
        for choice in plan.choices:
            if choice.tokens == tokens and grade.distance <= Grade.NEAR.distance:
                return replace(choice, source="stored"), grade
        return None

    def put(self, choice: Choice) -> None:
        """Remember a choice; those of another environment make way for it."""
        path = self._path(choice.region)
        kept: list[Choice] = []
        try:
            plan = load_module_plan(path)
            if compare(plan.environment, self._here).grade.distance <= Grade.NEAR.distance:
                kept = [c for c in plan.choices if c.tokens != choice.tokens]
        except PlanError:
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        choices = tuple(sorted([*kept, choice], key=lambda c: c.tokens))
        plan = ModulePlan(VERSION, choice.region, self._here, {}, choices)
        save_module_plan(plan, path)

    def _path(self, kind: str) -> Path:
        return self._folder / f"{codec.digest([kind])[:32]}.json"
