"""`dovetail tune` on a small checkpoint: killed, resumed, replayed, and what it exports."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.support import machine, tiny_model

from dovetail.cli import main
from dovetail.ir import codec
from dovetail.ir.plan import load_plan
from dovetail.machine_files import save_machine
from dovetail.tuning.staleness import Grade, plan_staleness
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.maintain import check, counts
from dovetail.tuning_db.trials import Trials

PATIENCE = 120.0
WORK = "--workload 10x16+4 --budget 5MiB"


@dataclass(frozen=True)
class Place:
    """A folder with a checkpoint, a machine file and, once tuned, a plan and a database."""

    folder: Path

    def words(self, time: str, db: str = "tuning.db", out: str = "plan.json") -> list[str]:
        """The arguments of a tuning."""
        machine_file = self.folder / "machine.json"
        words = ["tune", str(self.folder / "checkpoint"), *WORK.split(), "--time", time]
        words += ["--machine", str(machine_file), "--db", str(self.folder / db)]
        return [*words, "-o", str(self.folder / out)]

    def started(self, words: Sequence[str]) -> subprocess.Popen[str]:
        """The command at work."""
        return subprocess.Popen(
            [sys.executable, "-m", "dovetail.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def trials(self, db: str = "tuning.db") -> list[tuple[int, int, str, str, str]]:
        """Tuning, number, digest, state and note of every trial."""
        with Database.open(self.folder / db) as opened:
            assert check(opened) == []
            return opened.rows(
                "SELECT tuning, number, environment || parameters_digest, state, note FROM trial"
                " ORDER BY id"
            )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A checkpoint that a tuning was killed on and then finished."""
    folder = tmp_path_factory.mktemp("tune")
    tiny_model("olmoe").save_pretrained(folder / "checkpoint")
    save_machine(machine(), folder / "machine.json")
    found = Place(folder)
    process = found.started(found.words("60s"))
    assert process.stderr is not None
    shown = []
    for line in process.stderr:
        if ": trial " in line:
            shown.append(int(line.split(": trial ")[1].split(":")[0]))
        if len(shown) == 3:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    stored = [number for _, number, _, state, _ in found.trials() if state != "invalid"]
    assert stored[: len(shown)] == shown, "what was shown was stored"
    assert main(found.words("7s")) == 0
    return found


def test_killed_tuning_goes_on_and_times_nothing_twice(place: Place) -> None:
    rows = place.trials()
    assert len({(tuning, number) for tuning, number, *_ in rows}) == len(rows)
    searched = Counter(digest for _, _, digest, state, note in rows if not note and state == "ok")
    assert set(searched.values()) <= {1}
    with Database.open(place.folder / "tuning.db") as opened:
        stops = [tuning.stop for tuning in Trials(opened).tunings()]
        assert len(stops) == 2 and stops[0] == "" and stops[1] in ("budget", "converged", "space")


