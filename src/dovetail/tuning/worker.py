"""The tuner's worker: a process of its own that runs candidates and says what they took.

``python -m dovetail.tuning.worker FOLDER`` reads a request as a line of JSON and answers with one.
The folder holds the untuned plan, the captured model and the prompts. A candidate that runs out of
memory or brings the process down takes the worker with it, and never the tuner; when the tuner dies
the worker's input ends, and so does the worker.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue

import numpy
import torch
from torch import Tensor

from dovetail.capture.captured import load_captured
from dovetail.checkpoint import ModelFolder
from dovetail.execute import Execution
from dovetail.ir import codec
from dovetail.ir.batching import Request, Step
from dovetail.ir.errors import BudgetError, DovetailError, VerifyError
from dovetail.ir.moves import ExpertFormat, Move, precision_of
from dovetail.ir.plan import Plan, load_plan
from dovetail.ir.program import Program
from dovetail.ir.task_graph import ITEMSIZE
from dovetail.ir.units import format_bytes
from dovetail.passes.apply_moves import Layout
from dovetail.passes.cost import Costs
from dovetail.passes.simulate import Simulator
from dovetail.planning import PLAN_FILE
from dovetail.precision.of_plan import plan_index
from dovetail.routing.guard import LoadCounter, expert_counts
from dovetail.runtime.sampling import Sampling
from dovetail.tuning_db.facts import State

JOB_FILE, REFERENCE_FILE = "job.json", "reference.npz"
PROBES = 32
"""So many logits of every new token are compared, spread over the vocabulary."""
TOLERANCES = {4: 1e-3, 2: 0.1}
"""Largest error of the logits, as a share of their root mean square, by bytes of the type: a
reordered sum in float32 moves them by 1e-6; 16-bit types by some percent, where a router chooses
another expert for it by more; another model's logits by more than 1."""

ALLOWED: Mapping[ExpertFormat, float] = {"int8": 0.3, "int4": 0.7}
"""The same where experts of either run are in fewer bits. This finds errors, not loss of quality:
that is the user's to judge, who allowed it; the plan says by how much outputs differ."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every candidate runs: prompts (token ids) and the new tokens of each, which are always
    made in full."""

    checkpoint: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: run these moves. After ``limit`` seconds it is stopped, and after step i of the
    workload where ``deadlines[i]`` seconds have passed since the first began. A ``reference`` run
    is what outputs are compared with, and reads the prompts anew; ``explain`` asks for the cost
    model's figures too."""

    moves: tuple[Move, ...]
    limit: float = 0.0
    deadlines: tuple[float, ...] = ()
    reference: bool = False
    explain: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a candidate took. ``classes`` has busy seconds as the recorder names them; ``work`` the
    measured ones and those predicted, without corrections, by the classes that corrections are
    kept by; ``steps`` the seconds from the first step's beginning to the end of each; ``skew`` is
    the busiest expert's load over the mean. One that was stopped has the ``steps`` that it made."""

    state: State
    note: str = ""
    setup_seconds: float = 0.0
    seconds: float = 0.0
    rss_bytes: int = 0
    tokens: int = 0
    error: float | None = None
    classes: Mapping[str, float] = field(default_factory=dict)
    work: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    steps: tuple[float, ...] = ()
    skew: float = 0.0


class Probe:
    """Keeps some logits of every new token: ``[tokens, PROBES]`` by request."""

    def __init__(self, vocab: int) -> None:
        self._columns = torch.linspace(0, vocab - 1, PROBES).long()
        self._found: dict[tuple[int, int], Tensor] = {}
        self.tokens: dict[tuple[int, int], int] = {}

    def __call__(self, who: Sequence[tuple[int, int]], logits: Tensor) -> None:
        """See what the executor shows."""
        kept = logits[:, self._columns].float()
        tokens = logits.argmax(-1).tolist()
        for one, row, token in zip(who, kept, tokens, strict=True):
            self._found[one], self.tokens[one] = row, token

    def save(self, path: Path) -> None:
        """Keep everything in a file."""
        keys = sorted(self._found)
        numpy.savez(
            path,
            keys=numpy.array(keys),
            tokens=numpy.array([self.tokens[key] for key in keys]),
            rows=torch.stack([self._found[key] for key in keys]).numpy(),
        )

    def error(self, path: Path) -> float:
        """The error against the file's logits, over the tokens whose past is the same in both: the
        root mean square of the differences over that of the logits. Infinite if a token is missing.
        """
        with numpy.load(path) as data:
            keys = [tuple(key) for key in data["keys"].tolist()]
            tokens, rows = data["tokens"].tolist(), torch.from_numpy(data["rows"])
        if set(keys) != set(self._found):
            return float("inf")
        apart: dict[int, int] = {}
        difference = size = 0.0
        for (index, number), token, row in zip(keys, tokens, rows, strict=True):
            if apart.get(index, number) < number:
                continue
            here = self._found[index, number]
            difference += float((here - row).square().sum())
            size += float(row.square().sum())
            if self.tokens[index, number] != token:
                apart[index] = number
        return (difference / size) ** 0.5 if size else 0.0


