"""A tuning whose candidates take the seconds that a formula says, for tests of the search."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.ir_cases import captured
from tests.plan_cases import MACHINE, WORKLOAD

from dovetail.ir.moves import Move, Overlap, Prefetch, Split
from dovetail.ir.task_graph import TaskGraph
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.choose import smallest_budget
from dovetail.passes.policies import module_batch
from dovetail.passes.policies.common import Setting
from dovetail.tuning.clock import Clock, Tick
from dovetail.tuning.measure import Pairs, Terms
from dovetail.tuning.rank import Ranker
from dovetail.tuning.residuals import Residuals
from dovetail.tuning.samplers import Sampler, make_sampler
from dovetail.tuning.search import Search
from dovetail.tuning.space import Space, moves_digest
from dovetail.tuning.worker import Answer
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.facts import Key, Protocol, Task, Tuning
from dovetail.tuning_db.trials import Trials

SILICON, SOFTWARE = {"flags": "none"}, {"torch": "0"}


@cache
def graph() -> TaskGraph:
    """A small captured model."""
    return captured("olmoe")


@cache
def setting() -> Setting:
    """A budget in which some schedules fit and others do not."""
    budget = int(2.2 * smallest_budget(graph(), MACHINE, WORKLOAD))
    return Setting(graph(), MACHINE, budget, WORKLOAD)


@cache
def untuned() -> tuple[Move, ...]:
    """What is tuned."""
    knobs = {"seqs": 2, "rows": 2, "attn_tokens": 24, "prefill_tokens": 24, "chunk": 1, "slots": 2}
    made = module_batch.moves(setting(), {**knobs, "workers": 1, "embed": False})
    assert made is not None
    return made


def layout() -> Layout:
    """The untuned schedule."""
    return apply_moves(graph(), untuned())


def space() -> Space:
    """The space around it."""
    return Space.around(setting(), layout())


def seconds(moves: Sequence[Move]) -> float:
    """A time that depends on four knobs, each in its own way; readers 2, slots 3, workers 2 and
    rows 4 are best."""
    found = 1.0
    for move in moves:
        match move:
            case Overlap(workers, _, readers):
                found *= {1: 1.0, 2: 0.85, 4: 0.95}[readers] * {1: 1.0, 2: 0.8}[workers]
            case Prefetch("experts", slots, _):
                found *= 1.0 + 0.05 * abs(slots - 3)
            case Split("attention", "seqs", size):
                found *= 1.0 + 0.04 * abs(math.log2(size / 4))
    return found


@dataclass
class FakeMeasurer:
    """Takes the formula's time on a clock of its own, with no process and no noise but ``noise``,
    which is given the number of the run."""

    formula: Callable[[Sequence[Move]], float] = seconds
    noise: Callable[[int], float] = lambda number: 1.0
    broken: Callable[[Sequence[Move]], str] = lambda moves: ""
    now: float = 0.0
    runs: int = 0
    ran: list[str] = field(default_factory=list)
    typical: float = math.inf

    def clock(self) -> float:
        """Seconds since it began."""
        return self.now

    def default(self) -> float:
        """One run of the default."""
        found = self._run(untuned())
        self.typical = min(self.typical, found)
        return found

    @property
    def wall(self) -> float:
        """Seconds of a run with all that belongs to it."""
        return 1.1 * self.typical

    def pairs(self, moves: Sequence[Move], terms: Terms) -> Pairs:
        """As Measurer does, but nothing is stopped half-way."""
        self.ran.append(moves_digest(moves))
        if why := self.broken(moves):
            self.now += 0.1
            return Pairs(why, [], [], "broken")  # type: ignore[arg-type]
        found = Pairs("ok", [], [], answer=Answer("ok"))
        for number in range(terms.most):
            if number and terms.left() < 2.0:
                break
            found.defaults.append(self.default())
            found.samples.append(self._run(moves))
            if found.ratios[-1] > terms.worth or terms.enough(found.ratios):
                break
        return found

    def _run(self, moves: Sequence[Move]) -> float:
        took = self.formula(moves) * self.noise(self.runs)
        self.runs += 1
        self.now += took
        return took


def key() -> Key:
    """What the trials share."""
    return Key(
        Task("schedule", {"graph": "g"}),
        WORKLOAD,
        Protocol("whole", WORKLOAD, moves_digest(untuned())),
        SILICON,
        SOFTWARE,
    )


def search(
    path: Path,
    budget: float,
    sampler: str = "coordinate",
    seed: int = 0,
    measurer: FakeMeasurer | None = None,
    show: Callable[[Tick], None] = lambda tick: None,
) -> tuple[Search, FakeMeasurer, Database]:
    """A search that is set up and has not begun; its database is open."""
    measurer = measurer or FakeMeasurer()
    measurer.default()
    database = Database.open(path)
    trials = Trials(database)
    tuning = trials.begin(Tuning(SILICON, SOFTWARE, "", sampler, seed, budget))
    made: Sampler = make_sampler(sampler, space(), seed)
    found = Search(
        space(),
        made,
        Ranker(setting(), WORKLOAD, untuned(), Residuals(space(), {})),
        measurer,  # type: ignore[arg-type]
        trials,
        tuning.uid,
        key(),
        Clock(budget, measurer.clock),
        show,
    )
    found.resume()
    found.store_default([measurer.typical])
    return found, measurer, database
