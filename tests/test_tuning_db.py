"""The tuning database: facts come back as stored, and no file of another kind is touched."""

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dovetail
from dovetail.ir.errors import InputError
from dovetail.ir.machine import Curve, Machine
from dovetail.ir.workload import Workload
from dovetail.tuning_db.connection import APPLICATION_ID, migrations
from dovetail.tuning_db.database import Database, Run, TaskSample, default_path
from dovetail.tuning_db.maintain import TABLES

SILICON = {"processor": "Test 9000", "cores": "2"}
SOFTWARE = {"torch": "2.13.0"}
DISK = "vda 254:0"


def machine(name: str = "here") -> Machine:
    """A machine whose figures are round."""
    curve = Curve((1.0, 64.0), (1e9, 3e11))
    return Machine(
        name=name,
        tiers={"ram": 2**34, "disk": 10**12},
        workers=2,
        gemm={"float32": curve},
        attention={"float32": curve},
        kv_bandwidth={"float32": curve},
        memory_bandwidth=4e10,
        op_seconds=2e-6,
        disk=curve,
        slowdown={"cpu|cpu": 0.9},
    )


def run() -> Run:
    """A run that took 20 % longer than predicted."""
    return Run(
        silicon=SILICON,
        software=SOFTWARE,
        plan_digest="ab" * 32,
        policy="module_batch",
        budget={"ram": 2**32},
        workload=Workload.of([5, 9, 5], 16),
        predicted_seconds=10.0,
        measured_seconds=12.0,
        predicted_peak_bytes=1000,
        measured_peak_bytes=900,
        stop="done",
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a database may be made, in a folder that is not there yet."""
    return tmp_path / "cache" / "facts.db"


def test_latest_calibration_is_the_last_one_stored(path: Path) -> None:
    with Database.open(path) as db:
        assert db.latest_calibration(SILICON, DISK) is None
        db.add_calibration(machine("old"), SILICON, SOFTWARE, DISK, 1)
        db.add_calibration(machine("new"), SILICON, SOFTWARE, DISK, 1)
        db.add_calibration(machine("other disk"), SILICON, SOFTWARE, "sdb 8:16", 1)
        db.add_calibration(machine("other cores"), SILICON | {"cores": "4"}, SOFTWARE, DISK, 1)
    with Database.open(path) as db:
        assert db.latest_calibration(SILICON, DISK) == machine("new")


def test_latest_calibration_may_ask_for_software_and_protocol(path: Path) -> None:
    newer = {"torch": "2.14.0"}
    with Database.open(path) as db:
        db.add_calibration(machine("first"), SILICON, SOFTWARE, DISK, 1)
        db.add_calibration(machine("second"), SILICON, newer, DISK, 2)
        found = [
            db.latest_calibration(SILICON, DISK),
            db.latest_calibration(SILICON, DISK, software=SOFTWARE),
            db.latest_calibration(SILICON, DISK, protocol=1),
            db.latest_calibration(SILICON, DISK, software=newer, protocol=2),
        ]
        assert [m.name for m in found if m] == ["second", "first", "first", "second"]
        assert db.latest_calibration(SILICON, DISK, software=newer, protocol=1) is None


def test_runs_come_back_in_order(path: Path) -> None:
    with Database.open(path) as db:
        first = db.add_run(run())
        second = db.add_run(replace(run(), stop="interrupted", policy="eager"))
        stored = db.runs()
    assert [r.id for r in stored] == [first, second]
    assert all(r.created_at.endswith("+00:00") for r in stored)
    assert replace(stored[0], id=0, created_at="") == run()
    assert (stored[1].stop, stored[1].policy) == ("interrupted", "eager")


def test_residuals_are_medians_by_task_class(path: Path) -> None:
    with Database.open(path) as db:
        here = db.add_run(run())
        there = db.add_run(replace(run(), silicon={"processor": "Test 1"}))
        experts = [TaskSample("experts", 1.0, s, 8) for s in (1.0, 1.5, 9.0)]
        db.add_task_samples(here, [*experts, TaskSample("idle", 0.0, 1.0, 1)])
        db.add_task_samples(there, [TaskSample("router", 2.0, 5.0, 4)])
        assert db.residuals() == {"experts": 1.5, "router": 2.5}
        assert db.residuals(SILICON) == {"experts": 1.5}


def test_samples_are_stored_all_or_none(path: Path) -> None:
    with Database.open(path) as db:
        number = db.add_run(run())
        good, bad = TaskSample("a", 1.0, 1.0, 1), TaskSample("b", float("nan"), 1.0, 1)
        with pytest.raises(sqlite3.IntegrityError):
            db.add_task_samples(number, [good, bad])
        with pytest.raises(sqlite3.IntegrityError):
            db.add_task_samples(number + 1, [good])
        assert db.residuals() == {}


def test_default_path_follows_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE_DIR", str(tmp_path))
    assert default_path() == tmp_path / "facts.db"
    with Database.open() as db:
        assert db.path == tmp_path / "facts.db"
    monkeypatch.delenv("DOVETAIL_CACHE_DIR")
    assert default_path() == Path.home() / ".cache" / "dovetail" / "facts.db"


def test_file_is_strict_wal_and_versioned(path: Path) -> None:
    Database.open(path).close()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert raw.execute("PRAGMA user_version").fetchone() == (len(migrations()),)
    tables = raw.execute("SELECT sql FROM sqlite_master WHERE type = 'table'").fetchall()
    raw.close()
    assert len(tables) == len(TABLES) and all(sql.rstrip().endswith("STRICT") for (sql,) in tables)


def test_open_refuses_what_is_not_a_database(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("not a database, but long enough to be taken for a header" * 20)
    with pytest.raises(InputError, match="file is not a database; move the file away and run"):
        Database.open(path)
    assert path.read_text().startswith("not a database")


def test_open_refuses_another_programs_database(path: Path) -> None:
    path.parent.mkdir()
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE recipe (name TEXT)")
    raw.commit()
    raw.close()
    before = path.read_bytes()
    with pytest.raises(InputError, match="a SQLite database of another program, expected"):
        Database.open(path)
    assert path.read_bytes() == before


def test_open_refuses_a_newer_version(path: Path) -> None:
    Database.open(path).close()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA user_version = 99")
    raw.close()
    with pytest.raises(InputError, match=r"has version 99, this dovetail reads up to 3; upgrade"):
        Database.open(path)


def test_open_refuses_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be made: .*; set DOVETAIL_CACHE_DIR"):
        Database.open(tmp_path / "file" / "facts.db")
    with pytest.raises(InputError, match="unable to open database file; check that its folder"):
        Database.open(tmp_path)


def test_reading_refuses_a_damaged_file(path: Path) -> None:
    with Database.open(path) as db:
        db.add_calibration(machine(), SILICON, SOFTWARE, DISK, 1)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with (
        pytest.raises(InputError, match="malformed; move the file away"),
        Database.open(path) as db,
    ):
        db.latest_calibration(SILICON, DISK)


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        ("{", "Expecting property name"),
        ('{"name": "x"}', r"field 'tiers' of Machine is missing"),
        ('{"kind": "Curve"}', "found a 'Curve', expected a 'Machine'"),
    ],
)
def test_calibration_refuses_a_record_that_is_no_machine(
    path: Path, stored: str, complaint: str
) -> None:
    with Database.open(path) as db:
        number = db.add_calibration(machine(), SILICON, SOFTWARE, DISK, 1)
    raw = sqlite3.connect(path)
    raw.execute("UPDATE calibration SET machine = ?", (stored,))
    raw.commit()
    raw.close()
    with (
        Database.open(path) as db,
        pytest.raises(InputError, match=rf"calibration {number} cannot be read: .*{complaint}"),
    ):
        db.latest_calibration(SILICON, DISK)


def test_locked_file_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Database.open(path).close()
    monkeypatch.setattr("dovetail.tuning_db.connection.BUSY_SECONDS", 0.01)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with (
        Database.open(path) as db,
        pytest.raises(InputError, match="another process keeps it locked: wait for it"),
    ):
        db.add_run(run())
    holder.close()


def test_two_processes_make_and_write_one_file(path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dovetail.ir.workload import Workload\n"
        "from dovetail.tuning_db.database import Database, Run\n"
        "run = Run({}, {}, '', sys.argv[2], {}, Workload.of([1], 1), 1, 1, 1, 1, 'done')\n"
        "with Database.open(Path(sys.argv[1])) as db:\n"
        "    for _ in range(25):\n"
        "        db.add_run(run)\n"
    )
    root = Path(dovetail.__file__).parents[1]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path), name], cwd=root, stderr=subprocess.PIPE
        )
        for name in ("one", "two")
    ]
    errors = [writer.communicate()[1].decode() for writer in writers]
    assert errors == ["", ""]
    with Database.open(path) as db:
        policies = [r.policy for r in db.runs()]
    assert sorted(policies) == ["one"] * 25 + ["two"] * 25


def test_migrations_bring_an_empty_file_of_ours_up(path: Path) -> None:
    path.parent.mkdir()
    raw = sqlite3.connect(path)
    raw.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    raw.close()
    with Database.open(path) as db:
        assert db.runs() == []


def test_interrupted_migration_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**migrations(), 4: ["CREATE TABLE half (a INT) STRICT;", "CREATE NONSENSE;"]}
    monkeypatch.setattr("dovetail.tuning_db.connection.migrations", lambda: broken)
    with pytest.raises(InputError, match="syntax error"):
        Database.open(path)
    monkeypatch.undo()
    with Database.open(path) as db:
        assert db.runs() == []
