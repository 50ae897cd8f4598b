"""How far the cost model is off, with and without corrections."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dovetail.ir.moves import Move
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.simulate import Simulator
from dovetail.runtime import calibrate_host
from dovetail.tuning.job import TuneJob
from dovetail.tuning.known import moves_of
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.facts import Trial
from dovetail.tuning_db.trials import Trials
from dovetail.tuning_db.winners import pooled

Factors = Mapping[str, float]


def predicted_untuned(
    job: TuneJob, moves: tuple[Move, ...], corrections: Mapping[str, Factors]
) -> dict[str, float]:
    """Seconds of the untuned plan's moves on the sample, by the name of the corrections."""
    return {name: _predicted(job, moves, each) for name, each in corrections.items()}


def rows_of(place: Path, job: TuneJob) -> list[Trial]:
    """The rows of all of a cell's tunings on the job's sample, whatever code made them."""
    found = []
    for db in sorted(place.glob("*.db")):
        with Database.open(db) as opened:
            trials = Trials(opened)
            for key in trials.keys_of(job.key.task, job.key.workload, job.key.source):
                if key.protocol.sample == job.key.protocol.sample:
                    found += trials.of(key)
    return found


def errors_of_trials(
    job: TuneJob, rows: Sequence[Trial], corrections: Mapping[str, Factors]
) -> tuple[dict[str, float], int]:
    """The median of |measured / predicted - 1| over all schedules that ran, by the name of the
    corrections, and how many schedules they are."""
    ran = [trial for trial in pooled(rows) if trial.state == "ok"]
    found = {}
    for name, each in corrections.items():
        off = [
            abs(statistics.median(trial.samples) / _predicted(job, moves_of(trial), each) - 1)
            for trial in ran
        ]
        found[name] = statistics.median(off)
    return found, len(ran)


def _predicted(job: TuneJob, moves: tuple[Move, ...], corrections: Factors) -> float:
    machine = replace(job.untuned.machine, corrections=corrections)
    found = Simulator(apply_moves(job.graph, moves), machine, Costs(machine))
    prediction = found.predict(job.sample.workload)
    return prediction.seconds - prediction.setup_seconds * (1 - job.share)


def correction_of(place: Path, graph: str) -> dict[str, float]:
    """The median factors of a cell's tunings."""
    found = []
    for db in sorted(place.glob("*.db")):
        with Database.open(db) as opened:
            each = Trials(opened).latest_correction(
                calibrate_host.silicon(), calibrate_host.software(), graph
            )
        found += [each.factors] if each else []
    names = {name for each in found for name in each}
    return {name: statistics.median(each.get(name, 1.0) for each in found) for name in names}
