"""Kill a tuning at random moments and resume it: no trial is lost and none is made twice."""

import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dovetail.tuning_db.database import Database
from dovetail.tuning_db.maintain import check

BETWEEN = 4
"""A kill comes after fewer than this many trials, and up to a second more."""


def kills(words: Sequence[str], db: Path, count: int, seed: int = 0) -> str:
    """Start this tuning ``count`` times and kill it each time (signal 9); returns what was found.

    Fails if a trial that was shown is not in the database, or one was timed twice, or SQLite finds
    the file damaged.
    """
    command = [sys.executable, "-m", "dovetail.cli", *words, "--policy", "module_batch"]
    command[command.index("--time") + 1] = "600s"
    draw, shown, rows = random.Random(seed), 0, 0
    for number in range(count):
        shown += _killed(command, draw.randrange(BETWEEN), draw.random())
        rows = _checked(db, shown)
        print(f"kill {number + 1} of {count}: {rows} rows, {shown} shown", file=sys.stderr)
    return f"{count} kills: {shown} trials shown, none lost, none doubled; {rows} rows, all sound"


def _killed(command: Sequence[str], trials: int, seconds: float) -> int:
    """Kill the command some time after it has shown so many trials; returns how many it showed."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = 0
    for line in process.stderr:
        lines += ": trial " in line
        if lines >= trials and "planning" not in line:
            break
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[1]
    return lines + sum(": trial " in line for line in rest.splitlines(keepends=True))


def _checked(db: Path, shown: int) -> int:
    with Database.open(db) as opened:
        rows = opened.rows("SELECT parameters_digest, environment, note, state FROM trial")
        problems = check(opened)
    # Other code is another environment, whose best are timed again.
    searched = Counter(tuple(name) for *name, note, state in rows if not note and state == "ok")
    doubled = [name for name, times in searched.items() if times > 1]
    stored = sum(state != "invalid" for *_, state in rows)
    assert not problems, problems
    assert not doubled, f"timed twice: {doubled}"
    assert stored >= shown, f"{shown} trials were shown, {stored} are stored"
    return len(rows)
