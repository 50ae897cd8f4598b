"""Merge, prune, export and status of tuning databases.

Rows have names that hold in every file (digests of content, or uids), so a merge adds the rows that
are missing and nothing else: in any order, and as often as one likes, the result is the same.
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dovetail.ir import codec
from dovetail.ir.errors import InputError
from dovetail.tuning_db.connection import APPLICATION_ID, prepare, readable_errors
from dovetail.tuning_db.database import Database


@dataclass(frozen=True, slots=True)
class Table:
    """A table, the columns that name a row in every file, and the tables its columns refer to."""

    name: str
    key: tuple[str, ...]
    refers: Mapping[str, str] = field(default_factory=dict)


_ENVIRONMENT = {"environment": "environment"}
TABLES = (
    Table("environment", ("silicon_digest", "software_digest")),
    Table("task", ("digest",)),
    Table("workload", ("digest",)),
    Table("protocol", ("digest",)),
    Table("calibration", ("uid",), _ENVIRONMENT),
    Table("run", ("uid",), _ENVIRONMENT),
    Table("task_sample", ("uid",), {"run": "run"}),
    Table("tuning", ("uid",), _ENVIRONMENT),
    Table("tuning_end", ("uid",), {"tuning": "tuning"}),
    Table(
        "trial",
        ("uid",),
        _ENVIRONMENT
        | {"tuning": "tuning", "task": "task", "workload": "workload", "protocol": "protocol"},
    ),
    Table("correction", ("uid",), _ENVIRONMENT),
)
"""Every table, after those that it refers to."""

_NAMED = {table.name: table for table in TABLES}


def merge(into: Database, source: Path) -> dict[str, int]:
    """Add the rows of the file ``source`` that ``into`` lacks; returns how many, by table.

    ``source`` is only read. Raises InputError if it is missing, damaged or no tuning database.
    """
    added: dict[str, int] = {}
    with _Copy(source) as other, into.writing() as connection:
        for table in TABLES:
            before = connection.total_changes
            for row in _rows(other, table):
                _insert(connection, table, row, source)
            added[table.name] = connection.total_changes - before
    return added


def export(database: Database) -> Iterator[str]:
    """Every row as a line of JSON, the rows it refers to by their names; files with equal facts
    give equal lines."""
    with readable_errors(database.path):
        for table in TABLES:
            yield from sorted(
                codec.canonical({"table": table.name} | row)
                for row in _rows(database.connection, table)
            )


def check(database: Database) -> list[str]:
    """What is wrong with the file, as SQLite sees it; nothing for a sound one."""
    found = [row[0] for row in database.rows("PRAGMA integrity_check") if row[0] != "ok"]
    broken = database.rows("PRAGMA foreign_key_check")
    return found + [f"a row of {row[0]} refers to a {row[2]} that is not there" for row in broken]


def counts(database: Database) -> dict[str, int]:
    """How many rows each table has."""
    return {
        table.name: database.rows(f"SELECT count(*) FROM {table.name}")[0][0] for table in TABLES
    }


def prune(database: Database, before: str = "", environments: Sequence[int] = ()) -> dict[str, int]:
    """Delete what no query needs any more; returns how many rows, by table.

    That is every calibration and correction but the newest of its kind; trials, runs and calls of
    the tuner from before the time ``before`` (ISO 8601) or in one of ``environments``; and
    what then belongs to nothing.
    """
    total = counts(database)
    with database.writing() as connection:
        connection.execute(
            "DELETE FROM calibration WHERE id NOT IN (SELECT id FROM (SELECT id, row_number() OVER"
            " (PARTITION BY environment, disk_device, protocol ORDER BY created_at DESC, id DESC)"
            " AS place FROM calibration) WHERE place = 1)"
        )
        connection.execute(
            "DELETE FROM correction WHERE id NOT IN (SELECT id FROM (SELECT id, row_number() OVER"
            " (PARTITION BY environment, graph ORDER BY created_at DESC, uid DESC) AS place"
            " FROM correction) WHERE place = 1)"
        )
        where = ", ".join(str(int(each)) for each in environments)
        old = f"created_at < ? OR environment IN ({where})"
        connection.execute(f"DELETE FROM trial WHERE {old}", (before,))
        connection.execute(
            f"DELETE FROM task_sample WHERE run IN (SELECT id FROM run WHERE {old})", (before,)
        )
        connection.execute(f"DELETE FROM run WHERE {old}", (before,))
        connection.execute(f"DELETE FROM calibration WHERE environment IN ({where})")
        connection.execute(f"DELETE FROM correction WHERE environment IN ({where})")
        kept = "SELECT tuning FROM trial"
        gone = f"({old}) AND id NOT IN ({kept})"
        connection.execute(
            f"DELETE FROM tuning_end WHERE tuning IN (SELECT id FROM tuning WHERE {gone})",
            (before,),
        )
        connection.execute(f"DELETE FROM tuning WHERE {gone}", (before,))
        _delete_orphans(connection)
    left = counts(database)
    with readable_errors(database.path):
        database.connection.execute("VACUUM")
    return {name: total[name] - left[name] for name in total if total[name] > left[name]}


def _delete_orphans(connection: sqlite3.Connection) -> None:
    for name in ("task", "workload", "protocol", "environment"):
        users = [table for table in TABLES if name in table.refers.values()]
        used = " UNION ".join(f"SELECT {name} FROM {table.name}" for table in users)
        connection.execute(f"DELETE FROM {name} WHERE id NOT IN ({used})")


class _Copy:
    """A file's content in memory, brought to today's schema there; the file is only read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memory = sqlite3.connect(":memory:", isolation_level=None)

    def __enter__(self) -> sqlite3.Connection:
        path = self._path
        try:
            if not path.is_file():
                raise InputError(
                    f"{path}: no such tuning database; name a file that `dovetail tune --db` or "
                    "`dovetail calibrate` has written"
                )
            with readable_errors(path):
                file = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
                try:
                    file.backup(self._memory)
                finally:
                    file.close()
                if self._memory.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
                    raise InputError(
                        f"{path} is no tuning database of dovetail; name another file to merge"
                    )
                prepare(self._memory, path)
        except BaseException:
            self._memory.close()
            raise
        return self._memory

    def __exit__(self, *_: object) -> None:
        self._memory.close()


