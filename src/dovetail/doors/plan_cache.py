"""Plans per workload bucket, kept in the cache folder, so that a call like an earlier one does not
plan again.

A bucket is a workload rounded up to powers of two. Under ``plans/`` in the folder of the tuning
database every one has a folder with the plan, its task graph, the emitted executor and the
environment that it was made in.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dovetail.capture.captured import Captured, load_captured
from dovetail.ir import codec
from dovetail.ir.errors import BudgetError, InputError, PlanError
from dovetail.ir.plan import Plan, load_plan
from dovetail.ir.workload import Workload
from dovetail.planning import CAPTURE_VERSION, PLAN_FILE, Request
from dovetail.tuning.staleness import Grade, Staleness, compare, environment_here, plan_staleness
from dovetail.tuning_db.database import default_path

log = logging.getLogger(__name__)
ENVIRONMENT_FILE = "environment.json"
ON_STALE = ("verify", "error", "default")
KEPT = (Grade.SAME, Grade.NEAR)
"""Grades of a plan that is used as it is: there is nothing in it that a kernel update changes."""
Planned = tuple[Plan, Captured, Path]
"""A plan, what it is for, and the folder that both are in."""
Maker = Callable[[Request, Path], tuple[Plan, Captured]]
"""Plans a request and leaves the results in a folder."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Workloads that share a plan: at most so many prompts, tokens of one, and new tokens."""

    prompts: int
    longest: int
    new_tokens: int

    @classmethod
    def of(cls, lengths: Sequence[int], new_tokens: Sequence[int], context: int) -> "Bucket":
        """The bucket of these prompts, each number rounded up to a power of two."""
        longest = min(_power(max(lengths)), context - 1)
        new = min(_power(max(new_tokens)), context - max(lengths))
        return cls(_power(len(lengths)), longest, new)

    @property
    def workload(self) -> Workload:
        """The most that the bucket holds."""
        return Workload(((self.longest, self.prompts),), self.new_tokens)

    def holds(self, lengths: Sequence[int], new_tokens: Sequence[int]) -> bool:
        """Whether these prompts are in the bucket, or below it."""
        rows = [a + b for a, b in zip(lengths, new_tokens, strict=True)]
        return (
            len(lengths) <= self.prompts
            and max(lengths) <= self.longest
            and max(rows) <= self.longest + self.new_tokens
        )


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def check_on_stale(on_stale: str) -> str:
    """``on_stale`` itself, if it is a known word. Raises InputError."""
    if on_stale not in ON_STALE:
        raise InputError(f"on_stale={on_stale!r}: expected one of {', '.join(ON_STALE)}")
    return on_stale


class PlanCache:
    """Plans one model under one budget; ``name`` is the digest of the model's weights or config,
    ``request`` what is planned apart from the workload, and ``make`` plans."""

    def __init__(self, name: str, request: Request, on_stale: str, make: Maker) -> None:
        self._name, self._request, self._make = name, request, make
        self._on_stale = check_on_stale(on_stale)
        self._said: set[str] = set()

    def plan(self, workload: Workload) -> Planned:
        """The plan for ``workload``: the one given, one of the cache, or a new one.

        Raises DovetailError where there is none.
        """
        request = replace(self._request, workload=workload)
        if not request.plan:
            return self._searched(request)
        found = self._staleness(load_plan(Path(request.plan)))
        if found.grade in KEPT:
            return self._kept(request)
        return self._stale(request, found)

    def _staleness(self, plan: Plan) -> Staleness:
        if not self._request.machine:
            return plan_staleness(plan)
        from dovetail.machine_files import load_machine

        machine = load_machine(self._request.machine)
        if machine == plan.machine:
            return Staleness(Grade.SAME, ())
        return plan_staleness(plan, machine.silicon)

    def _stale(self, request: Request, found: Staleness) -> Planned:
        """A plan made elsewhere, handled as ``on_stale`` says."""
        what = found.message(request.plan)
        if self._on_stale == "error":
            raise PlanError(f"{what}; plan again here, or pass on_stale='verify'")
        searched = self._searched(replace(request, plan=""))
        if self._on_stale == "default" or found.grade is Grade.FOREIGN:
            self._say(f"{what}; the model is planned anew")
            return searched
        given = self._kept(request)
        chosen = min(given, searched, key=lambda planned: planned[0].prediction.seconds)
        verdict = "it is used" if chosen is given else "the new plan is used"
        self._say(
            f"{what}; predicted here it takes {given[0].prediction.seconds:.3g} s, a new plan "
            f"{searched[0].prediction.seconds:.3g} s: {verdict}"
        )
        return chosen

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)

    def _searched(self, request: Request) -> Planned:
        """The plan of a search, from the cache if one was made in an environment near this."""
        place = self._place(request)
        if found := _cached(place):
            return found
        plan, captured = self._make(request, place)
        _note_environment(place)
        return plan, captured, place

    def _kept(self, request: Request) -> Planned:
        """The given plan's moves with predictions for this machine and workload."""
        place = self._place(request)
        plan, captured = self._make(request, place)
        return plan, captured, place

    def _place(self, request: Request) -> Path:
        given = load_plan(Path(request.plan)).digest() if request.plan else ""
        machine = Path(request.machine)
        described = machine.read_text() if machine.is_file() else request.machine
        key = codec.digest(
            [
                self._name,
                dict(request.budget),
                codec.encode(request.workload),
                request.policy,
                list(request.allow),
                dict(request.knobs or {}),
                described,
                given,
                CAPTURE_VERSION,
            ]
        )
        return default_path().parent / "plans" / key[:32]


def _cached(place: Path) -> Planned | None:
    """What an earlier process left in ``place``, unless it is stale."""
    try:
        then = json.loads((place / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        plan, captured = load_plan(place / PLAN_FILE), load_captured(place)
    except (OSError, ValueError):
        # ValueError covers what is not JSON and, as PlanError, what is not a plan.
        return None
    found = compare(then, environment_here())
    if found.grade in KEPT:
        return plan, captured, place
    log.info("%s; it is made again", found.message(f"the plan in {place}"))
    return None


def _note_environment(place: Path) -> None:
    part = place / f"{ENVIRONMENT_FILE}.part"
    part.write_text(json.dumps(environment_here()) + "\n", encoding="utf-8")
    part.replace(place / ENVIRONMENT_FILE)


def plan_for(
    cache: PlanCache, lengths: Sequence[int], new_tokens: Sequence[int], context: int
) -> tuple[Bucket, Planned]:
    """A bucket that holds these prompts, and its plan.

    Where the budget is too small for the rounded sizes, the bucket is exact. Raises DovetailError.
    """
    rounded = Bucket.of(lengths, new_tokens, context)
    try:
        return rounded, cache.plan(rounded.workload)
    except (BudgetError, PlanError):
        exact = Bucket(len(lengths), max(lengths), max(new_tokens))
        if exact == rounded:
            raise
        return exact, cache.plan(exact.workload)
