"""Trials and winners: facts of tuning come back, merge in any order, and decide alike."""

import sqlite3
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.ir.errors import InputError
from dovetail.ir.workload import Workload
from dovetail.tuning_db.connection import migrations
from dovetail.tuning_db.database import Database, Run, TaskSample
from dovetail.tuning_db.facts import Correction, Key, Protocol, State, Task, Trial, Tuning
from dovetail.tuning_db.maintain import check, counts, export, merge, prune
from dovetail.tuning_db.trials import Trials
from dovetail.tuning_db.winners import pooled, ranked, ratio_interval, winner

SILICON = {"processor": "Test 9000", "cores": "2"}
SOFTWARE = {"torch": "2.13.0"}
WORKLOAD = Workload.of([5, 9, 5], 16)
KEY = Key(
    Task("schedule", {"graph": "ab", "ram": 1 << 30}),
    WORKLOAD,
    Protocol("whole", WORKLOAD),
    SILICON,
    SOFTWARE,
    "prompts:12",
)
TUNING = Tuning(SILICON, SOFTWARE, "tune m", "tpe", 0, 60.0)


def trial(number: int, *ratios: float, state: State = "ok") -> Trial:
    """A candidate with these ratios to a default of one second."""
    knobs = {"seqs": number, "refill": True}
    ones = (1.0,) * len(ratios)
    return Trial(number, {"moves": [number]}, knobs, state, ratios, ones, 0.5, 1e-3, "n")


def fill(path: Path, first: int, count: int = 3) -> Path:
    """A database with a tuning, some trials, a run and a correction."""
    with Database.open(path) as db:
        trials = Trials(db)
        tuning = trials.begin(TUNING)
        for number in range(first, first + count):
            trials.add(tuning.uid, KEY, trial(number, 0.9, 0.8))
        trials.end(tuning.uid, 5.0, "budget")
        trials.add_correction(
            Correction(SILICON, SOFTWARE, "g", {"experts": 1.2}, {"experts": (1.2,)})
        )
        run = Run(SILICON, SOFTWARE, "d", "eager", {}, WORKLOAD, 1, 2, 3, 4, "done")
        db.add_task_samples(db.add_run(run), [TaskSample("a", 1.0, 1.5, 2)])
    return path


def test_trials_come_back_as_stored(tmp_path: Path) -> None:
    fill(tmp_path / "a.db", 0)
    with Database.open(tmp_path / "a.db") as db:
        found = Trials(db).of(KEY)
        assert [replace(t, uid="", created_at="") for t in found] == [
            trial(n, 0.9, 0.8) for n in range(3)
        ]
        assert len({t.uid for t in found}) == 3
        assert Trials(db).of(replace(KEY, software={"torch": "2.14.0"})) == []
        assert Trials(db).of(replace(KEY, source="prompts:13")) == []
        (ended,) = Trials(db).tunings()
        assert (ended.stop, ended.spent_seconds, ended.sampler) == ("budget", 5.0, "tpe")
        correction = Trials(db).latest_correction(SILICON, SOFTWARE, "g")
        assert correction and correction.factors == {"experts": 1.2}
        assert Trials(db).latest_correction(SILICON, SOFTWARE, "h") is None


