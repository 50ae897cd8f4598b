"""`dovetail db` on the command line."""

import json
from pathlib import Path

import pytest

from dovetail.cli import main
from dovetail.ir.workload import Workload
from dovetail.tuning.staleness import environment_here
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.facts import Key, Protocol, Task, Trial, Tuning
from dovetail.tuning_db.trials import Trials

WORKLOAD = Workload.of([4], 2)


def fill(path: Path, number: int, silicon: dict[str, str]) -> Path:
    """A database with one trial, by a tuner that was killed."""
    with Database.open(path) as db:
        trials, software = Trials(db), {"torch": "0.1"}
        tuning = trials.begin(Tuning(silicon, software, "tune", "tpe", 0, 1.0))
        key = Key(Task("schedule", {}), WORKLOAD, Protocol("whole", WORKLOAD), silicon, software)
        trials.add(tuning.uid, key, Trial(number, {"n": number}, {}, "ok", (1.0,), (1.0,)))
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A database of this machine and one of a machine with other instructions."""
    here = {k: v for k, v in environment_here().items() if k in ("processor", "flags")}
    return (
        fill(tmp_path / "a.db", 0, here),
        fill(tmp_path / "b.db", 1, {"processor": "Other", "flags": "none"}),
    )


def test_status_says_what_is_there_and_how_far_it_is(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["db", "merge", *map(str, two)]) == 0
    capsys.readouterr()
    assert main(["db", "status", str(two[0])]) == 0
    out = capsys.readouterr().out
    assert "trials        2 ok" in out and "2 killed or running" in out
    assert "recompiled, " in out and "foreign, Other (flags none -> " in out
    assert main(["db", "status", str(two[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"]["trial"] == 2 and found["problems"] == []


def test_merge_says_what_was_new(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    into = two[0].parent / "all.db"
    assert main(["db", "merge", str(into), *map(str, two), str(two[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 trial" in lines[0] and lines[2].endswith("nothing new") and "2 trial" in lines[3]


def test_prune_deletes_what_is_foreign_and_old_only_when_asked(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(two[1])
    assert main(["db", "prune", path, "--older-than", "1d"]) == 0
    assert capsys.readouterr().out == "deleted nothing\n"
    assert main(["db", "prune", path, "--foreign"]) == 0
    assert "1 trial" in capsys.readouterr().out
    assert main(["db", "prune", path, "--older-than", "soon"]) == 1
    assert "'soon': expected a number of hours, days or weeks" in capsys.readouterr().err


def test_export_of_merged_files_does_not_depend_on_the_order(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, order in (("x", two), ("y", two[::-1])):
        assert main(["db", "merge", str(tmp_path / name), *map(str, order)]) == 0
        assert main(["db", "export", str(tmp_path / name), "-o", str(tmp_path / f"{name}.j")]) == 0
    text = (tmp_path / "x.j").read_text()
    assert text == (tmp_path / "y.j").read_text()
    assert {json.loads(line)["table"] for line in text.splitlines()} >= {"trial", "tuning"}
    capsys.readouterr()
    assert main(["db", "export", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out == text


def test_commands_refuse_a_file_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ("status", "prune", "export"):
        assert main(["db", action, str(tmp_path / "none.db")]) == 1
        assert "no such tuning database; `dovetail calibrate`" in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()
