"""The tuning database: what was measured on which machine, and how predictions fared.

One SQLite file in WAL mode, so that several processes may read and write at once. Facts are added
and never changed. What the tuner adds is in ``trials``.
"""

import json
import os
import sqlite3
import statistics
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from dovetail.ir import codec
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.machine import Machine
from dovetail.ir.workload import Workload
from dovetail.tuning_db.connection import connect, readable_errors, transaction

T = TypeVar("T")

FILE_NAME = "facts.db"
Identity = Mapping[str, str]
"""What a processor or a software stack is, as ``runtime.calibrate_host`` names it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of a plan: what was expected and what came. Peaks are bytes of the ram tier.

    ``id`` and ``created_at`` (ISO 8601, UTC) are the database's; leave them out when adding.
    """

    silicon: Identity
    software: Identity
    plan_digest: str
    policy: str
    budget: Mapping[str, int]
    workload: Workload
    predicted_seconds: float
    measured_seconds: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    stop: Literal["done", "interrupted", "failed"]
    id: int = 0
    created_at: str = ""


@dataclass(frozen=True, slots=True)
class TaskSample:
    """Seconds that ``count`` tasks of one class took together in a run, predicted and measured."""

    task_class: str
    predicted_seconds: float
    measured_seconds: float
    count: int


