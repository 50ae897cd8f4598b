"""A run that is killed at any moment continues with the same command, and ends the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.support import machine, ragged_prompts, tiny_model

from dovetail.cli import main
from dovetail.machine_files import save_machine

PROMPTS, NEW = 100, 16
PATIENCE = 120.0
"""Seconds to wait for anything before the test fails."""


@dataclass(frozen=True)
class Job:
    """A command that takes long enough to be killed, and what it gives undisturbed."""

    folder: Path
    undisturbed: bytes = b""

    def command(self, out: str, *options: str) -> list[str]:
        """The run, sampled from a seed, one sequence after the other."""
        words = f"run checkpoint --prompts in.jsonl --out {out} --max-new-tokens {NEW}"
        words += " --budget 4MiB --policy weight_stream --machine machine.json"
        words += " --temperature 1 --seed 5 --ignore-eos"
        return [sys.executable, "-m", "dovetail.cli", *words.split(), *options]

    def finish(self, out: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            self.command(out, *options),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    @contextmanager
    def started(self, out: str) -> Iterator[subprocess.Popen[str]]:
        """The running command, in a group of its own, killed at the end."""
        process = subprocess.Popen(
            self.command(out),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # What runs in a shell's background is told to ignore Ctrl-C, and hands that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def journal(self, out: str) -> Path:
        """The journal of the output."""
        return self.folder / f"{out}.journal"

    def finished(self, out: str) -> int:
        """How many prompts the journal holds."""
        path = self.journal(out)
        return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0

    def wait_for(self, process: subprocess.Popen[str], out: str, prompts: int) -> None:
        """Wait until the journal holds that many finished prompts."""
        deadline = time.monotonic() + PATIENCE
        while self.finished(out) < prompts and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def check(self, out: str) -> None:
        """Every prompt is there exactly once, with the tokens of an undisturbed run."""
        found = (self.folder / out).read_bytes()
        assert [json.loads(line)["index"] for line in found.splitlines()] == list(range(PROMPTS))
        assert found == self.undisturbed
        assert len(self.journal(out).read_bytes().splitlines()) == 2, "header and receipt"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A tiny OLMoE checkpoint with enough prompts for some seconds."""
    folder = tmp_path_factory.mktemp("kill")
    tiny_model("olmoe").save_pretrained(folder / "checkpoint")
    save_machine(machine(), folder / "machine.json")
    generator = random.Random(0)
    prompts = ragged_prompts([generator.randint(1, 40) for _ in range(PROMPTS)])
    lines = [json.dumps({"id": f"p{i}", "input_ids": ids}) for i, ids in enumerate(prompts)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = Job(folder).finish("undisturbed.jsonl")
    assert done.returncode == 0, done.stderr
    yield Job(folder, (folder / "undisturbed.jsonl").read_bytes())
    shutil.rmtree(folder)


def test_killed_again_and_again_it_continues(job: Job) -> None:
    """Between finished prompts, and at random moments after the one that was waited for."""
    out, generator = "killed.jsonl", random.Random(1)
    kept = 0
    for share in (0.02, 0.25, 0.5, 0.9):
        with job.started(out) as process:
            job.wait_for(process, out, int(share * PROMPTS))
            time.sleep(generator.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
        assert job.finished(out) >= kept, "what was finished is kept"
        kept = job.finished(out)
        assert not (job.folder / out).exists()
    assert 0 < kept < PROMPTS
    done = job.finish(out)
    assert done.returncode == 0, done.stderr
    assert f"{PROMPTS} ({kept} by an earlier run)" in done.stdout
    job.check(out)


@pytest.mark.parametrize("seconds", [0.3, 2.5])
def test_killed_before_it_runs_it_starts_anew(job: Job, seconds: float) -> None:
    out = f"early{seconds}.jsonl"
    with job.started(out) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
    assert job.finish(out).returncode == 0
    job.check(out)


def test_killed_while_the_output_is_put_in_place(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every state that a kill can leave at the end: the files as they are after each write."""
    out = "placed.jsonl"
    monkeypatch.chdir(job.folder)
    command = job.command(out)[3:]
    assert main(command) == 0
    receipt = job.journal(out).read_bytes().splitlines(keepends=True)
    whole = receipt[0] + job.undisturbed
    torn = job.undisturbed[: len(job.undisturbed) // 2]
    states: dict[str, tuple[bytes, bytes | None, bytes | None]] = {
        "all lines, no receipt": (whole, None, None),
        "a partial output": (whole, None, torn),
        "receipt, output not in place": (whole + receipt[1], None, job.undisturbed),
        "receipt, output in place": (whole + receipt[1], job.undisturbed, None),
        "a torn receipt": (whole + receipt[1][:20], None, job.undisturbed),
        "a torn line": (whole[:-30], None, None),
    }
    for name, (journal, output, partial) in states.items():
        (job.folder / out).unlink(missing_ok=True)
        job.journal(out).write_bytes(journal)
        if output is not None:
            (job.folder / out).write_bytes(output)
        if partial is not None:
            job.journal(out).with_name(f"{out}.journal.partial").write_bytes(partial)
        assert main(command) == 0, (name, capsys.readouterr().err)
        job.check(out)


def test_ctrl_c_says_so_and_continues(job: Job) -> None:
    out = "interrupted.jsonl"
    for prompts in (5, 40):
        with job.started(out) as process:
            job.wait_for(process, out, prompts)
            # As a terminal does: to the whole group.
            os.killpg(process.pid, signal.SIGINT)
            said = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 130
        assert "interrupted; the same command continues where it stopped" in said
        assert "Traceback" not in said, said
    kept = job.finished(out)
    # The one that was being written when the interrupt came may run again.
    assert 40 - 1 <= kept < PROMPTS
    done = job.finish(out, "--policy", "auto", "--budget", "64MiB")
    assert f"{PROMPTS} ({kept} by an earlier run)" in done.stdout
    job.check(out)


def test_ctrl_c_while_planning_leaves_no_traceback(job: Job) -> None:
    out = "planning.jsonl"
    with job.started(out) as process:
        deadline = time.monotonic() + PATIENCE
        while not children(process.pid):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130
    assert "Traceback" not in said, said
    assert "interrupted" in said


def children(pid: int) -> list[str]:
    """The child processes of a process."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_only_one_run_at_a_time_writes_an_output(job: Job) -> None:
    out = "twice.jsonl"
    with job.started(out) as process:
        job.wait_for(process, out, 1)
        # Stopped, it keeps its lock and cannot end before the second has begun.
        os.killpg(process.pid, signal.SIGSTOP)
        second = job.finish(out)
        os.killpg(process.pid, signal.SIGCONT)
        assert second.returncode == 1
        assert "in use by another process" in second.stderr
        process.wait(PATIENCE)
        assert process.returncode == 0
    job.check(out)
