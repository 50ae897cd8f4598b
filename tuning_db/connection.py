"""Opens the database file: makes it, brings it to today's schema, says what is wrong with it."""

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from dovetail.ir.errors import InputError

APPLICATION_ID = 0x646F7674
"""Marks the file as ours ("dovt"), so that another program's database is never written to."""

BUSY_SECONDS = 30.0


def connect(path: Path) -> sqlite3.Connection:
    """An open connection to an up-to-date database at ``path``; raises InputError if impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder of the tuning database {path} cannot be made: {error.strerror}; "
            "set DOVETAIL_CACHE_DIR to a folder that can be written"
        ) from error
    with readable_errors(path):
        # isolation_level=None: transactions begin and end where this code says so.
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turns SQLite's errors about the file into an InputError that says what to do."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.DatabaseError) as error:
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise
        code = error.sqlite_errorcode & 0xFF if hasattr(error, "sqlite_errorcode") else None
        raise InputError(f"the tuning database {path}: {error}; {_advice(code)}") from error


def _advice(code: int | None) -> str:
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return "move the file away and run `dovetail calibrate` to begin a new one"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "another process keeps it locked: wait for it to end and try again"
    if code == sqlite3.SQLITE_FULL:
        return "its disk is full: free some space and try again"
    return "check that its folder can be written, or set DOVETAIL_CACHE_DIR to one that can"


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commits what is done inside as one step, or undoes it; takes the write lock at once."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        # A full disk makes SQLite roll back by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def migrations() -> dict[int, list[str]]:
    """The statements of ``schema.sql`` by the version that they lead to."""
    text = resources.files("dovetail.tuning_db").joinpath("schema.sql").read_text("utf-8")
    sections: dict[int, list[str]] = {}
    for section in text.split("\n-- version ")[1:]:
        number, _, body = section.partition("\n")
        sections[int(number)] = _statements(body)
    assert list(sections) == list(range(1, len(sections) + 1)), "schema.sql skips a version"
    return sections


def _statements(text: str) -> list[str]:
    statements, pending = [], ""
    for line in text.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            statements.append(pending)
            pending = ""
    return statements


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Brings the open file, called ``path`` in errors, to today's schema; raises InputError."""
    sections = migrations()
    connection.create_function("digest", -1, _digest, deterministic=True)
    if _checked_version(connection, path, len(sections)) < len(sections):
        with transaction(connection):
            # Read again under the lock: another process may have migrated the file meanwhile.
            version = _checked_version(connection, path, len(sections))
            for number in range(version + 1, len(sections) + 1):
                for statement in sections[number]:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(sections)}")
    _use_wal(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _digest(*values: object) -> str:
    """What migrations name rows by that had no name: hex sha256 over their values."""
    return hashlib.sha256("\x1f".join(map(str, values)).encode()).hexdigest()[:32]


def _checked_version(connection: sqlite3.Connection, path: Path, newest: int) -> int:
    version = int(_pragma(connection, "user_version"))
    owner = int(_pragma(connection, "application_id"))
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if owner != APPLICATION_ID and (tables or owner or version):
        raise InputError(
            f"{path} is a SQLite database of another program, expected a tuning database of "
            "dovetail; name another file, or set DOVETAIL_CACHE_DIR to another folder"
        )
    if version > newest:
        raise InputError(
            f"the tuning database {path} has version {version}, this dovetail reads up to "
            f"{newest}; upgrade dovetail, or move the file away to begin a new one"
        )
    return version


def _use_wal(connection: sqlite3.Connection) -> None:
    """Readers and one writer at once. Where the file system cannot, the old journal stays."""
    # SQLite does not wait for a lock here as it does elsewhere, so processes that open a new
    # file together would fail each other.
    deadline = time.monotonic() + BUSY_SECONDS
    while _pragma(connection, "journal_mode") not in ("wal", "memory"):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _pragma(connection: sqlite3.Connection, name: str) -> str:
    (value,) = connection.execute(f"PRAGMA {name}").fetchone()
    return str(value)
