"""`dovetail db`: what a tuning database holds, and merging, pruning and exporting it."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dovetail.ir.errors import InputError
from dovetail.ir.units import format_bytes
from dovetail.tuning.kernels.key import gpu_fields
from dovetail.tuning.staleness import Grade, compare, environment_here
from dovetail.tuning_db.database import Database, default_path
from dovetail.tuning_db.maintain import check, counts, export, merge, prune
from dovetail.tuning_db.trials import Trials

_UNITS = {"d": "days", "h": "hours", "w": "weeks"}


def status(path: Path | None, *, as_json: bool) -> int:
    """Print what the database holds and how far its environments are from here; 1 if it is
    damaged. Raises InputError."""
    with Database.open(_existing(path)) as database:
        found = _status(database)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(_status_lines(found)))
    return 1 if found["problems"] else 0


def merge_files(into: Path, sources: Sequence[Path]) -> int:
    """Add what ``sources`` have to ``into``, which is made if it is missing. Raises InputError."""
    with Database.open(into) as database:
        for source in sources:
            added = merge(database, source)
            print(f"{source}: {_listed(added) or 'nothing new'}")
        print(f"{into} has {_listed(counts(database)) or 'no rows'}")
    return 0


def prune_file(path: Path | None, older_than: str | None, *, foreign: bool) -> int:
    """Delete what no query needs: superseded rows, with ``older_than`` (such as 90d) old ones, with
    ``foreign`` those of machines that are nothing like this one. Raises InputError."""
    before = _ago(older_than).isoformat() if older_than else ""
    with Database.open(_existing(path)) as database:
        gone = [number for number, _, grade in _environments(database) if grade is Grade.FOREIGN]
        deleted = prune(database, before, gone if foreign else ())
    print(f"deleted {_listed(deleted) or 'nothing'}")
    return 0


def export_file(path: Path | None, out: Path | None) -> int:
    """Write every row as a line of JSON to ``out`` or standard output. Raises InputError."""
    with Database.open(_existing(path)) as database:
        if out is None:
            for line in export(database):
                print(line)
            return 0
        count = 0
        with out.open("w", encoding="utf-8") as file:
            for line in export(database):
                file.write(line + "\n")
                count += 1
    print(f"{count} rows are in {out}", file=sys.stderr)
    return 0


def _existing(path: Path | None) -> Path:
    path = path or default_path()
    if not path.exists():
        raise InputError(
            f"{path}: no such tuning database; `dovetail calibrate` and `dovetail tune` make one"
        )
    return path


def _status(database: Database) -> dict[str, Any]:
    trials = Trials(database)
    states = database.rows("SELECT state, count(*) FROM trial GROUP BY state ORDER BY state")
    return {
        "file": str(database.path),
        "bytes": database.path.stat().st_size,
        "rows": counts(database),
        "problems": check(database),
        "trials": dict(states),
        "tunings": Counter(tuning.stop or "killed or running" for tuning in trials.tunings()),
        "environments": [
            {"id": number, "about": about, "grade": str(grade)}
            for number, about, grade in _environments(database)
        ],
    }


def _environments(database: Database) -> Iterator[tuple[int, str, Grade]]:
    """Every environment's id, what it is, and how far from here it is, its disk left aside."""
    processor, gpu = environment_here(), dict(gpu_fields())
    for number, silicon, software in database.rows(
        "SELECT id, silicon, software FROM environment ORDER BY id"
    ):
        where = f"environment {number}"
        told = database.record(silicon, dict[str, str], where)
        told |= database.record(software, dict[str, str], where)
        told.pop("disk", None)
        # Trials of kernels are of a GPU, whatever processor is beside it.
        found = compare(told, gpu if "cc" in told else processor)
        name = told.get("processor") or told.get("device_name") or "unnamed processor"
        differs = "; ".join(str(each) for each in found.differences)
        yield number, f"{name}{f' ({differs})' if differs else ''}", found.grade


def _status_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['file']}, {format_bytes(found['bytes'])}"
    yield f"rows          {_listed(found['rows']) or 'none'}"
    yield f"trials        {_listed(found['trials']) or 'none'}"
    yield f"tunings       {_listed(found['tunings']) or 'none'}"
    for each in found["environments"]:
        yield f"environment   {each['id']}: {each['grade']}, {each['about']}"
    for problem in found["problems"]:
        yield f"damaged       {problem}"
    if found["problems"]:
        yield "move the file away and begin a new one, or merge the parts that are sound"
    else:
        yield "sound         integrity and references checked"


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in numbers.items() if count)


def _ago(text: str) -> datetime:
    match = re.fullmatch(r"([0-9]{1,5})([dhw])", text)
    if match is None:
        raise InputError(
            f"--older-than {text!r}: expected a number of hours, days or weeks such as 12h, 90d "
            "or 4w"
        )
    return datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
