"""The tuner's side of its worker: runs candidates in turn with the default, and in bounded time."""

import json
import math
import os
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from dovetail.ir import codec
from dovetail.ir.errors import DovetailError
from dovetail.ir.moves import Move
from dovetail.tuning.worker import JOB_FILE, Answer, Ask, Job
from dovetail.tuning_db.facts import State

HOPELESS = 2.0
"""A candidate is stopped after this many times the default's seconds."""
GRACE_SECONDS = 60.0
"""A worker that says nothing for this long beyond its limit is ended."""
DISTURBED = 1.5
"""Where the default takes this many times its median, something else slowed the machine."""


@dataclass(slots=True)
class Pairs:
    """A candidate's samples beside the default's, in seconds, and how it ended."""

    state: State
    samples: list[float]
    defaults: list[float]
    note: str = ""
    error: float | None = None
    answer: Answer | None = None


class Measurer:
    """Runs candidates in a worker process; a context manager.

    ``share`` of the seconds of setting up count, since a sample of the workload is that share of
    the whole, which sets up once.
    """

    def __init__(self, folder: Path, untuned: Sequence[Move], job: Job, share: float) -> None:
        self._folder, self._share = folder, share
        self._untuned = tuple(untuned)
        (folder / JOB_FILE).write_text(json.dumps(codec.encode(job)))
        self._process: subprocess.Popen[str] | None = None
        self._defaults: list[float] = []
        self.classes: dict[str, float] = {}
        self.reference: Answer | None = None

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def worker(self) -> int | None:
        """The worker's pid."""
        return None if self._process is None else self._process.pid

    def start_reference(self) -> Answer:
        """Run the default once, to warm up and for outputs to be compared with; raises
        DovetailError if even that does not run."""
        answer = self._run(Ask(self._untuned, reference=True, explain=True))
        if answer.state != "ok":
            raise DovetailError(f"the untuned plan does not run: {answer.state}: {answer.note}")
        self.reference, self.classes = answer, dict(answer.classes)
        return answer

    def seconds(self, answer: Answer) -> float:
        """The seconds that an answer's run counts for."""
        return answer.seconds - answer.setup_seconds * (1 - self._share)

    def once(self, moves: Sequence[Move]) -> float:
        """Seconds of one run of these moves; raises DovetailError if they do not run."""
        answer = self._run(Ask(tuple(moves)))
        if answer.state != "ok":
            raise DovetailError(f"a schedule stopped running: {answer.state}: {answer.note}")
        return self.seconds(answer)

    def default(self) -> float:
        """Seconds of one more run of the default."""
        found = self.once(self._untuned)
        self._defaults.append(found)
        return found

    @property
    def typical(self) -> float:
        """The median of the default's seconds so far; of a lucky run too little would be made of
        all that follow."""
        return statistics.median(self._defaults) if self._defaults else math.inf

    def pairs(
        self,
        moves: Sequence[Move],
        most: int,
        worth: float = math.inf,
        disturbed: float = DISTURBED,
        left: Callable[[], float] = lambda: math.inf,
    ) -> Pairs:
        """Up to ``most`` pairs of the default and these moves, first one, then the other ahead.

        Stops after the first pair whose ratio exceeds ``worth``, where ``left`` says that there are
        no seconds left for another pair, and as throttled where the default takes ``disturbed``
        times its median.
        """
        found = Pairs("ok", [], [])
        begin = left()
        for number in range(most):
            if number and left() < (begin - left()) / number:
                return found
            ahead = self.default() if number % 2 == 0 else None
            limit = HOPELESS * max(self.typical, ahead or 0.0)
            explain = found.answer is None
            answer = self._run(Ask(tuple(moves), limit=limit, explain=explain))
            if answer.state != "ok":
                return Pairs(answer.state, [], [], answer.note, answer.error)
            beside = self.default() if ahead is None else ahead
            found.answer = found.answer or answer
            found.error = max(found.error or 0.0, answer.error or 0.0)
            found.samples.append(self.seconds(answer))
            found.defaults.append(beside)
            if beside > disturbed * self.typical:
                found.state = "throttled"
                found.note = f"the default took {beside / self.typical:.2f} times its median"
                return found
            if found.samples[-1] > worth * beside:
                return found
        return found

    def _begin(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dovetail.tuning.worker", str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C in a terminal goes to a whole group: it is for us, and we end the worker.
            process_group=0,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        if not self._line(None):
            raise DovetailError(f"the tuner's worker ended at once, exit code {self._end()}")

    def _end(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None and process.stdout is not None
        process.kill()
        process.stdin.close()
        process.stdout.close()
        return process.wait()

    def _run(self, ask: Ask) -> Answer:
        if self._process is None:
            self._begin()
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(codec.encode(ask)) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._gone()
        line = self._line(ask.limit + GRACE_SECONDS if ask.limit else None)
        if line is None:
            self._end()
            return Answer("timeout", f"no answer {GRACE_SECONDS:g} s after its limit")
        if not line:
            return self._gone()
        found = json.loads(line)
        if "error" in found:
            raise DovetailError(f"the tuner's worker: {found['error']}")
        return codec.decode(found["answer"], Answer)

    def _line(self, seconds: float | None) -> str | None:
        """The worker's next line, "" if it is gone, None if it takes longer than ``seconds``."""
        assert self._process is not None and self._process.stdout is not None
        deadline = None if seconds is None else time.monotonic() + seconds
        text = b""
        stream = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while not text.endswith(b"\n"):
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not selector.select(left):
                    return None
                piece = os.read(stream, 1 << 16)
                if not piece:
                    return ""
                text += piece
        return text.decode("utf-8")

    def _gone(self) -> Answer:
        """The answer where there is none: the candidate ended the worker."""
        code = self._end()
        if code == -9:
            return Answer("out_of_memory", "the system ended the worker (signal 9)")
        return Answer("compile_error", f"the worker ended with exit code {code}")
