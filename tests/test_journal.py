"""The journal: every prompt exactly once through kills, full disks, and runs that do not match."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.journal_cases import RUN, indices_in, record, records

from dovetail.ir.errors import InputError, OutputError
from dovetail.journal import Journal
from dovetail.journal_lines import Record


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def path(out: Path) -> Path:
    return out.with_name("out.jsonl.journal")


def test_output_is_in_the_given_order_and_nothing_else_is_left(out: Path, path: Path) -> None:
    with Journal.open(out, RUN) as journal:
        journal.append(records(2, 0))
        journal.append([])
        journal.append(records(1))
        assert not out.exists()
        assert dict(journal.done) == {2: record(2), 0: record(0), 1: record(1)}
        journal.finish(range(3))
        assert journal.complete and not journal.done
    assert out.read_text().splitlines()[0] == (
        '{"index": 0, "id": "p0", "input_tokens": 3, "tokens": [0, 7], "text": "tëxt 0", '
        '"finish_reason": "length"}'
    )
    assert indices_in(out) == [0, 1, 2]
    assert sorted(out.parent.iterdir()) == [out, path]
    assert path.stat().st_size < 400


def test_the_same_command_on_a_complete_output_has_nothing_to_do(out: Path) -> None:
    with Journal.open(out, RUN) as journal:
        journal.append(records(0, 1))
        journal.finish([1, 0])
        first = journal.receipt
    before = out.stat()
    with Journal.open(out, RUN) as journal:
        assert journal.receipt == first and first is not None
        assert (first.prompts, first.tokens, first.bytes) == (2, 4, before.st_size)
    assert out.stat().st_mtime_ns == before.st_mtime_ns


def test_a_second_opening_continues(out: Path) -> None:
    with Journal.open(out, RUN) as journal:
        journal.append(records(3, 1))
    with Journal.open(out, RUN) as journal:
        assert list(journal.done) == [3, 1] and 1 in journal.done and 0 not in journal.done
        journal.append(records(0, 2))
        journal.finish(range(4))
    assert indices_in(out) == [0, 1, 2, 3]


@given(st.data())
def test_a_journal_cut_anywhere_loses_only_what_is_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    out = tmp_path_factory.mktemp("cut") / "out.jsonl"
    path = out.with_name("out.jsonl.journal")
    with Journal.open(out, RUN) as journal:
        journal.append(records(*range(4)))
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    with Journal.open(out, RUN) as journal:
        assert len(journal.done) == max(0, whole[:cut].count(b"\n") - 1)
        journal.append(records(*(set(range(4)) - set(journal.done))))
        journal.finish(range(4))
    assert indices_in(out) == [0, 1, 2, 3]


@given(st.text(), st.text() | st.integers())
def test_any_text_comes_back_on_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str, prompt_id: str | int
) -> None:
    out = tmp_path_factory.mktemp("text") / "out.jsonl"
    # Half surrogates, which no UTF-8 file can hold, and line ends that JSON leaves alone.
    for odd in (text, text + "\ud800", text + "\u2028\x85"):
        result = Record(0, prompt_id, 1, (), odd, "stop")
        with Journal.open(out, RUN, restart=True) as journal:
            journal.append([result])
        with Journal.open(out, RUN) as journal:
            assert journal.done[0] == result
            journal.finish([0])
        (line,) = out.read_text(encoding="utf-8").splitlines()
        assert json.loads(line)["text"] == odd and json.loads(line)["id"] == prompt_id


def test_another_run_is_refused_with_what_differs(out: Path, path: Path) -> None:
    with Journal.open(out, RUN | {"old": None}) as journal:
        journal.append(records(0))
    before = path.read_bytes()
    with pytest.raises(InputError) as error:
        Journal.open(out, RUN | {"prompts": "cd34", "seed": 1})
    assert str(error.value) == (
        f'{path}: found the journal of another run: prompts was "ab12" and is now "cd34"; old was '
        "null and is now not given; seed was not given and is now 1; expected the same run: choose "
        "another --out, run with the earlier values to continue, or pass --restart to drop its "
        "results and run every prompt again"
    )
    assert path.read_bytes() == before
    with Journal.open(out, RUN, restart=True) as journal:
        assert not journal.done


def test_another_run_may_take_the_name_while_nothing_is_finished(out: Path) -> None:
    Journal.open(out, RUN).close()
    with Journal.open(out, {}) as journal:
        journal.append(records(0))
        journal.finish([0])
    out.unlink()
    with Journal.open(out, RUN) as journal:
        assert not journal.complete and not journal.done


def test_a_complete_output_refuses_another_run(out: Path) -> None:
    with Journal.open(out, RUN) as journal:
        journal.append(records(0))
        journal.finish([0])
    with pytest.raises(InputError, match=r"prompts was .ab12. and is now not given"):
        Journal.open(out, {})


def test_a_foreign_output_is_refused_and_kept(out: Path, path: Path) -> None:
    out.write_text("mine\n")
    with pytest.raises(InputError, match=r"out.jsonl: found a file that this run did not write.*"):
        Journal.open(out, RUN)
    assert not path.exists()
    out.unlink()
    journal = Journal.open(out, RUN)
    journal.append(records(0))
    out.write_text("mine\n")
    with pytest.raises(InputError, match="move the file away, or pass --restart"):
        journal.finish([0])
    journal.close()
    with pytest.raises(InputError, match="a file that this run did not write"):
        Journal.open(out, RUN)
    assert out.read_text() == "mine\n"
    out.unlink()
    with Journal.open(out, RUN) as journal:
        journal.finish([0])
    assert indices_in(out) == [0]


def test_a_changed_output_is_refused(out: Path) -> None:
    with Journal.open(out, RUN) as journal:
        journal.append(records(0))
        journal.finish([0])
    out.write_bytes(out.read_bytes().replace(b"7", b"8"))
    with pytest.raises(InputError, match=r"found other contents than this run wrote; expected.*--"):
        Journal.open(out, RUN)


def test_restart_keeps_the_old_output_until_the_new_one_is_complete(out: Path) -> None:
    out.write_text("old\n")
    with Journal.open(out, RUN, restart=True) as journal:
        journal.append(records(0))
    assert out.read_text() == "old\n"
    # The same command without --restart continues.
    with Journal.open(out, RUN) as journal:
        assert list(journal.done) == [0]
        journal.finish([0])
    assert indices_in(out) == [0]
    out.write_text("changed\n")
    with pytest.raises(InputError, match="other contents"):
        Journal.open(out, RUN)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [lines[0], b"\0" * 9, *lines[2:]], r"line 2: found '.*'; expected a finish"),
        (lambda lines: [*lines[:2], lines[2][:-9], lines[3]], r"line 3: found .*delete this line"),
        (lambda lines: [*lines, lines[1]], "line 5: found prompt 0 a second time"),
        (lambda lines: [*lines, lines[1].replace(b"length", b"error")], "line 5: found '{"),
        (lambda lines: lines[1:], "found a file that is not a journal of dovetail"),
        (lambda lines: [b"[" * 99_999], "found a file that is not a journal of dovetail"),
        (lambda lines: [lines[0].replace(b'journal": 1', b'journal": 2')], "journal of version 2"),
    ],
)
def test_a_corrupt_journal_is_refused_and_kept(
    out: Path, path: Path, spoil: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    with Journal.open(out, RUN) as journal:
        journal.append(records(0, 1, 2))
    spoilt = b"".join(line + b"\n" for line in spoil(path.read_bytes().splitlines()))
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match=message) as error:
        Journal.open(out, RUN)
    assert str(path) in str(error.value) and "--restart" in str(error.value)
    assert path.read_bytes() == spoilt
    with Journal.open(out, RUN, restart=True) as journal:
        assert not journal.done


def test_a_deleted_corrupt_line_runs_again(out: Path, path: Path) -> None:
    with Journal.open(out, RUN) as journal:
        journal.append(records(0, 1, 2))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    with Journal.open(out, RUN) as journal:
        assert list(journal.done) == [0, 2]


def test_a_file_that_is_no_journal_is_refused(out: Path, path: Path) -> None:
    path.write_text("notes")
    with pytest.raises(InputError, match="not a journal of dovetail"):
        Journal.open(out, RUN)
    assert path.read_text() == "notes"


def test_places_that_cannot_hold_the_output_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"found no folder .*missing; expected the output's folder"
    ):
        Journal.open(tmp_path / "missing" / "out.jsonl", RUN)
    with pytest.raises(InputError, match="not a plain file"):
        Journal.open(tmp_path, RUN)
    with pytest.raises(InputError, match="not a plain file"):
        Journal.open(Path("/dev/full"), RUN)
    (tmp_path / "out.jsonl.journal").mkdir()
    with pytest.raises(
        OutputError, match=r"cannot keep the journal .*Is a directory.*another --out"
    ):
        Journal.open(tmp_path / "out.jsonl", RUN)


def test_a_second_process_on_one_output_is_refused(out: Path) -> None:
    with Journal.open(out, RUN) as journal:
        with pytest.raises(InputError, match=r"in use by another process; expected one run per"):
            Journal.open(out, RUN)
        with pytest.raises(InputError, match="in use by another process"):
            Journal.open(out, RUN, restart=True)
        journal.append(records(0))
    Journal.open(out, RUN).close()


def test_a_journal_replaced_before_the_lock_is_opened_anew(
    out: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal.open(out, RUN).close()
    lock = fcntl.flock
    calls: list[int] = []

    def complete_first(fd: int, operation: int) -> None:
        # What another run does that completes between this one's open and lock.
        if not calls:
            os.replace(shutil.copy(path, path.with_suffix(".copy")), path)
        calls.append(fd)
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", complete_first)
    with Journal.open(out, RUN) as journal:
        journal.append(records(0))
    assert len(calls) == 2
    with Journal.open(out, RUN) as journal:
        assert list(journal.done) == [0]


def test_a_link_is_followed(out: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    with Journal.open(link, RUN) as journal:
        journal.append(records(0))
        journal.finish([0])
    assert link.is_symlink() and indices_in(out) == [0]
