"""What the tuner stores and asks: its calls, their trials, and corrections of the cost model.

A trial is stored in a transaction of its own as soon as it is timed, so that a kill at any moment
loses the trial under way at most.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dovetail.ir import codec
from dovetail.ir.workload import Workload
from dovetail.tuning_db.database import Database, Identity, new_uid, now
from dovetail.tuning_db.facts import Correction, Key, Protocol, Stop, Task, Trial, Tuning

_TRIAL = (
    "SELECT trial.number, parameters, knobs, state, samples, default_samples, predicted_seconds,"
    " max_error, note, trial.uid, trial.created_at"
)


@dataclass(frozen=True, slots=True)
class Trials:
    """The tuner's side of an open database. Methods raise InputError as those of Database do."""

    database: Database

    def begin(self, tuning: Tuning) -> Tuning:
        """Stores a call of the tuner as it begins; returns it with its ``uid``."""
        named = replace(tuning, uid=new_uid(), created_at=now())
        with self.database.writing() as connection:
            connection.execute(
                "INSERT INTO tuning (uid, environment, argv, sampler, seed, budget_seconds,"
                " created_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    named.uid,
                    self.database.environment(tuning.silicon, tuning.software),
                    tuning.argv,
                    tuning.sampler,
                    tuning.seed,
                    tuning.budget_seconds,
                    named.created_at,
                ),
            )
        return named

    def end(self, uid: str, spent_seconds: float, stop: Stop) -> None:
        """Stores how the call ended."""
        with self.database.writing() as connection:
            connection.execute(
                "INSERT INTO tuning_end (uid, tuning, spent_seconds, stop, created_at)"
                " VALUES (?, (SELECT id FROM tuning WHERE uid = ?), ?, ?, ?)",
                (new_uid(), uid, spent_seconds, stop, now()),
            )

    def add(self, tuning: str, key: Key, trial: Trial) -> str:
        """Stores a trial of the call with this uid; returns the trial's own."""
        uid = new_uid()
        with self.database.writing() as connection:
            task, workload, protocol = self._key(key)
            connection.execute(
                "INSERT INTO trial (uid, tuning, number, task, environment, workload, protocol,"
                " parameters, parameters_digest, knobs, state, samples, default_samples,"
                " predicted_seconds, max_error, note, created_at)"
                " VALUES (?, (SELECT id FROM tuning WHERE uid = ?),"
                " ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    uid,
                    tuning,
                    trial.number,
                    task,
                    self.database.environment(key.silicon, key.software),
                    workload,
                    protocol,
                    codec.canonical(trial.parameters),
                    trial.digest,
                    codec.canonical(trial.knobs),
                    trial.state,
                    codec.canonical(trial.samples),
                    codec.canonical(trial.default_samples),
                    trial.predicted_seconds,
                    trial.max_error,
                    trial.note,
                    now(),
                ),
            )
        return uid

    def of(self, key: Key) -> list[Trial]:
        """All trials with just this key, in the order in which they were made."""
        found = [trial for _, trial in self.since(key, 0)]
        return sorted(found, key=lambda trial: (trial.created_at, trial.uid))

    def since(self, key: Key, place: int) -> list[tuple[int, Trial]]:
        """The trials with this key that came to this file after ``place``, each with its own."""
        rows = self.database.rows(
            f"{_TRIAL}, trial.id FROM trial JOIN task ON task.id = task"
            " JOIN workload ON workload.id = trial.workload"
            " JOIN protocol ON protocol.id = trial.protocol"
            " JOIN environment ON environment.id = environment"
            " WHERE task.digest = ? AND workload.digest = ? AND protocol.digest = ?"
            " AND silicon_digest = ? AND software_digest = ? AND trial.id > ? ORDER BY trial.id",
            (
                codec.digest(key.task),
                _workload_digest(key.workload, key.source),
                codec.digest(key.protocol),
                codec.digest(key.silicon),
                codec.digest(key.software),
                place,
            ),
        )
        return [(number, self._trial(tuple(row))) for *row, number in rows]

    def keys_of(self, task: Task, workload: Workload, source: str) -> list[Key]:
        """The keys of all trials of a task and workload, wherever and however they were timed."""
        rows = self.database.rows(
            "SELECT DISTINCT protocol.protocol, silicon, software FROM trial"
            " JOIN task ON task.id = task JOIN workload ON workload.id = trial.workload"
            " JOIN protocol ON protocol.id = trial.protocol"
            " JOIN environment ON environment.id = environment"
            " WHERE task.digest = ? AND workload.digest = ?"
            " ORDER BY silicon, software, protocol.protocol",
            (codec.digest(task), _workload_digest(workload, source)),
        )
        record = self.database.record
        return [
            Key(
                task,
                workload,
                record(protocol, Protocol, "a protocol"),
                record(silicon, dict[str, str], "an environment"),
                record(software, dict[str, str], "an environment"),
                source,
            )
            for protocol, silicon, software in rows
        ]

    def tunings(self) -> list[Tuning]:
        """Every call of the tuner, oldest first."""
        rows = self.database.rows(
            "SELECT silicon, software, argv, sampler, seed, budget_seconds,"
            " coalesce(spent_seconds, 0.0), coalesce(stop, ''), tuning.uid, tuning.created_at"
            " FROM tuning JOIN environment ON environment.id = environment"
            " LEFT JOIN tuning_end ON tuning_end.tuning = tuning.id"
            " ORDER BY tuning.created_at, tuning.uid",
        )
        record = self.database.record
        return [
            Tuning(
                record(silicon, dict[str, str], f"tuning {rest[-2]}"),
                record(software, dict[str, str], f"tuning {rest[-2]}"),
                *rest,
            )
            for silicon, software, *rest in rows
        ]

    def add_correction(self, correction: Correction) -> None:
        """Stores factors for the cost model with what they were found from."""
        with self.database.writing() as connection:
            connection.execute(
                "INSERT INTO correction (uid, environment, graph, factors, evidence, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    new_uid(),
                    self.database.environment(correction.silicon, correction.software),
                    correction.graph,
                    codec.canonical(correction.factors),
                    codec.canonical(correction.evidence),
                    now(),
                ),
            )

    def latest_correction(
        self, silicon: Identity, software: Identity, graph: str
    ) -> Correction | None:
        """The correction stored last for just this silicon, software and model, or None."""
        rows = self.database.rows(
            "SELECT factors, evidence, correction.uid, correction.created_at FROM correction"
            " JOIN environment ON environment.id = environment"
            " WHERE silicon_digest = ? AND software_digest = ? AND graph = ?"
            " ORDER BY correction.created_at DESC, correction.uid DESC LIMIT 1",
            (codec.digest(silicon), codec.digest(software), graph),
        )
        for factors, evidence, uid, created_at in rows:
            where = f"correction {uid}"
            return Correction(
                silicon,
                software,
                graph,
                self.database.record(factors, dict[str, float], where),
                self.database.record(evidence, dict[str, tuple[float, ...]], where),
                uid,
                created_at,
            )
        return None

    def _key(self, key: Key) -> tuple[int, int, int]:
        """The ids of the key's task, workload and protocol, which are added if they are new."""
        task = self._named(
            "task",
            codec.digest(key.task),
            {"op": key.task.op, "signature": codec.canonical(key.task.signature)},
        )
        workload = self._named(
            "workload",
            _workload_digest(key.workload, key.source),
            {"workload": codec.canonical(key.workload), "source": key.source},
        )
        content = {"protocol": codec.canonical(key.protocol)}
        return task, workload, self._named("protocol", codec.digest(key.protocol), content)

    def _named(self, table: str, digest: str, columns: Mapping[str, str]) -> int:
        connection = self.database.connection
        names = ", ".join(columns)
        marks = ", ".join("?" for _ in columns)
        connection.execute(
            f"INSERT INTO {table} (digest, {names}) VALUES (?, {marks}) ON CONFLICT DO NOTHING",
            (digest, *columns.values()),
        )
        query = f"SELECT id FROM {table} WHERE digest = ?"
        return int(connection.execute(query, (digest,)).fetchone()[0])

    def _trial(self, row: tuple[Any, ...]) -> Trial:
        number, parameters, knobs, state, samples, defaults, predicted, error, note, *names = row
        where, record = f"trial {names[0]}", self.database.record
        return Trial(
            number,
            record(parameters, dict[str, Any], where),
            record(knobs, dict[str, int | bool | str], where),
            state,
            record(samples, tuple[float, ...], where),
            record(defaults, tuple[float, ...], where),
            predicted,
            error,
            note,
            *names,
        )


def _workload_digest(workload: Workload, source: str) -> str:
    """Where a workload comes from is part of what it is: two may be as long and route otherwise."""
    return codec.digest([codec.encode(workload), source])