def test_keys_of_other_environments_and_protocols_are_found(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a.db") as db:
        tuning = Trials(db).begin(TUNING)
        keys = [
            KEY,
            replace(KEY, silicon={"cores": "4"}),
            replace(KEY, protocol=Protocol("whole", Workload.of([5], 2))),
        ]
        for number, key in enumerate(keys):
            Trials(db).add(tuning.uid, key, trial(number, 1.0))
        Trials(db).add(tuning.uid, replace(KEY, source="other"), trial(3, 1.0))
        found = Trials(db).keys_of(KEY.task, KEY.workload, KEY.source)
        assert len(found) == 3 and all(key in found for key in keys)
        assert [[t.number for t in Trials(db).of(key)] for key in keys] == [[0], [1], [2]]


def test_a_number_is_given_once_in_a_tuning(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a.db") as db:
        tuning = Trials(db).begin(TUNING)
        Trials(db).add(tuning.uid, KEY, trial(0, 1.0))
        with pytest.raises(sqlite3.IntegrityError):
            Trials(db).add(tuning.uid, KEY, trial(0, 1.0))
        assert len(Trials(db).of(KEY)) == 1


def test_merge_is_idempotent_and_commutative(tmp_path: Path) -> None:
    files = [fill(tmp_path / f"{n}.db", 10 * n) for n in range(3)]
    texts: list[list[str]] = []
    orders: set[tuple[int, ...]] = set()
    for order in permutations(files):
        with Database.open(tmp_path / f"all{len(texts)}.db") as db:
            for file in (*order, order[0]):
                added = merge(db, file)
            assert set(added.values()) == {0}, "the second merge of a file adds nothing"
            texts.append(list(export(db)))
            assert check(db) == [] and counts(db)["trial"] == 9
            orders.add(tuple(t.number for t in ranked(Trials(db).of(KEY))))
    assert all(text == texts[0] for text in texts) and len(orders) == 1


def test_merge_leaves_the_source_as_it_was_and_brings_old_ones_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old.db"
    monkeypatch.setattr("dovetail.tuning_db.connection.migrations", lambda: {1: migrations()[1]})
    Database.open(old).close()
    monkeypatch.undo()
    raw = sqlite3.connect(old)
    raw.execute("INSERT INTO environment VALUES (1, '{}', 's', '{}', 't')")
    for _ in range(2):
        raw.execute(
            "INSERT INTO run (environment, plan_digest, policy, budget, workload,"
            " predicted_seconds, measured_seconds, predicted_peak_bytes, measured_peak_bytes, stop,"
            " created_at) VALUES (1, 'd', 'eager', '{}', '{}', 1, 2, 3, 4, 'done', 'now')"
        )
    raw.execute("INSERT INTO task_sample VALUES (1, 'a', 1, 2, 3), (1, 'a', 1, 2, 3)")
    raw.commit()
    raw.close()
    before = old.read_bytes()
    with Database.open(tmp_path / "new.db") as db:
        assert merge(db, old)["run"] == 2 and merge(db, old)["run"] == 0
        assert counts(db)["task_sample"] == 2
    assert old.read_bytes() == before
    with Database.open(tmp_path / "new.db") as db, Database.open(old):
        assert set(merge(db, old).values()) == {0}, "brought up in place, its rows have equal names"


def test_merge_refuses_what_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database" * 500)
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE recipe (name TEXT)")
    torn = fill(tmp_path / "torn.db", 0)
    with Database.open(tmp_path / "a.db") as db:
        with pytest.raises(InputError, match="no such tuning database; name a file"):
            merge(db, tmp_path / "none.db")
        with pytest.raises(InputError, match="file is not a database; move the file away"):
            merge(db, tmp_path / "text")
        with pytest.raises(InputError, match="no tuning database of dovetail; name another"):
            merge(db, tmp_path / "other.db")
        torn.write_bytes(torn.read_bytes()[: 3 * 4096])
        with pytest.raises(InputError, match=r"torn\.db: .*malformed"):
            merge(db, torn)
        assert sum(counts(db).values()) == 0, "what cannot be merged whole is not merged"


def test_prune_leaves_what_queries_need(tmp_path: Path) -> None:
    path = fill(fill(tmp_path / "a.db", 0), 10)
    with Database.open(path) as db:
        trials, tuning = Trials(db), Trials(db).begin(TUNING)
        elsewhere = replace(KEY, silicon={"cores": "4"})
        trials.add(tuning.uid, elsewhere, trial(7, 1.0))
        best = ranked(trials.of(KEY))
        assert prune(db) == {"correction": 1}
        assert ranked(trials.of(KEY)) == best
        ((other,),) = db.rows("SELECT id FROM environment WHERE silicon LIKE '%\"4\"%'")
        assert prune(db, environments=[other])["trial"] == 1
        assert trials.of(elsewhere) == [] and ranked(trials.of(KEY)) == best
        prune(db, before="9999")
        left = {name: count for name, count in counts(db).items() if count}
        assert left == {"environment": 1, "correction": 1} and check(db) == []


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=12))
def test_ratio_interval_lies_around_its_estimate_and_does_not_ask_who_is_first(
    ratios: list[float],
) -> None:
    found = ratio_interval(ratios)
    assert len(ratios) >= 6 or (found.low, found.high) == (0.0, float("inf"))
    assert found.low <= found.median * (1 + 1e-9) and found.median <= found.high * (1 + 1e-9)
    turned = ratio_interval([1 / ratio for ratio in ratios])
    assert turned.median == pytest.approx(1 / found.median)
    assert turned.faster == found.slower and turned.slower == found.faster
    wider = ratio_interval(ratios, 0.99)
    assert wider.low <= found.low and found.high <= wider.high


def test_ratio_interval_counts_signed_ranks() -> None:
    """All signs of n ranks, counted out: six wins in a row are 1 of 64 on either side."""
    assert ratio_interval([0.9] * 6).faster and not ratio_interval([0.9] * 5).faster
    wins = [0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97]
    # One loss, smaller than all wins, leaves a sum of 1: 2 of 512 sums are as low.
    assert ratio_interval([*wins, 1.001], 0.99).faster
    assert not ratio_interval([*wins, 1.4], 0.99).faster, "the loss is the largest of all"


def test_winner_must_be_beyond_doubt() -> None:
    faster, lucky = trial(1, *[0.9, 0.92] * 4), trial(2, 0.5)
    unsure, slower = trial(3, *[0.8, 1.1] * 4), trial(4, *[1.2] * 8)
    assert winner([lucky, unsure, slower]) is None
    found = winner([slower, unsure, lucky, faster])
    assert found and found.number == 1
    assert [t.number for t in ranked([slower, faster, lucky])] == [2, 1, 4]


def test_failures_outweigh_samples_and_throttled_ones_do_not_count() -> None:
    good, wrong = trial(1, *[0.5] * 8), trial(1, state="wrong_result")
    assert winner([good, wrong]) is None and winner([good]) is not None
    (one,) = pooled([good, trial(1, 9.0, state="throttled"), trial(1, 0.6)])
    assert one.ratios == (*[0.5] * 8, 0.6)


@given(st.permutations([trial(n, *[0.9] * 8) for n in range(4)]))
def test_ties_are_broken_alike_in_any_order(trials: list[Trial]) -> None:
    first = winner(trials)
    assert first and first.digest == min(t.digest for t in trials)
