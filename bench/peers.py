"""The peers: accelerate's disk offload and plain transformers, each in a process of its own.

A peer process loads its model once and then runs jobs; it and the bench exchange one JSON object a
line. A job that is killed for memory ends the process, not the bench.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import host

DISK, RESIDENT = "disk", "resident"
EXPERTS = ("grouped_mm", "eager")
"""transformers' ways to run experts; batched_mm copies the weights of every routed token."""
_MEMORY_SHARE = 0.9
"""A batch that is expected to need more of the available memory than this is not tried."""


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """A peer: ``mode`` is DISK (accelerate keeps ``budget`` bytes of weights in ram and the rest in
    ``offload_folder``) or RESIDENT (plain transformers, everything in ram)."""

    mode: str
    checkpoint: str
    dtype: str
    budget: int = 0
    offload_folder: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts to finish greedily in batches of ``batch``, padded on the left, in this order."""

    prompts: dict[int, list[int]]
    batch: int
    new_tokens: int
    threads: int
    experts: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job took. Seconds are without those spent on dropping the page cache. Memory is above
    the process's own before the model was loaded."""

    batch: int
    threads: int
    experts: str
    tokens: int
    seconds: float
    prefill_seconds: list[float]
    decode_steps: list[tuple[int, float]]
    """Sequences and seconds of every decode step."""
    peak_bytes: int
    anonymous_bytes: int
    read_bytes: int
    own_cores: float
    other_cores: float
    answers: dict[int, list[int]]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the whole job."""
        return self.tokens / self.seconds

    @property
    def decode_rate(self) -> float:
        """Tokens per second of the median decode step; 0 if there was none."""
        return statistics.median([n / s for n, s in self.decode_steps] or [0.0])

    @property
    def decode_seconds(self) -> float:
        """Seconds of the median decode step; 0 if there was none."""
        return statistics.median([s for _, s in self.decode_steps] or [0.0])

    def rate_for(self, new_tokens: int) -> float:
        """Tokens per second to expect when every sequence gets ``new_tokens``."""
        sequences = len(self.answers)
        decode = (new_tokens - 1) * sequences / self.decode_rate if new_tokens > 1 else 0.0
        return sequences * new_tokens / (sum(self.prefill_seconds) + decode)

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON data, answers left out."""
        data = asdict(self)
        del data["answers"]
        rates = {"tokens_per_second": self.tokens_per_second, "decode_rate": self.decode_rate}
        return data | rates


class PeerDiedError(Exception):
    """The peer's process ended; the text says how."""


@dataclass(slots=True)
class Peer:
    """A running peer process; a context manager. ``loaded`` is what loading took."""

    spec: PeerSpec
    log: Path
    loaded: dict[str, Any] = field(default_factory=dict)
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        program = Path(__file__).with_name("peer_process.py")
        with self.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.loaded = self._ask(asdict(self.spec))

    def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        self._process = None
        assert process.stdin is not None and process.stdout is not None
        # What is still in the pipe of a process that died cannot be flushed.
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
        process.stdout.close()

    def run(self, job: Job) -> Outcome:
        """Run one job, in a new process if an earlier job ended the last one. Raises
        PeerDiedError."""
        if self._process is None:
            self._start()
        return decode_outcome(self._ask(asdict(job)))

    def held_bytes(self) -> int:
        """Anonymous memory that the peer holds now."""
        assert self._process is not None
        return host.resident_bytes(self._process.pid)[1]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        # A process that died is noticed by the answer that does not come.
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            self._stop()
            last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
            raise PeerDiedError(
                f"the peer ended with code {process.returncode} (-9: killed, as a rule for "
                f"memory); its last words: {' '.join(last)[-200:] or 'none'}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def decode_job(data: dict[str, Any]) -> Job:
    """A job from JSON, in which the keys of objects are text."""
    return Job(**data | {"prompts": {int(i): ids for i, ids in data["prompts"].items()}})


def decode_outcome(data: dict[str, Any]) -> Outcome:
    """An outcome from JSON, in which the keys of objects are text."""
    return Outcome(**data | {"answers": {int(i): ids for i, ids in data["answers"].items()}})


@dataclass(slots=True)
class Sweep:
    """Tries of a peer's batch sizes and expert implementations, and notes on what was not tried."""

    new_tokens: int
    outcomes: list[Outcome] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Outcome:
        """The try with the best rate for the number of tokens that will be asked for."""
        return max(self.outcomes, key=lambda outcome: outcome.rate_for(self.new_tokens))

    def as_dict(self) -> dict[str, Any]:
        """The sweep as JSON data."""
        rows = [o.as_dict() | {"expected_rate": o.rate_for(self.new_tokens)} for o in self.outcomes]
        return {"tries": rows, "notes": self.notes}


def sweep(
    peer: Peer,
    job_of: Callable[[int, str], Job],
    batches: Sequence[int],
    experts: Sequence[str],
    new_tokens: int,
) -> Sweep:
    """Try growing batches until one does not fit or the rate falls, with the first way to run
    ``experts``, then the other ways at the best one. ``job_of(batch, experts)`` makes a short job.
    Raises PeerDiedError if not even the smallest batch works."""
    found = Sweep(new_tokens)
    for batch in sorted(batches):
        needed = expected_bytes(found.outcomes, batch)
        if needed > _MEMORY_SHARE * (host.available_bytes() + peer.held_bytes()):
            found.notes.append(f"batch {batch} not tried: expected to need {needed / 1e9:.1f} GB")
            break
        if not _try(found, peer, job_of(batch, experts[0])):
            break
        if len(found.outcomes) > 1 and _falling(found):
            break
    if not found.outcomes:
        raise PeerDiedError(found.notes[0])
    best = found.best.batch
    for other in experts[1:]:
        _try(found, peer, job_of(best, other))
    return found


def _try(found: Sweep, peer: Peer, job: Job) -> bool:
    try:
        found.outcomes.append(peer.run(job))
    except PeerDiedError as error:
        found.notes.append(f"batch {job.batch} with {job.experts} experts failed: {error}")
        return False
    return True


def _falling(found: Sweep) -> bool:
    before, last = (outcome.rate_for(found.new_tokens) for outcome in found.outcomes[-2:])
    return last < 0.95 * before


def expected_bytes(outcomes: Sequence[Outcome], batch: int) -> float:
    """Anonymous memory that a batch will need, from the growth so far; 0 for the first one."""
    if not outcomes:
        return 0.0
    last = outcomes[-1]
    if len(outcomes) == 1:
        return float(last.anonymous_bytes * batch / last.batch)
    before = outcomes[-2]
    growth = (last.anonymous_bytes - before.anonymous_bytes) / (last.batch - before.batch)
    return last.anonymous_bytes + max(0.0, growth) * (batch - last.batch)