class Worker:
    """Runs candidates in this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plan = load_plan(folder / PLAN_FILE)
        self._captured = load_captured(folder)
        self._reference_bytes = 0
        self._read_job()
        self._model = ModelFolder.open(Path(self._job.checkpoint))

    def _read_job(self) -> None:
        self._job = codec.decode(json.loads((self._folder / JOB_FILE).read_text()), Job)
        numbers = zip(self._job.prompts, self._job.new_tokens, strict=True)
        self._requests = [Request(i, len(ids), new) for i, (ids, new) in enumerate(numbers)]

    def run(self, ask: Ask) -> Answer:
        """Run a candidate; failures that are its own are answers, all others are raised."""
        if ask.reference:
            self._read_job()
        plan = replace(self._plan, moves=ask.moves)
        try:
            return self._timed(plan, ask)
        except VerifyError as error:
            return Answer("invalid", str(error))
        except (BudgetError, MemoryError) as error:
            return Answer("out_of_memory", str(error))
        except (SyntaxError, NameError, TypeError, RuntimeError) as error:
            return Answer("compile_error", f"{type(error).__name__}: {error}")

    def _timed(self, plan: Plan, ask: Ask) -> Answer:
        probe = Probe(self._model.vocab)
        counter = LoadCounter(expert_counts(self._captured.graph))
        execution = Execution(
            plan,
            self._captured,
            plan_index(self._model, self._captured.graph, plan.moves),
            Sampling(),
            (),
            self._folder / "executor.py",
            counter if ask.reference else None,
        )
        execution.observe(probe)
        ids = self._job.prompts
        ends: list[float] = []
        stopped = ""
        begin = time.perf_counter()
        with execution:
            first = time.perf_counter()
            for _ in execution.steps(self._requests, ids.__getitem__):
                ends.append(time.perf_counter() - first)
                stopped = _hopeless(ask, ends, time.perf_counter() - begin)
                if stopped:
                    break
        measured = execution.measured
        if stopped:
            return Answer("timeout", stopped, steps=tuple(ends))
        answer = Answer(
            "ok",
            setup_seconds=measured.setup_seconds,
            seconds=measured.seconds,
            rss_bytes=measured.rss_bytes,
            tokens=measured.tokens,
            classes=measured.classes,
            steps=tuple(ends),
            skew=counter.skew,
        )
        if ask.explain:
            found = work_of(plan, execution.program, execution.layout, execution.steps_run)
            answer = replace(answer, work=found(measured.classes))
        return self._checked(answer, probe, plan, ask)

    def _checked(self, answer: Answer, probe: Probe, plan: Plan, ask: Ask) -> Answer:
        """The answer, or what is wrong with what the candidate made or held."""
        path = self._folder / REFERENCE_FILE
        if ask.reference:
            probe.save(path)
            self._reference_bytes = answer.rss_bytes
            return replace(answer, error=0.0)
        error = probe.error(path)
        answer = replace(answer, error=error)
        forms = {precision_of(moves) for moves in (plan.moves, self._plan.moves)}
        own = TOLERANCES[ITEMSIZE[self._captured.graph.dtype]]
        allowed = max([own, *(ALLOWED[form] for form in forms if form is not None)])
        if not error <= allowed:
            note = f"logits differ by {error:.2g} of their size, allowed are {allowed:g}"
            return replace(answer, state="wrong_result", note=note)
        allowed_bytes = max(plan.budget["ram"], self._reference_bytes)
        if answer.rss_bytes > allowed_bytes:
            held, budget = format_bytes(answer.rss_bytes), format_bytes(allowed_bytes)
            note = f"held {held}, the budget or the untuned plan {budget}"
            return replace(answer, state="out_of_memory", note=note)
        return answer


def _hopeless(ask: Ask, ends: Sequence[float], seconds: float) -> str:
    """Why a run is not worth its end; empty if it is."""
    if ask.limit and seconds > ask.limit:
        return f"stopped after {ask.limit:.3g} s"
    if len(ends) < len(ask.deadlines) and ends[-1] > ask.deadlines[len(ends) - 1]:
        return f"stopped after {len(ends)} of {len(ask.deadlines)} steps: too slow to be the best"
    return ""


def work_of(
    plan: Plan, program: Program, layout: Layout, steps: Sequence[Step]
) -> Callable[[Mapping[str, float]], dict[str, tuple[float, float]]]:
    """What sets measured seconds by class of work beside those that the machine's curves,
    uncorrected, predict for these steps."""
    machine = replace(plan.machine, corrections={})
    predicted = Simulator(layout, machine, Costs(machine)).predict_steps(steps).classes
    over = {segment.name: segment.over for segment in program.segments}

    def beside(measured: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}
        for name, seconds in measured.items():
            kind, _, what = name.partition(":")
            if kind in ("load", "run") and name in predicted:
                work = f"{kind}:{over.get(what, what)}"
                before = found.get(work, (0.0, 0.0))
                found[work] = (before[0] + seconds, before[1] + predicted[name])
        return found

    return beside


def requests(lines: "SimpleQueue[str]") -> Iterator[Ask]:
    """The requests of the tuner, until its end of the pipe closes."""
    while line := lines.get():
        yield codec.decode(json.loads(line), Ask)


def _read(lines: "SimpleQueue[str]") -> None:
    """Read the input as it comes, and end the process at once when the tuner is gone."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def main() -> int:
    """Answer requests until the input ends."""
    # Answers go where standard output went; what libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    worker = Worker(Path(sys.argv[1]))
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    for ask in requests(lines):
        try:
            found: dict[str, object] = {"answer": codec.encode(worker.run(ask))}
        except (DovetailError, OSError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
