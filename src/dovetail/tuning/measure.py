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

import numpy

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
EARLIEST = 0.3
"""The share of the work before which no candidate is given up."""
MARGIN, EARLY_MARGIN = 1.08, 0.3
"""A candidate is given up where it took this many times the seconds that it may take, and early on
this much more: one run is off by some percent, and so are the shares of the work."""


@dataclass(slots=True)
class Pairs:
    """A candidate's samples beside the default's, in seconds, and how it ended."""

    state: State
    samples: list[float]
    defaults: list[float]
    note: str = ""
    error: float | None = None
    answer: Answer | None = None

    @property
    def ratios(self) -> list[float]:
        """Each sample over the default's beside it."""
        return [s / d for s, d in zip(self.samples, self.defaults, strict=True)]


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a candidate is timed: in ``most`` pairs at most.

    It ends after the first pair whose ratio exceeds ``worth``, after one that makes ``enough`` of
    the ratios so far, where ``left`` says that there are no seconds left for another pair, and as
    throttled where the default takes ``disturbed`` times its median. With ``shared`` the first run
    may stand beside a run of the default that was made for another candidate. ``done`` are shares
    of the work by step: one that is behind the default by more than ``worth`` and a margin is
    stopped half-way.
    """

    most: int
    worth: float = math.inf
    disturbed: float = DISTURBED
    shared: bool = False
    done: tuple[float, ...] = ()
    enough: Callable[[Sequence[float]], bool] = lambda ratios: False
    left: Callable[[], float] = lambda: math.inf


class Measurer:
    """Runs candidates in a worker process; a context manager.

    ``share`` of the seconds of setting up count, since a sample of the workload is that share of
    the whole, which sets up once. ``default_done`` are the shares of the work that the default has
    done after each step, by which candidates are given up half-way.
    """

    def __init__(self, folder: Path, untuned: Sequence[Move], job: Job, share: float) -> None:
        self._folder, self._share = folder, share
        self._untuned = tuple(untuned)
        (folder / JOB_FILE).write_text(json.dumps(codec.encode(job)))
        self._process: subprocess.Popen[str] | None = None
        self._defaults: list[float] = []
        self._walls: list[float] = []
        self._last: float | None = None
        self._pace: list[float] = []
        self.classes: dict[str, float] = {}
        self.reference: Answer | None = None
        self.default_done: tuple[float, ...] = ()

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
        return self.seconds(self._whole(moves))

    def _whole(self, moves: Sequence[Move]) -> Answer:
        self._last = None
        answer = self._run(Ask(tuple(moves)))
        if answer.state != "ok":
            raise DovetailError(f"a schedule stopped running: {answer.state}: {answer.note}")
        return answer

    def change(self, job: Job, share: float) -> None:
        """Run other prompts from the next reference on."""
        (self._folder / JOB_FILE).write_text(json.dumps(codec.encode(job)))
        self._share, self._last = share, None
        self._defaults, self._walls = [], []

    def default(self) -> float:
        """Seconds of one more run of the default."""
        begin = time.monotonic()
        answer = self._whole(self._untuned)
        self._walls.append(time.monotonic() - begin)
        self._pace = [end / answer.steps[-1] for end in answer.steps]
        found = self._last = self.seconds(answer)
        self._defaults.append(found)
        return found

    @property
    def typical(self) -> float:
        """The median of the default's seconds so far; of a lucky run too little would be made of
        all that follow."""
        return statistics.median(self._defaults) if self._defaults else math.inf

    @property
    def wall(self) -> float:
        """The median of the default's seconds from request to answer, all set-up included."""
        return statistics.median(self._walls) if self._walls else math.inf

    def pairs(self, moves: Sequence[Move], terms: Terms) -> Pairs:
        """Pairs of the default and these moves, first one, then the other ahead."""
        found = Pairs("ok", [], [])
        begin = terms.left()
        for number in range(terms.most):
            if number and terms.left() < (begin - terms.left()) / number:
                return found
            ahead = self._ahead(number, shared=terms.shared)
            answer = self._candidate(tuple(moves), ahead, terms, explain=found.answer is None)
            if answer.state != "ok":
                return Pairs(answer.state, [], [], answer.note, answer.error)
            beside = self.default() if ahead is None else ahead
            found.answer = found.answer or answer
            found.error = max(found.error or 0.0, answer.error or 0.0)
            found.samples.append(self.seconds(answer))
            found.defaults.append(beside)
            if beside > terms.disturbed * self.typical:
                found.state = "throttled"
                found.note = f"the default took {beside / self.typical:.2f} times its median"
                return found
            if found.ratios[-1] > terms.worth or terms.enough(found.ratios):
                return found
        return found

    def _ahead(self, number: int, *, shared: bool) -> float | None:
        """The default's run ahead of the candidate's; None if it comes after it."""
        if number % 2:
            return None
        return self._last if shared and not number else self.default()

    def _candidate(
        self, moves: tuple[Move, ...], ahead: float | None, terms: Terms, *, explain: bool
    ) -> Answer:
        usual = max(self.typical, ahead or 0.0)
        # Of its first pair only: one that was nearly the best is not given up for a slow second.
        deadlines = self._deadlines(terms, usual) if terms.done and explain else ()
        self._last = None
        return self._run(Ask(moves, HOPELESS * usual, deadlines, explain=explain))

    def _deadlines(self, terms: Terms, usual: float) -> tuple[float, ...]:
        """When each step has to be over: as far as the default was when it had done the same share
        of its work."""
        assert self.reference is not None and len(self.default_done) == len(self._pace)
        shares, pace = [0.0, *self.default_done], [0.0, *self._pace]
        seconds = usual - self._share * self.reference.setup_seconds
        least = min(terms.worth, HOPELESS)
        found = []
        for share in terms.done:
            margin = MARGIN + EARLY_MARGIN * (1 - share)
            there = float(numpy.interp(share, shares, pace))
            found.append(margin * least * seconds * there if share >= EARLIEST else math.inf)
        return tuple(found)

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
