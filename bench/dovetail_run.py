"""Our side: `dovetail run` in a process of its own, watched from outside, and what it reports."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import host
from workloads import read_answers, write_prompts

from dovetail.capture.captured import load_captured
from dovetail.ir.batching import Step
from dovetail.ir.machine import Machine
from dovetail.ir.moves import ExpertFormat
from dovetail.ir.plan import load_plan
from dovetail.ir.timeline import Timeline
from dovetail.ir.workload import Workload
from dovetail.machine_files import save_machine
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.simulate import workload_steps
from dovetail.planning import PLAN_FILE, Request, plan_apart
from dovetail.plans.timeline_file import REPORT_FILE, TIMELINE_FILE, read_measured

_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Task:
    """A `dovetail run` to do: the checkpoint, prompts of token ids, new tokens for each, a budget
    in bytes, and where to work. ``knobs`` fixes the policy's knobs, ``machine`` is a machine file
    ("" for this machine); experts may be in the formats that ``allow`` lists."""

    checkpoint: Path
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    budget: int
    place: Path
    policy: str = "auto"
    knobs: Mapping[str, int | bool] | None = None
    machine: str = ""
    allow: tuple[ExpertFormat, ...] = ()

    def request(self) -> Request:
        """The task as the planner takes it."""
        return Request(
            checkpoint=str(self.checkpoint),
            budget={"ram": self.budget},
            workload=Workload.of([len(p) for p in self.prompts], self.new_tokens),
            policy=self.policy,
            knobs=self.knobs,
            machine=self.machine,
            allow=self.allow,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: dovetail's report, and what was seen from outside. ``peak_bytes`` is the
    running process's peak above its own memory before the first weight was read (planning runs in
    a process before it; ``planning_bytes`` is what the two held at most meanwhile)."""

    checkpoint: str
    prompts: str
    asked: str
    """The policy that was asked for; ``report`` names the one that was chosen."""
    report: dict[str, Any]
    knobs: dict[str, int | bool]
    workers: int
    predicted_disk_bytes: int
    predicted_setup_seconds: float
    wall_seconds: float
    outside_peak_bytes: int
    planning_bytes: int
    read_bytes: int
    own_cores: float
    other_cores: float
    decode_steps: list[tuple[int, float]]
    """Sequences and seconds of the decode steps among the last ones."""
    engines: dict[str, dict[str, float]]
    """Shares of the last steps' time that each engine spent, by what it did."""
    answers: dict[int, list[int]]

    @property
    def seconds(self) -> float:
        """From before the first weight was read to the last token."""
        return float(self.report["seconds"])

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, reading resident weights included."""
        return float(self.report["tokens_per_second"])

    @property
    def loaded_rate(self) -> float:
        """Generated tokens per second from when the resident weights were in memory."""
        return float(self.report["tokens"] / (self.seconds - self.report["setup_seconds"]))

    @property
    def decode_rate(self) -> float:
        """Tokens per second of the median decode step; 0 if none of the last steps was one."""
        return statistics.median([n / s for n, s in self.decode_steps] or [0.0])

    @property
    def decode_seconds(self) -> float:
        """Seconds of the median decode step; 0 if none of the last steps was one."""
        return statistics.median([s for _, s in self.decode_steps] or [0.0])

    @property
    def policy(self) -> str:
        """The policy that ran, and whether it was chosen."""
        chosen = str(self.report["policy"])
        return chosen if self.asked == chosen else f"{self.asked} ({chosen})"

    @property
    def peak_bytes(self) -> int:
        """Peak memory above the baseline, as the run itself measured it."""
        return int(self.report["rss_bytes"])

    def as_dict(self) -> dict[str, Any]:
        """The run as JSON data, answers left out."""
        data = asdict(self)
        del data["answers"]
        rates = {"loaded_rate": self.loaded_rate, "decode_rate": self.decode_rate}
        return data | rates


def run(task: Task) -> Run:
    """Run the task through the command line. Raises subprocess.CalledProcessError."""
    task.place.mkdir(parents=True)
    prompts, out = task.place / "prompts.jsonl", task.place / "out.jsonl"
    write_prompts(task.prompts, prompts)
    arguments = _arguments(task, prompts, out)
    host.evict([task.checkpoint])
    with host.Window() as window, (task.place / "report.json").open("w") as answer:
        process = subprocess.Popen(arguments, stdout=answer)
        seen = _watch(process, out.with_name(f"{out.name}.dovetail") / "executor.py")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return _collect(task, out, window, seen)


def _arguments(task: Task, prompts: Path, out: Path) -> list[str]:
    arguments = [sys.executable, "-m", "dovetail.cli", "run", str(task.checkpoint)]
    arguments += ["--prompts", str(prompts), "--out", str(out), "--json", "--ignore-eos"]
    arguments += ["--budget", f"ram={task.budget}", "--max-new-tokens", str(task.new_tokens)]
    arguments += ["--policy", task.policy, "--machine", task.machine]
    arguments += [word for form in task.allow for word in ("--allow", form)]
    if task.knobs is not None:
        plan_apart(task.request(), task.place / "plan", _silent)
        arguments += ["--plan", str(task.place / "plan" / PLAN_FILE)]
    return arguments


def _silent(text: str) -> None:
    """Notes of the planner go nowhere."""


@dataclass(slots=True)
class _Seen:
    peak_bytes: int = 0
    planning_bytes: int = 0
    read_before: int = 0
    read_after: int = 0


def _watch(process: "subprocess.Popen[bytes]", executor: Path) -> _Seen:
    """Poll the process until it ends. The emitted executor appears between planning and running:
    what was read from disk before is not the run's."""
    seen = _Seen()
    while process.poll() is None:
        try:
            read = host.read_bytes(process.pid)
            if not executor.exists():
                family = [process.pid, *_children(process.pid)]
                held = sum(host.resident_bytes(pid)[0] for pid in family)
                seen.planning_bytes = max(seen.planning_bytes, held)
                seen.read_before = read
            else:
                seen.peak_bytes = max(seen.peak_bytes, host.resident_bytes(process.pid)[0])
            seen.read_after = read
        except (FileNotFoundError, ProcessLookupError):
            # It ended between two looks.
            pass
        time.sleep(_POLL_SECONDS)
    return seen


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _collect(task: Task, out: Path, window: host.Window, seen: _Seen) -> Run:
    place = out.with_name(f"{out.name}.dovetail")
    plan = load_plan(place / PLAN_FILE)
    layout = apply_moves(load_captured(place).graph, plan.moves)
    measured = read_measured(place / TIMELINE_FILE)
    assert measured is not None, "a finished run has a timeline"
    return Run(
        checkpoint=task.checkpoint.name,
        prompts=f"{len(task.prompts)} of {_lengths(task.prompts)}",
        asked=task.policy,
        report=json.loads((place / REPORT_FILE).read_text()),
        knobs=dict(plan.knobs),
        workers=layout.workers,
        predicted_disk_bytes=plan.prediction.disk_bytes,
        predicted_setup_seconds=plan.prediction.setup_seconds,
        wall_seconds=window.seconds,
        outside_peak_bytes=seen.peak_bytes,
        planning_bytes=seen.planning_bytes,
        read_bytes=seen.read_after - seen.read_before,
        own_cores=window.own_cores,
        other_cores=window.other_cores,
        decode_steps=_decode_steps(measured, list(workload_steps(layout, plan.workload))),
        engines=_engine_shares(measured),
        answers=read_answers(out),
    )