def test_plan_says_how_it_was_found_and_passes_the_check(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load_plan(place.folder / "plan.json")
    found = plan.tuning
    assert found is not None and found.outcome in ("tuned", "untuned") and found.reason
    assert (found.outcome == "tuned") == (found.high < 1.0 and found.pairs >= 6)
    assert found.load_skew >= 1.0 and found.environment["dovetail"]
    assert found.max_error is None or found.max_error < 1e-3
    assert main(["plan", "check", str(place.folder / "plan.json"), "--here"]) == 0
    assert "it was made for this machine and software: used as it is" in capsys.readouterr().out
    assert main(["plan", "show", str(place.folder / "plan.json")]) == 0
    assert f"{found.outcome}: " in capsys.readouterr().out


def test_replay_decides_the_same_from_the_same_rows_elsewhere_too(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load_plan(place.folder / "plan.json")
    copy = place.folder / "copy.db"
    assert main(["db", "merge", str(copy), str(place.folder / "tuning.db")]) == 0
    raw = sqlite3.connect(copy)
    other = {"flags": "other"}
    raw.execute(
        "UPDATE environment SET silicon = ?, silicon_digest = ?",
        (codec.canonical(other), codec.digest(other)),
    )
    raw.commit()
    raw.close()
    for db, grade in (("tuning.db", "was made for this machine"), ("copy.db", "different machine")):
        words = [*place.words("1s", out=f"{db}.plan/plan.json"), "--replay", str(place.folder / db)]
        assert main(words) == 0
        again = load_plan(place.folder / f"{db}.plan" / "plan.json")
        assert again.moves == first.moves and again.tuning and first.tuning
        assert again.tuning.outcome == first.tuning.outcome
        assert again.tuning.ratio == first.tuning.ratio
        assert grade in capsys.readouterr().err
    assert plan_staleness(again).grade is Grade.FOREIGN
    assert main(["plan", "check", str(place.folder / "copy.db.plan" / "plan.json"), "--here"]) == 1
    assert "stale    here     it was made for a different machine (" in capsys.readouterr().out


def test_replay_refuses_rows_of_something_else(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    words = place.words("1s")
    words[words.index("5MiB")] = "6MiB"
    assert main([*words, "--replay", str(place.folder / "tuning.db")]) == 1
    assert "has no trials of this model, budget and workload" in capsys.readouterr().err
    assert main([*words, "--replay", str(place.folder / "none.db")]) == 1
    assert "no such tuning database" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "budget"), [("h100-1tb", "ram=5MiB,hbm=3MiB")])
def test_target_elsewhere_is_simulated_and_says_so(
    place: Place, target: str, budget: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*place.words("2s", out="far/plan.json"), "--policy", "module_batch"]
    at = words.index("--machine")
    words[at : at + 2] = ["--target", target, "--sampler", "tpe"]
    words[words.index("5MiB")] = budget
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("simulated: ")
    found = load_plan(place.folder / "far" / "plan.json").tuning
    assert found and found.outcome == "simulated" and "nothing was run" in found.reason
    assert found.ratio <= 1.0 and found.pairs == 0


def test_tune_refuses_a_torn_database_and_a_bad_place(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn.db"
    torn.write_bytes((place.folder / "tuning.db").read_bytes()[:5000])
    words = [*place.words("1s"), "--replay", str(torn)]
    assert main(words) == 1
    assert "move the file away" in capsys.readouterr().err
    words = place.words("1s")
    words[words.index("-o") + 1] = str(tmp_path)
    assert main(words) == 1
    assert "found a folder, expected a file" in capsys.readouterr().err


WRITER = """
import sys
from pathlib import Path
from dovetail.ir.workload import Workload
from dovetail.tuning_db.database import Database
from dovetail.tuning_db.facts import Key, Protocol, Task, Trial, Tuning
from dovetail.tuning_db.trials import Trials
w = Workload.of([1], 1)
key = Key(Task("schedule", {}), w, Protocol("whole", w), {}, {})
with Database.open(Path(sys.argv[1])) as db:
    tuning = Trials(db).begin(Tuning({}, {}, "", "", 0, 1.0))
    for n in range(100000):
        trial = Trial(n, {"n": n}, {}, "ok", (1.0,), (1.0,))
        print(Trials(db).add(tuning.uid, key, trial), flush=True)
"""


def test_kill_while_writing_loses_no_trial_that_was_reported(tmp_path: Path) -> None:
    path, draw = tmp_path / "a.db", random.Random(7)
    reported: list[str] = []
    for _ in range(5):
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        for process in pair:
            assert process.stdout is not None
            reported += [process.stdout.readline().strip() for _ in range(draw.randrange(1, 60))]
            process.kill()
            reported += process.communicate()[0].splitlines()
    with Database.open(path) as db:
        assert check(db) == []
        stored = [uid for (uid,) in db.rows("SELECT uid FROM trial")]
        # The last line of a killed process may be cut.
        whole = [uid for uid in reported if len(uid) == 32]
        assert set(whole) <= set(stored) and len(stored) == len(set(stored))
        assert len(stored) - len(whole) <= 20 and counts(db)["tuning"] == 10