def default_path() -> Path:
    """``facts.db`` in the folder DOVETAIL_CACHE_DIR, else in ``~/.cache/dovetail``."""
    folder = os.environ.get("DOVETAIL_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "dovetail") / FILE_NAME


class Database:
    """An open tuning database; also a context manager that closes it. One thread at a time.

    Every method raises InputError, with what to do, when the file cannot be read or written.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: Path | None = None) -> "Database":
        """Opens the file, making or migrating it first; None means ``default_path()``.

        Raises InputError for a file that is not a tuning database, is damaged or was written by
        a newer dovetail, and for a place that cannot be written.
        """
        path = path or default_path()
        return cls(path, connect(path))

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_calibration(
        self,
        machine: Machine,
        silicon: Identity,
        software: Identity,
        disk_device: str,
        protocol: int,
    ) -> int:
        """Stores what a calibration measured, and where; returns its id."""
        with self.writing() as connection:
            row = connection.execute(
                "INSERT INTO calibration (environment, disk_device, protocol, machine, created_at,"
                " uid) VALUES (?, ?, ?, ?, ?, ?) RETURNING id",
                (
                    self.environment(silicon, software),
                    disk_device,
                    protocol,
                    codec.canonical(machine),
                    now(),
                    new_uid(),
                ),
            ).fetchone()
        return int(row[0])

    def latest_calibration(
        self,
        silicon: Identity,
        disk_device: str,
        software: Identity | None = None,
        protocol: int | None = None,
    ) -> Machine | None:
        """The machine that was stored last for this silicon and disk, or None.

        With ``software`` or ``protocol`` only what was measured with just these.
        """
        with readable_errors(self.path):
            row = self._connection.execute(
                "SELECT calibration.id, machine FROM calibration"
                " JOIN environment ON environment.id = environment"
                " WHERE silicon_digest = :silicon AND disk_device = :disk"
                " AND :software IN ('', software_digest)"
                " AND coalesce(:protocol, protocol) = protocol"
                " ORDER BY created_at DESC, calibration.id DESC LIMIT 1",
                {
                    "silicon": codec.digest(silicon),
                    "disk": disk_device,
                    "software": codec.digest(software) if software is not None else "",
                    "protocol": protocol,
                },
            ).fetchone()
        return None if row is None else self.record(row[1], Machine, f"calibration {row[0]}")

    def add_run(self, run: Run) -> int:
        """Stores a run and returns its id, which ``add_task_samples`` wants."""
        with self.writing() as connection:
            row = connection.execute(
                "INSERT INTO run (environment, plan_digest, policy, budget, workload,"
                " predicted_seconds, measured_seconds, predicted_peak_bytes, measured_peak_bytes,"
                " stop, created_at, uid) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
                (
                    self.environment(run.silicon, run.software),
                    run.plan_digest,
                    run.policy,
                    codec.canonical(run.budget),
                    codec.canonical(run.workload),
                    run.predicted_seconds,
                    run.measured_seconds,
                    run.predicted_peak_bytes,
                    run.measured_peak_bytes,
                    run.stop,
                    now(),
                    new_uid(),
                ),
            ).fetchone()
        return int(row[0])

    def add_task_samples(self, run: int, samples: Iterable[TaskSample]) -> None:
        """Stores the samples of the run with this id, all or none."""
        rows = [
            (run, s.task_class, s.predicted_seconds, s.measured_seconds, s.count, new_uid())
            for s in samples
        ]
        with self.writing() as connection:
            connection.executemany("INSERT INTO task_sample VALUES (?, ?, ?, ?, ?, ?)", rows)

    def runs(self) -> list[Run]:
        """Every run, oldest first."""
        with readable_errors(self.path):
            rows = self._connection.execute(
                "SELECT silicon, software, plan_digest, policy, budget, workload,"
                " predicted_seconds, measured_seconds, predicted_peak_bytes, measured_peak_bytes,"
                " stop, run.id, created_at"
                " FROM run JOIN environment ON environment.id = environment ORDER BY run.id"
            ).fetchall()
        return [self._run(row) for row in rows]

    def residuals(self, silicon: Identity | None = None) -> dict[str, float]:
        """Median of measured over predicted seconds by task class: 1.2 means 20 % slower.

        Runs on all machines count, or only those on ``silicon``.
        """
        with readable_errors(self.path):
            rows = self._connection.execute(
                "SELECT task_class, task_sample.measured_seconds / task_sample.predicted_seconds"
                " FROM task_sample JOIN run ON run.id = run"
                " JOIN environment ON environment.id = environment"
                " WHERE task_sample.predicted_seconds > 0 AND ? IN ('', silicon_digest)"
                " ORDER BY task_class",
                (codec.digest(silicon) if silicon is not None else "",),
            ).fetchall()
        ratios: dict[str, list[float]] = defaultdict(list)
        for task_class, ratio in rows:
            ratios[task_class].append(ratio)
        return {task_class: statistics.median(each) for task_class, each in ratios.items()}

    @property
    def connection(self) -> sqlite3.Connection:
        """The open file, for the other modules of this room."""
        return self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is stored, or nothing."""
        with readable_errors(self.path), transaction(self._connection):
            yield self._connection

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows that a query finds."""
        with readable_errors(self.path):
            return self._connection.execute(query, values).fetchall()

    def environment(self, silicon: Identity, software: Identity) -> int:
        """The id of the environment, which is added if it is new."""
        key = (codec.digest(silicon), codec.digest(software))
        self._connection.execute(
            "INSERT INTO environment (silicon, silicon_digest, software, software_digest)"
            " VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (codec.canonical(silicon), key[0], codec.canonical(software), key[1]),
        )
        (found,) = self._connection.execute(
            "SELECT id FROM environment WHERE silicon_digest = ? AND software_digest = ?", key
        ).fetchone()
        return int(found)

    def _run(self, row: tuple[Any, ...]) -> Run:
        silicon, software, plan_digest, policy, budget, workload, *figures = row
        where = f"run {row[11]}"
        return Run(
            self.record(silicon, dict[str, str], where),
            self.record(software, dict[str, str], where),
            plan_digest,
            policy,
            self.record(budget, dict[str, int], where),
            self.record(workload, Workload, where),
            *figures,
        )

    def record(self, text: str, kind: type[T], where: str) -> T:
        """The JSON of a column as what it holds; raises InputError where it is something else."""
        try:
            return codec.decode(json.loads(text), kind)
        except (PlanError, json.JSONDecodeError) as error:
            raise InputError(
                f"the tuning database {self.path}: {where} cannot be read: {error}; run "
                "`dovetail calibrate` for a new calibration, or move the file away to begin anew"
            ) from error


def now() -> str:
    """The time as rows have it: ISO 8601 in UTC, such that later sorts after earlier."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def new_uid() -> str:
    """A name for a row that no row of another file has."""
    return uuid.uuid4().hex