def _lengths(prompts: Sequence[Sequence[int]]) -> str:
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    return f"{shortest}-{longest}" if shortest < longest else str(longest)


def _decode_steps(measured: Timeline, steps: Sequence[Step]) -> list[tuple[int, float]]:
    """From the end of the step before to its own, for every recorded step without a prompt."""
    ends: dict[int, float] = {}
    for span in measured.spans:
        # The disk runs ahead into the next step, the workers end together.
        if span.engine.startswith("cpu"):
            ends[span.step] = max(ends.get(span.step, 0.0), span.end)
    return [
        (steps[number].seqs, ends[number] - ends[number - 1])
        for number in sorted(ends)
        if number - 1 in ends and not any(group.prefill for group in steps[number].groups)
    ]


def _engine_shares(measured: Timeline) -> dict[str, dict[str, float]]:
    shares: dict[str, dict[str, float]] = {}
    for span in measured.spans:
        part = shares.setdefault(span.engine, {})
        name = f"{span.kind} {span.name}"
        part[name] = part.get(name, 0.0) + span.seconds / measured.seconds
    for part in shares.values():
        part["between"] = max(0.0, 1.0 - sum(part.values()))
    return shares


def calibrated(task: Task) -> Machine:
    """This machine as dovetail calibrated it, now if it had not before."""
    plan, _ = plan_apart(task.request(), task.place, _silent)
    return plan.machine


def machine_with(machine: Machine, workers: int, path: Path) -> str:
    """A machine file that differs in the number of compute workers only; returns its path."""
    save_machine(replace(machine, workers=workers), path)
    return str(path)