def _rows(connection: sqlite3.Connection, table: Table) -> Iterator[dict[str, Any]]:
    """A table's rows by column, without ids, and what they refer to by its name."""
    cursor = connection.execute(f"SELECT * FROM {table.name}")
    names = [column[0] for column in cursor.description]
    known: dict[tuple[str, int], list[str]] = {}
    for values in cursor.fetchall():
        row = dict(zip(names, values, strict=True))
        row.pop("id", None)
        for column, target in table.refers.items():
            place = (target, row[column])
            if place not in known:
                known[place] = _name(connection, *place)
            row[column] = known[place]
        yield row


def _name(connection: sqlite3.Connection, table: str, number: int) -> list[str]:
    key = ", ".join(_NAMED[table].key)
    found = connection.execute(f"SELECT {key} FROM {table} WHERE id = ?", (number,)).fetchone()
    if found is None:
        raise InputError(
            f"the tuning database refers to a {table} that it does not have; move the file away "
            "or take it from a backup"
        )
    return list(found)


def _insert(
    connection: sqlite3.Connection, table: Table, row: Mapping[str, Any], source: Path
) -> None:
    values = dict(row)
    for column, target in table.refers.items():
        key = " AND ".join(f"{name} = ?" for name in _NAMED[target].key)
        query = f"SELECT id FROM {target} WHERE {key}"
        values[column] = connection.execute(query, row[column]).fetchone()[0]
    names, marks = ", ".join(values), ", ".join("?" for _ in values)
    try:
        connection.execute(
            f"INSERT INTO {table.name} ({names}) VALUES ({marks})"
            f" ON CONFLICT ({', '.join(table.key)}) DO NOTHING",
            tuple(values.values()),
        )
    except sqlite3.IntegrityError as error:
        raise InputError(
            f"{source}: a row of {table.name} contradicts one that is there already ({error}); "
            "nothing was merged"
        ) from error
