"""`dovetail tune` on checkpoints and budgets: what it gains, how soon, and by which sampler.

    python bench/tuning.py --folder SCRATCH --out bench/results/NAME.json
    python bench/tuning.py --folder SCRATCH --kills 50

For every cell (a checkpoint under a budget) each sampler tunes for the same seconds from an empty
database. Then the untuned plan and the best schedule of every sampler run in turns, round by round;
the lowest median is the best known. The second form kills a tuning at random moments and resumes.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from host import describe_machine
from tuning_errors import correction_of, errors
from tuning_kills import kills

from dovetail.checkpoint import ModelFolder
from dovetail.cli import main as dovetail
from dovetail.cli import make_parser
from dovetail.ir.moves import Move
from dovetail.machine_files import load_machine, save_machine
from dovetail.planning import find_machine
from dovetail.tuning.job import TuneJob, make_job
from dovetail.tuning.measure import Measurer
from dovetail.tuning.sample import read_workload
from dovetail.tuning.samplers import SAMPLERS
from dovetail.tuning.search import DEFAULT, moves_of
from dovetail.tuning.worker import Job
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.facts import Trial
from dovetail.tuning_db.trials import Trials
from dovetail.tuning_db.winners import Interval, median_interval, ranked

NEAR = 1.02
"""A schedule within this factor of the best known counts as found."""
WORKLOADS = {"demo": "48x120+24", "400MB": "96x48+16", "1GB": "96x48+12"}
SHARES = (0.45, 0.75)
"""Budgets, as shares of a checkpoint's bytes beside what the process itself takes."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one sampler found in a cell. ``near_trials`` and ``near_seconds`` are what it took to a
    schedule whose ratio was within NEAR of the best known's; None if it took longer than there was.
    """

    sampler: str
    outcome: str
    reason: str
    timed: int
    ratio: float
    low: float
    high: float
    against_best: float
    near_trials: int | None
    near_seconds: float | None


@dataclass(frozen=True, slots=True)
class Cell:
    """A checkpoint under a budget."""

    checkpoint: str
    budget: int
    workload: str
    seconds: float
    sample_tokens: int
    untuned_tokens_per_second: float
    best_tokens_per_second: float
    best: str
    best_ratio: float
    samplers: tuple[Sampled, ...]
    errors: Mapping[str, float]
    """Measured over predicted seconds, less 1, of the untuned plan: by the machine's curves, with
    the corrections of this cell, and with those of the cells before it."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cells share."""

    folder: Path
    seconds: float
    rounds: int
    samplers: tuple[str, ...]

    def checkpoint(self, size: str) -> Path:
        """The checkpoint of a size, written if it is missing."""
        path = self.folder / size
        if not (path / "config.json").exists():
            assert dovetail(["demo", str(path), "--size", size]) == 0
        return path

    def machine_file(self, checkpoint: Path) -> Path:
        """The machine as calibrated, in a file: so every cell plans by the same curves."""
        path = self.folder / "machine.json"
        if not path.exists():
            index = ModelFolder.open(checkpoint).index
            machine = find_machine("", [index.shards[0].file], lambda text: None)
            save_machine(replace(machine, corrections={}), path)
        return path

    def words(self, checkpoint: Path, budget: int, workload: str, db: Path) -> list[str]:
        """The command of one tuning."""
        machine = str(self.machine_file(checkpoint))
        words = ["tune", str(checkpoint), "--workload", workload, "--budget", f"ram={budget}"]
        words += ["--time", f"{self.seconds}s", "--machine", machine, "--db", str(db)]
        return [*words, "-o", str(db.with_suffix("") / "plan.json")]

    def cell(self, size: str, share: float, before: list[Mapping[str, float]]) -> Cell:
        """Tune with every sampler, then race what they found; adds the cell's correction to those
        of the cells ``before``."""
        checkpoint, workload = self.checkpoint(size), WORKLOADS[size]
        shards = ModelFolder.open(checkpoint).index.shards
        weights = sum(shard.file.stat().st_size for shard in shards)
        process = load_machine(str(self.machine_file(checkpoint))).process_bytes
        budget = int(weights * share) + process
        place = Path(tempfile.mkdtemp(prefix=f"{size}-", dir=self.folder))
        for sampler in self.samplers:
            db = place / f"{sampler}.db"
            say(f"{size} ram={budget}: {sampler}")
            assert (
                dovetail([*self.words(checkpoint, budget, workload, db), "--sampler", sampler]) == 0
            )
        with self._job(checkpoint, budget, workload, place) as job:
            rows = {name: self._rows(place / f"{name}.db", job) for name in self.samplers}
            race = self._race(job, rows)
            found = _cell(self, size, budget, workload, job, rows, race)
            found = replace(found, errors=errors(job, race["untuned"], place, before))
            before.append(correction_of(place, job.untuned.graph))
            return found

    @contextmanager
    def _job(self, checkpoint: Path, budget: int, workload: str, place: Path) -> Iterator[TuneJob]:
        options = make_parser().parse_args(
            self.words(checkpoint, budget, workload, place / "race.db")
        )
        folder = ModelFolder.open(checkpoint)
        prompts = read_workload(folder, workload, None, False, 0)
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            yield make_job(options, folder, prompts, Path(scratch), self.seconds)

    def _rows(self, db: Path, job: TuneJob) -> list[Trial]:
        with Database.open(db) as opened:
            return Trials(opened).of(job.key)

    def _race(self, job: TuneJob, rows: Mapping[str, Sequence[Trial]]) -> dict[str, list[float]]:
        """Seconds of the untuned plan and of each sampler's best, in turns."""
        best: dict[str, tuple[Move, ...]] = {"untuned": job.untuned.moves}
        for name, found in rows.items():
            timed = ranked([trial for trial in found if trial.note != DEFAULT])
            best[name] = moves_of(timed[0]) if timed else job.untuned.moves
        race: dict[str, list[float]] = {name: [] for name in best}
        runs = Job(str(job.checkpoint), job.sample.ids, job.sample.new_tokens)
        with Measurer(job.scratch, job.untuned.moves, runs, job.share) as measurer:
            measurer.start_reference()
            names = list(best)
            for number in range(self.rounds):
                say(f"race, round {number + 1} of {self.rounds}")
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    race[name].append(measurer.once(best[name]))
        return race


