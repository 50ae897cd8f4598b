"""One cell of the tuning bench: a checkpoint and a budget, tuned by every sampler, then a race."""

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from host import Window
from tuning_errors import correction_of, errors_of_trials, predicted_untuned, rows_of
from tuning_table import NEAR, Cell, Sampled

from dovetail.checkpoint import ModelFolder
from dovetail.cli import main as dovetail
from dovetail.cli import make_parser
from dovetail.ir.moves import Move
from dovetail.machine_files import load_machine, save_machine
from dovetail.planning import find_machine
from dovetail.tuning.gate import DEFAULT
from dovetail.tuning.job import TuneJob, make_job
from dovetail.tuning.known import moves_of
from dovetail.tuning.measure import Measurer
from dovetail.tuning.plan import decide
from dovetail.tuning.sample import read_workload
from dovetail.tuning.space import moves_digest
from dovetail.tuning.worker import Job
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.facts import Trial
from dovetail.tuning_db.trials import Trials
from dovetail.tuning_db.winners import ranked, ratio_interval

RACE_SECONDS = 45.0
"""A race of short runs has more rounds: the lowest of some medians is lower than it ought to be by
what they are off."""
WORKLOADS = {"demo": "48x120+24", "400MB": "96x48+16", "1GB": "96x48+12"}


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

    def cell(self, size: str, share: float) -> Cell:
        """Tune with every sampler, then race what they found."""
        checkpoint, workload = self.checkpoint(size), WORKLOADS[size]
        budget = self._budget(checkpoint, share)
        place = Path(tempfile.mkdtemp(prefix=f"{size}-{share}-", dir=self.folder))
        with Window() as window:
            job, sample_for = self._job(checkpoint, budget, workload, place)
            for sampler in self.samplers:
                words = self.words(checkpoint, budget, workload, place / f"{sampler}.db")
                say(f"{size} ram={budget}: {sampler}")
                assert dovetail([*words, "--sampler", sampler, "--sample-for", sample_for]) == 0
            rows = {name: _rows(place / f"{name}.db", job) for name in self.samplers}
            race = _race(job, rows, self.rounds)
        cell = _cell(self, size, share, workload, job, rows, race)
        own = correction_of(place, job.untuned.graph)
        return replace(
            cell,
            factors=own,
            others_cores=window.other_cores,
            predicted=predicted_untuned(job, job.untuned.moves, {"curves": {}, "own": own}),
        )

    def held_out(self, cell: Cell, others: Sequence[Mapping[str, float]]) -> Cell:
        """The cell with predictions by what its checkpoint's other budgets taught."""
        if not others:
            return cell
        names = {name for each in others for name in each}
        factors = {n: statistics.median(each.get(n, 1.0) for each in others) for n in names}
        checkpoint, workload = self.checkpoint(cell.checkpoint), cell.workload
        places = sorted(
            self.folder.glob(f"{cell.checkpoint}-{cell.share}-*"), key=lambda p: p.stat().st_mtime
        )
        place = places[-1]
        job = self._plain_job(checkpoint, cell.budget, workload, place)
        job = job.on(job.prompts.part(*cell.sample))
        rows = rows_of(place, job)
        untuned = next(moves_of(row) for row in rows if row.note == DEFAULT)
        machines: dict[str, Mapping[str, float]] = {"curves": {}, "others": factors}
        errors, count = errors_of_trials(job, rows, machines)
        predicted = {**cell.predicted, **predicted_untuned(job, untuned, machines)}
        return replace(cell, predicted=predicted, trial_errors=errors, trials=count)

    def _budget(self, checkpoint: Path, share: float) -> int:
        shards = ModelFolder.open(checkpoint).index.shards
        weights = sum(shard.file.stat().st_size for shard in shards)
        return int(weights * share) + load_machine(str(self.machine_file(checkpoint))).process_bytes

    def _plain_job(self, checkpoint: Path, budget: int, workload: str, place: Path) -> TuneJob:
        options = make_parser().parse_args(
            self.words(checkpoint, budget, workload, place / "race.db")
        )
        folder = ModelFolder.open(checkpoint)
        prompts = read_workload(folder, workload, None, False, 0)
        scratch = Path(tempfile.mkdtemp(prefix="job-", dir=place))
        return make_job(options, folder, prompts, scratch, self.seconds)

    def _job(
        self, checkpoint: Path, budget: int, workload: str, place: Path
    ) -> tuple[TuneJob, str]:
        """The job with the sample that all samplers run, and the option that cuts it so."""
        job = self._plain_job(checkpoint, budget, workload, place)
        with Measurer(job.scratch, job.untuned.moves, _runs(job), job.share) as measurer:
            took = measurer.seconds(measurer.start_reference())
        off = max(1.0, took / job.predicted(job.sample.workload))
        options = make_parser().parse_args(
            self.words(checkpoint, budget, workload, place / "race.db")
        )
        folder = ModelFolder.open(checkpoint)
        return (
            make_job(options, folder, job.prompts, job.scratch, self.seconds / off),
            f"{self.seconds / off:.3f}s",
        )


