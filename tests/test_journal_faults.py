"""The journal on disks that are full or fail, and under kills at any moment."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.journal_cases import RUN, indices_in, record, records

from dovetail.ir.errors import OutputError
from dovetail.journal import Journal
from dovetail.journal_lines import Record


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def path(out: Path) -> Path:
    return out.with_name("out.jsonl.journal")


# Full disks.


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator["Disk"]:
    disk = Disk()
    monkeypatch.setattr(os, "write", disk.write)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    monkeypatch.setattr(os, "replace", disk.replace)
    yield disk


class Disk:
    """Stands before os with ``room`` bytes left for os.write, and calls in ``failing`` refused."""

    def __init__(self) -> None:
        self.room = 1 << 30
        self.failing = ""
        self._write, self._fsync, self._replace = os.write, os.fsync, os.replace

    def write(self, fd: int, data: bytes) -> int:
        if not self.room:
            if self.failing == "interrupt":
                raise KeyboardInterrupt
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self._write(fd, data[: self.room])
        self.room -= count
        return count

    def fsync(self, fd: int) -> None:
        if self.failing == "fsync":
            self.failing = ""
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(fd)

    def replace(self, source: Path, target: Path) -> None:
        if self.failing == "replace":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._replace(source, target)


def test_a_full_disk_keeps_every_whole_record(out: Path, path: Path, disk: Disk) -> None:
    with Journal.open(out, RUN) as journal:
        journal.append(records(0, 1))
        size = path.stat().st_size
        line = len(json.dumps(vars_of(record(2)), ensure_ascii=False).encode()) + 1
        disk.room = line + 10
        with pytest.raises(OutputError) as error:
            journal.append(records(2, 3))
        assert str(error.value) == (
            f"cannot write the results of {out}: No space left on device; 3 prompts are finished "
            f"and kept in {path}: free some space and run the same command again"
        )
        assert path.stat().st_size == size + line
        assert list(journal.done) == [0, 1, 2]
        with pytest.raises(OutputError, match="3 prompts are finished"):
            journal.append(records(3))
        disk.room = 1 << 20
        journal.append(records(3))
        assert journal.done[3] == record(3)
    with Journal.open(out, RUN) as journal:
        journal.finish(range(4))
    assert indices_in(out) == [0, 1, 2, 3]


def vars_of(result: Record) -> dict[str, object]:
    return {name: getattr(result, name) for name in Record.__slots__}


def test_a_failed_fsync_keeps_what_was_durable_before(out: Path, disk: Disk) -> None:
    with Journal.open(out, RUN) as journal:
        journal.append(records(0))
        disk.failing = "fsync"
        with pytest.raises(OutputError, match=r"Input/output error; 1 prompt is finished"):
            journal.append(records(1, 2))
        assert list(journal.done) == [0]
        journal.append(records(2, 1))
        journal.finish(range(3))
    assert indices_in(out) == [0, 1, 2]


def test_an_interrupted_append_can_be_continued(out: Path, disk: Disk) -> None:
    with Journal.open(out, RUN) as journal:
        disk.failing, disk.room = "interrupt", 120
        with pytest.raises(KeyboardInterrupt):
            journal.append(records(0, 1))
        assert list(journal.done) == [0]
        disk.room = 1 << 20
        journal.append(records(1))
    with Journal.open(out, RUN) as journal:
        assert list(journal.done) == [0, 1]


@pytest.mark.parametrize("failing", ["fsync", "replace", "write"])
def test_a_full_disk_at_the_end_keeps_the_journal(
    out: Path, path: Path, disk: Disk, failing: str
) -> None:
    with Journal.open(out, RUN) as journal:
        journal.append(records(1, 0))
        disk.failing = failing
        disk.room = 5 if failing == "write" else disk.room
        with pytest.raises(OutputError, match="2 prompts are finished and kept"):
            journal.finish(range(2))
    assert sorted(out.parent.iterdir()) == [path]
    disk.failing, disk.room = "", 1 << 20
    with Journal.open(out, RUN) as journal:
        assert list(journal.done) == [1, 0]
        journal.finish(range(2))
    assert indices_in(out) == [0, 1]


def test_a_full_disk_at_the_start_is_an_output_error(out: Path, disk: Disk) -> None:
    disk.room = 5
    with pytest.raises(OutputError, match=r"cannot keep the journal .*No space left on device"):
        Journal.open(out, RUN)
    disk.room = 1 << 20
    Journal.open(out, RUN).close()


# Kills. The worker finishes prompts in a shuffled order, like a run whose prompts stop early.

WORKER = textwrap.dedent(
    """
    import os, random, sys
    from pathlib import Path
    from dovetail.journal import Journal
    from dovetail.journal_lines import Record

    out, total = Path(sys.argv[1]), int(sys.argv[2])

    def run():
        with Journal.open(out, {"run": 1}) as journal:
            print("open", flush=True)
            if journal.complete:
                return
            left = [i for i in range(total) if i not in journal.done]
            random.shuffle(left)
            while left:
                batch, left = left[:3], left[3:]
                journal.append(
                    [Record(i, f"p{i}", 3, (i, 7), f"t\\u00ebxt {i}", "length") for i in batch]
                )
            journal.finish(range(total))
    """
)


def start(out: Path, total: int, then: str) -> "subprocess.Popen[str]":
    """Start the worker and, in the same process, what ``then`` does with it."""
    source = WORKER + textwrap.dedent(then)
    command = [sys.executable, "-c", source, str(out), str(total)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kill_at_random_moments_ends_with_every_prompt_once(out: Path) -> None:
    rng, total, killed = random.Random(0), 3000, 0
    for _ in range(20):
        with start(out, total, "run()") as worker:
            assert worker.stdout is not None
            worker.stdout.readline()
            time.sleep(rng.uniform(0, 0.02))
            worker.send_signal(signal.SIGKILL)
        killed += worker.returncode == -signal.SIGKILL
    assert killed
    with start(out, total, "run()") as worker:
        _, errors = worker.communicate()
    assert worker.returncode == 0, errors
    assert indices_in(out) == list(range(total))


def test_kill_at_every_system_call_ends_with_every_prompt_once(out: Path) -> None:
    # Forks inside the worker, which has no threads: each child dies at its own n-th call, writes
    # half done; the next one dies one call later or ends, from whatever state it found.
    then = """
    import json, signal

    def run_until(deadly):
        calls = 0
        def counted(name, call):
            def inner(*args):
                nonlocal calls
                calls += 1
                if calls == deadly:
                    if name == "write":
                        call(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)
            return inner
        for name in ("open", "write", "fsync", "ftruncate", "replace", "unlink", "pread", "close"):
            setattr(os, name, counted(name, getattr(os, name)))
        run()

    def child(deadly):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run_until(deadly)
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code) if code == 0 else None
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    ended = False
    kills = 0
    for first in range(1, 200):
        for name in os.listdir(out.parent):
            os.unlink(out.parent / name)
        code = child(first)
        if code == 0:
            ended = True
            break
        assert code == -9, code
        kills += 1
        # A second kill on the way out of the first, then a run to the end, then a no-op.
        assert child(1 + first % 7) in (0, -9)
        for _ in range(2):
            assert child(0) == 0
        rows = [json.loads(line)["index"] for line in out.read_bytes().splitlines()]
        assert rows == list(range(total)), (first, rows)
        assert len(os.listdir(out.parent)) == 2, os.listdir(out.parent)
    assert ended and kills > 20, kills
    """
    with start(out, 8, then) as worker:
        _, errors = worker.communicate()
    assert worker.returncode == 0, errors


def test_a_file_size_limit_is_met_like_a_full_disk(out: Path) -> None:
    then = f"""
    import resource
    _, hard = resource.getrlimit({resource.RLIMIT_FSIZE})
    resource.setrlimit({resource.RLIMIT_FSIZE}, (10_000, hard))
    run()
    """
    with start(out, 300, then) as worker:
        _, errors = worker.communicate()
    assert "OutputError: cannot write the results of" in errors and "File too large" in errors
    kept = int(errors.split(" prompts are finished")[0].split()[-1])
    with Journal.open(out, {"run": 1}) as journal:
        assert len(journal.done) == kept > 50
    with start(out, 300, "run()") as worker:
        _, errors = worker.communicate()
    assert worker.returncode == 0, errors
    assert indices_in(out) == list(range(300))