def _cell(
    bench: Bench,
    size: str,
    budget: int,
    workload: str,
    job: TuneJob,
    rows: Mapping[str, Sequence[Trial]],
    race: Mapping[str, Sequence[float]],
) -> Cell:
    middle = {name: statistics.median(seconds) for name, seconds in race.items()}
    best = min(middle, key=lambda name: middle[name])
    known = middle[best] / middle["untuned"]
    tokens = sum(job.sample.new_tokens)
    sampled = tuple(
        _sampled(bench, job, name, found, race, middle[name] / middle[best], known)
        for name, found in rows.items()
    )
    return Cell(
        size,
        budget,
        workload,
        bench.seconds,
        tokens,
        tokens / middle["untuned"],
        tokens / middle[best],
        best,
        known,
        sampled,
        {},
    )


def _sampled(
    bench: Bench,
    job: TuneJob,
    name: str,
    rows: Sequence[Trial],
    race: Mapping[str, Sequence[float]],
    against_best: float,
    known: float,
) -> Sampled:
    from dovetail.tuning.plan import decide

    pairs = zip(race[name], race["untuned"], strict=True)
    interval: Interval = median_interval([a / b for a, b in pairs])
    chosen, reason = decide(rows)
    timed = [row for row in rows if row.state == "ok" and row.note == ""]
    begin = min((datetime.fromisoformat(row.created_at) for row in rows), default=None)
    near = next(
        (
            (number, datetime.fromisoformat(row.created_at))
            for number, row in enumerate(timed, 1)
            if row.ratios and statistics.median(row.ratios) <= NEAR * known
        ),
        None,
    )
    return Sampled(
        name,
        "untuned" if chosen is None else "tuned",
        reason,
        len(timed),
        interval.median,
        interval.low,
        interval.high,
        against_best,
        near[0] if near else None,
        (near[1] - begin).total_seconds() if near and begin else None,
    )


def table(cells: Sequence[Cell]) -> str:
    """All cells as Markdown."""
    lines = [
        "| checkpoint | ram | untuned tok/s | best tok/s | sampler | outcome | ÷ untuned | "
        "÷ best known | timed | to within 2 %: trials, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        for s in cell.samplers:
            near = f"{s.near_trials}, {s.near_seconds:.0f}" if s.near_seconds is not None else "-"
            lines.append(
                f"| {cell.checkpoint} | {cell.budget / 1e6:.0f} MB | "
                f"{cell.untuned_tokens_per_second:.1f} | {cell.best_tokens_per_second:.1f} | "
                f"{s.sampler} | {s.outcome} | {s.ratio:.3f} [{s.low:.3f}, {s.high:.3f}] | "
                f"{s.against_best:.3f} | {s.timed} | {near} |"
            )
    for name in ("curves", "own", "others"):
        off = [abs(cell.errors[name]) for cell in cells if name in cell.errors]
        if off:
            lines.append(
                f"\nPrediction of the untuned plan, {name}: median error "
                f"{statistics.median(off):.1%} over {len(off)} cells"
            )
    return "\n".join(lines)


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """The whole bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and databases")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--checkpoints", default="demo,400MB,1GB")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of each tuning")
    parser.add_argument("--rounds", type=int, default=7, help="of the race at the end of a cell")
    parser.add_argument("--kills", type=int, help="kill a tuning so often instead")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    samplers = tuple(options.samplers.split(","))
    bench = Bench(options.folder, options.seconds, options.rounds, samplers)
    if options.kills:
        checkpoint = bench.checkpoint("demo")
        db = Path(tempfile.mkdtemp(prefix="kills-", dir=bench.folder)) / "tuning.db"
        print(kills(bench.words(checkpoint, 24 << 20, "12x40+4", db), db, options.kills))
        return 0
    cells: list[Cell] = []
    for size in options.checkpoints.split(","):
        # Corrections are a model's own: a cell is predicted by those of its other budgets.
        factors: list[Mapping[str, float]] = []
        for share in SHARES:
            cells.append(bench.cell(size, share, factors))
            if options.out:
                data = {"machine": describe_machine(), "cells": [asdict(cell) for cell in cells]}
                options.out.write_text(json.dumps(data, indent=1) + "\n")
    print(table(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
