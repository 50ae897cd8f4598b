"""Expert-parallel generation: `checkpoint, placement, prompts -> tokens, bytes moved`.

One process a device, on this machine with gloo; under another launcher call ``run_rank`` in each
process after ``torch.distributed.init_process_group``, with any backend.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from dovetail.capture.captured import Captured, load_captured
from dovetail.codegen.executor import emit_executor
from dovetail.ir import codec
from dovetail.ir.batching import Batcher, Group, Request
from dovetail.ir.errors import DovetailError
from dovetail.ir.expert_placement import ExpertPlacement, load_placement
from dovetail.ir.program import Program
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.machine_files import load_machine
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.lower import lower
from dovetail.passes.policies import eager
from dovetail.passes.policies.common import Setting
from dovetail.place.rank_routing import RankRouting

ANY_MACHINE = "laptop-16gb"
"""The program's order of segments is the same for all machines; one has to be named."""
UNBOUNDED = 1 << 60
PATIENCE = 600.0
"""Seconds that a rank waits for the others in one exchange."""


@dataclass(frozen=True, slots=True)
class Job:
    """What all ranks do: ``captured`` is a folder of Captured.save, ``prompts`` token ids."""

    checkpoint: str
    captured: str
    placement: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    way: str = "two"
    seqs: int = 0
    """Sequences in flight at once; 0: all."""
    stop: tuple[int, ...] = ()
    """Tokens that end a sequence."""
    routing: str = ""
    """Where to write what tokens chose, if not "": ``<routing>.<rank>.npz``."""


@dataclass(frozen=True, slots=True)
class RankResult:
    """A rank's account: all tokens (every rank knows them), bytes that it sent to others by kind,
    exchanges by kind, and steps."""

    tokens: tuple[tuple[int, ...], ...]
    sent: Mapping[str, int]
    exchanges: Mapping[str, int]
    steps: int


def expert_program(graph: TaskGraph, workload: Workload, seqs: int) -> Program:
    """The program whose segments a rank runs: everything in memory, one worker."""
    machine = replace(load_machine(ANY_MACHINE), workers=1)
    setting = Setting(graph, machine, UNBOUNDED, workload)
    moves = eager.moves(setting, {"seqs": seqs})
    return lower(apply_moves(graph, moves), {"ram": UNBOUNDED})


def run_rank(job: Job) -> RankResult:
    """Do a job as one rank of the default process group. Raises DovetailError."""
    import torch

    from dovetail.runtime.exchange import Exchange
    from dovetail.runtime.expert_parallel import ExpertParallel
    from dovetail.runtime.safetensors_index import CheckpointIndex

    captured, placement = load_captured(Path(job.captured)), load_placement(Path(job.placement))
    workload = Workload.of([len(prompt) for prompt in job.prompts], job.new_tokens)
    program = expert_program(captured.graph, workload, job.seqs or len(job.prompts))
    nccl = torch.distributed.get_backend() == "nccl"
    exchange = Exchange(torch.device("cuda" if nccl else "cpu"))
    rank = ExpertParallel(
        captured.graph,
        program,
        captured.constants,
        CheckpointIndex.open(Path(job.checkpoint)),
        _functions(captured, program),
        placement,
        exchange,
        "one" if job.way == "one" else "two",
    )
    made: list[list[int]] = [[] for _ in job.prompts]
    routing = RankRouting(tuple(len(prompt) for prompt in job.prompts))
    if job.routing:
        rank.on_chosen = routing.add
    context = captured.graph.context
    requests = [
        Request(i, len(p), min(job.new_tokens, context - len(p))) for i, p in enumerate(job.prompts)
    ]
    batcher, steps = Batcher(requests, program.settings.admission), 0
    while (step := batcher.next_step()) is not None:
        found = rank.run_step(step, lambda group: _inputs(group, job.prompts, made))
        for index, token in zip(step.receivers, found, strict=True):
            made[index].append(token)
        stopped = [i for i, t in zip(step.receivers, found, strict=True) if t in job.stop]
        batcher.advance(step, stopped)
        steps += 1
        routing.step = steps
    if job.routing:
        routing.save(Path(f"{job.routing}.{exchange.rank}.npz"))
    traffic = exchange.traffic
    return RankResult(tuple(map(tuple, made)), traffic.sent, traffic.exchanges, steps)


def _functions(captured: Captured, program: Program) -> dict[str, Any]:
    source = emit_executor(captured.graph, program, {"policy": "expert parallel"})
    functions: dict[str, Any] = {}
    exec(compile(source, "executor.py", "exec"), functions)
    return functions


def _inputs(
    group: Group, prompts: Sequence[Sequence[int]], made: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Token ids and positions of a group, ``[seqs, q_len]``; padding repeats the last one."""
    import torch

    ids, positions = [], []
    for member, length in zip(group.members, group.lengths, strict=True):
        known = [*prompts[member.index], *made[member.index]]
        piece = known[member.held : member.held + length]
        padding = group.q_len - length
        ids.append([*piece, *[piece[-1]] * padding])
        places = list(range(member.held, member.held + length))
        positions.append([*places, *[places[-1]] * padding])
    return {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(positions)}


def run_ranks(jobs: Sequence[Job], ranks: int) -> list[list[RankResult]]:
    """Do the jobs one after the other in ``ranks`` processes on this machine; the results by job
    and rank. Raises DovetailError with what the first process that failed said."""
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "jobs": codec.encode(list(jobs)),
            "ranks": ranks,
            "store": str(Path(folder) / "store"),
        }
        children = [_start(Path(folder), task | {"rank": rank}) for rank in range(ranks)]
        try:
            _wait(children, Path(folder))
        finally:
            for child in children:
                with suppress(ProcessLookupError):
                    child.kill()
                child.wait()
        answers = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(ranks)]
    by_rank = [[codec.decode(each, RankResult) for each in answer] for answer in answers]
    return [list(results) for results in zip(*by_rank, strict=True)]


def _start(folder: Path, task: dict[str, Any]) -> subprocess.Popen[bytes]:
    rank = task["rank"]
    place = folder / f"{rank}.task"
    place.write_text(json.dumps(task | {"out": str(folder / f"{rank}.json")}), encoding="utf-8")
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dovetail.place.expert_parallel", str(place)], stderr=log
        )


def _wait(children: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until all have ended; as soon as one fails, say why."""
    while any(child.poll() is None for child in children):
        if any(child.poll() for child in children):
            break
        time.sleep(0.01)
    for rank, child in enumerate(children):
        if child.poll():
            said = (folder / f"{rank}.log").read_text(encoding="utf-8").strip().splitlines()
            raise DovetailError(
                f"process {rank} of {len(children)} ended with exit code {child.poll()}: "
                f"{said[-1] if said else 'it said nothing'}"
            )


def main(arguments: Sequence[str]) -> int:
    """One process of ``run_ranks``; its task is a file."""
    import torch
    import torch.distributed as dist

    task = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{task['store']}",
        rank=task["rank"],
        world_size=task["ranks"],
        timeout=timedelta(seconds=PATIENCE),
    )
    try:
        results = [run_rank(codec.decode(job, Job)) for job in task["jobs"]]
    except DovetailError as error:
        print(f"dovetail: {error}", file=sys.stderr)
        return 1
    finally:
        dist.destroy_process_group()
    Path(task["out"]).write_text(json.dumps(codec.encode(results)), encoding="utf-8")
    return 0


__all__ = ["ExpertPlacement", "Job", "RankResult", "expert_program", "run_rank", "run_ranks"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
