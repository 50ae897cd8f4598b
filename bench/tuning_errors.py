"""How far the cost model is off for an untuned plan, with and without corrections."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dovetail.ir.machine import Machine
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.simulate import Simulator
from dovetail.runtime import calibrate_host
from dovetail.tuning.job import TuneJob
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.trials import Trials


def errors(
    job: TuneJob,
    measured: Sequence[float],
    place: Path,
    before: Sequence[Mapping[str, float]],
) -> dict[str, float]:
    """Measured over predicted seconds of the untuned plan, less 1."""
    plain = replace(job.untuned.machine, corrections={})
    own = correction_of(place, job.untuned.graph)
    machines = {"curves": plain, "own": replace(plain, corrections=own)}
    if before:
        names = {name for each in before for name in each}
        others = {n: statistics.median(e.get(n, 1.0) for e in before) for n in names}
        machines["others"] = replace(plain, corrections=others)
    took = statistics.median(measured)
    return {name: took / _predicted(job, machine) - 1 for name, machine in machines.items()}


def _predicted(job: TuneJob, machine: Machine) -> float:
    layout = apply_moves(job.graph, job.untuned.moves)
    found = Simulator(layout, machine, Costs(machine)).predict(job.sample.workload)
    return found.seconds - found.setup_seconds * (1 - job.share)


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
