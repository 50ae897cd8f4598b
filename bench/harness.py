"""What every section uses: the settings of a run of the bench, and a run of either side."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dovetail_run import Run, Task, run
from peers import Job, Outcome, Peer
from workloads import longest_first

from dovetail.checkpoint import ModelFolder
from dovetail.ir.errors import InputError
from dovetail.ir.units import format_bytes

SHORT, LONG = (8, 32), (256, 256)
"""Lengths of prompts: decode-heavy, and where attention and KV matter."""
SWEEP_TOKENS = 2
"""New tokens while a batch size is tried under offload: a prefill and a decode step."""


@dataclass(slots=True)
class Bench:
    """What to measure and where; ``machines`` has a machine file for every number of threads."""

    checkpoint: Path
    small: Path
    budget: int
    scratch: Path
    machines: dict[int, str]
    prompts: Mapping[str, int]
    new_tokens: Mapping[str, int]
    batches: Sequence[int]
    experts: Sequence[str]
    repeats: Mapping[str, int]
    say: Callable[[str], None]
    runs: list[Run] = field(default_factory=list)
    """Every run of ours so far."""
    _places: int = 0

    @property
    def threads(self) -> list[int]:
        """Numbers of threads to measure with, the main one first."""
        return list(self.machines)

    def place(self) -> Path:
        """A new path in the scratch folder."""
        self._places += 1
        return self.scratch / f"{self._places:03d}"

    def ours(
        self,
        checkpoint: Path,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        budget: int,
        threads: int,
        policy: str = "auto",
        knobs: Mapping[str, int | bool] | None = None,
    ) -> Run:
        """One `dovetail run`."""
        task = Task(
            checkpoint,
            prompts,
            new_tokens,
            budget,
            self.place(),
            policy,
            knobs,
            self.machines[threads],
        )
        done = run(task)
        self.runs.append(done)
        self.say(
            f"dovetail {done.policy}, {threads} threads, {format_bytes(budget)}: "
            f"{done.tokens_per_second:.1f} tokens/s, others {done.other_cores:.2f} cores"
        )
        shutil.rmtree(task.place)
        return done

    def peers(self, peer: Peer, job: Job) -> Outcome:
        """One job of a peer."""
        done = peer.run(job)
        self.say(
            f"{peer.spec.mode} peer, {job.threads} threads, batch {job.batch}, {job.experts}: "
            f"{done.tokens_per_second:.1f} tokens/s, others {done.other_cores:.2f} cores"
        )
        return done


def dtype_of(checkpoint: Path) -> str:
    """The dtype that a checkpoint's config names, which both sides compute in."""
    config = ModelFolder.open(checkpoint).config
    found = config.get("dtype", config.get("torch_dtype"))
    if not isinstance(found, str):
        raise InputError(f"{checkpoint}/config.json: dtype is {found!r}, expected a name: add it")
    return found


def weight_bytes(checkpoint: Path) -> int:
    """Bytes of all weights of a checkpoint."""
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def batch_sizes(bench: Bench, count: int) -> list[int]:
    """The peer's batch sizes to try: those asked for, and all prompts at once."""
    return sorted({batch for batch in bench.batches if batch < count} | {count})


def middle_job(
    prompts: Sequence[list[int]], batch: int, new_tokens: int, threads: int, experts: str
) -> Job:
    """One batch of neighbours in length from the middle: typical work, hardly any padding."""
    order = longest_first(prompts)
    start = (len(order) - batch) // 2
    chosen = {i: prompts[i] for i in order[start : start + batch]}
    return Job(chosen, batch, new_tokens, threads, experts)