def _runs(job: TuneJob) -> Job:
    return Job(str(job.checkpoint), job.sample.ids, job.sample.new_tokens)


def _rows(db: Path, job: TuneJob) -> list[Trial]:
    with Database.open(db) as opened:
        return Trials(opened).of(job.key)


def _moves(
    job: TuneJob, rows: Mapping[str, Sequence[Trial]]
) -> dict[str, tuple[tuple[Move, ...], tuple[Move, ...]]]:
    """What each sampler exported, and the best that it found."""
    picked = {}
    for name, found in rows.items():
        chosen, _ = decide(found)
        timed = ranked(t for t in found if t.note != DEFAULT)
        best = timed[:1] if timed and statistics.median(timed[0].ratios) < 1.0 else []
        untuned = job.untuned.moves
        exported = untuned if chosen is None else moves_of(chosen)
        picked[name] = (exported, moves_of(best[0]) if best else untuned)
    return picked


def _race(job: TuneJob, rows: Mapping[str, Sequence[Trial]], rounds: int) -> dict[str, list[float]]:
    """Seconds, in turns, of the untuned plan, of what was exported and of the best that was found,
    by digest."""
    entries = {moves_digest(job.untuned.moves): job.untuned.moves}
    for pair in _moves(job, rows).values():
        entries |= {moves_digest(moves): moves for moves in pair}
    race: dict[str, list[float]] = {digest: [] for digest in entries}
    with Measurer(job.scratch, job.untuned.moves, _runs(job), job.share) as measurer:
        measurer.start_reference()
        names = list(entries)
        end, number = time.monotonic() + RACE_SECONDS, 0
        while number < rounds or time.monotonic() < end:
            say(f"race of {len(names)}, round {number + 1}")
            at = number % len(names)
            for name in names[at:] + names[:at]:
                race[name].append(measurer.once(entries[name]))
            number += 1
    return race


def _cell(
    bench: Bench,
    size: str,
    share: float,
    workload: str,
    job: TuneJob,
    rows: Mapping[str, Sequence[Trial]],
    race: Mapping[str, Sequence[float]],
) -> Cell:
    middle = {name: statistics.median(seconds) for name, seconds in race.items()}
    untuned = middle[moves_digest(job.untuned.moves)]
    best = min(middle.values())
    sample = job.sample.workload
    return Cell(
        size,
        share,
        job.untuned.budget["ram"],
        workload,
        bench.seconds,
        (sample.prompts, sample.new_tokens),
        untuned,
        job.sample.tokens / untuned,
        job.sample.tokens / best,
        best / untuned,
        0.0,
        tuple(_sampled(job, name, found, race, middle, best) for name, found in rows.items()),
    )


def _sampled(
    job: TuneJob,
    name: str,
    rows: Sequence[Trial],
    race: Mapping[str, Sequence[float]],
    middle: Mapping[str, float],
    best: float,
) -> Sampled:
    chosen, reason = decide(rows)
    ((exported, found),) = _moves(job, {name: rows}).values()
    untuned = moves_digest(job.untuned.moves)
    mine = moves_digest(exported)
    pairs = zip(race[mine], race[untuned], strict=True)
    interval = ratio_interval([a / b for a, b in pairs])
    timed = [row for row in rows if row.state != "invalid"]
    begin = min(datetime.fromisoformat(row.created_at) for row in rows)
    near = {digest for digest, seconds in middle.items() if seconds <= NEAR * best}
    first = next(
        (row for row in rows if row.state == "ok" and moves_digest(moves_of(row)) in near), None
    )
    before = {row.digest for row in timed[: timed.index(first)]} if first else set()
    return Sampled(
        name,
        "untuned" if chosen is None else "tuned",
        reason,
        len({row.digest for row in timed if row.note != DEFAULT}),
        interval.median,
        interval.low,
        interval.high,
        middle[mine] / best,
        middle[moves_digest(found)] / middle[untuned],
        len(before) if first else None,
        (datetime.fromisoformat(first.created_at) - begin).total_seconds() if first else None,
    )


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
