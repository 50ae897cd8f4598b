"""Ours against accelerate's disk offload, and whether both generate the same."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail_run import Run
from harness import SWEEP_TOKENS, Bench, batch_sizes, dtype_of, middle_job, weight_bytes
from peers import DISK, Job, Outcome, Peer, PeerSpec, Sweep, sweep
from workloads import agreement, random_prompts

from dovetail.checkpoint import ModelFolder
from dovetail.demo import demo_prompts, write_demo
from dovetail.ir.errors import InputError
from dovetail.ir.units import format_bytes


@dataclass(frozen=True, slots=True)
class Duel:
    """Ours against accelerate's disk offload; runs by number of threads. ``agreement`` compares
    the two sides' tokens, ``noise`` the peer's own at different batch sizes."""

    name: str
    lengths: tuple[int, int]
    prompts: int
    new_tokens: int
    dtype: str
    weights: int
    budget: int
    loaded: dict[str, Any]
    sweep: Sweep
    peer: dict[int, list[Outcome]]
    ours: dict[int, list[Run]]
    agreement: dict[str, float | int]
    noise: dict[str, float | int]

    def as_dict(self) -> dict[str, Any]:
        """The section as JSON data."""
        plain = ("name", "lengths", "prompts", "new_tokens", "dtype", "weights", "budget", "loaded")
        data = {name: getattr(self, name) for name in (*plain, "agreement", "noise")}
        data["sweep"] = self.sweep.as_dict()
        data["peer"] = {n: [o.as_dict() for o in done] for n, done in self.peer.items()}
        data["ours"] = {n: [r.as_dict() for r in done] for n, done in self.ours.items()}
        return data


def duel(bench: Bench, name: str, lengths: tuple[int, int]) -> Duel:
    """Both sides under the same budget for weights; the peer may use all other memory too."""
    count, new = bench.prompts[name], bench.new_tokens[name]
    folder = ModelFolder.open(bench.checkpoint)
    prompts = random_prompts(count, *lengths, folder.vocab)
    weights = weight_bytes(bench.checkpoint)
    _need_disk(bench.scratch, weights)
    offload = bench.place()
    spec = PeerSpec(
        DISK, str(bench.checkpoint), dtype_of(bench.checkpoint), bench.budget, str(offload)
    )
    main = bench.threads[0]
    with Peer(spec, bench.scratch / "peer.log") as peer:
        bench.say(f"accelerate loaded in {peer.loaded['seconds']:.0f} s")
        found = sweep(
            peer,
            lambda batch, experts: middle_job(
                prompts, batch, min(SWEEP_TOKENS, new), main, experts
            ),
            batch_sizes(bench, count),
            bench.experts,
            new,
        )
        best = found.best
        bench.say(f"accelerate's best batch is {best.batch} with {best.experts} experts")
        done = {
            threads: [
                bench.peers(peer, middle_job(prompts, best.batch, new, threads, best.experts))
                for _ in range(bench.repeats[name] if threads == main else 1)
            ]
            for threads in bench.threads
        }
        loaded = peer.loaded
    shutil.rmtree(offload)
    ours = {
        threads: [
            bench.ours(bench.checkpoint, prompts, new, bench.budget, threads)
            for _ in range(bench.repeats[name] if threads == main else 1)
        ]
        for threads in bench.threads
    }
    answers = done[main][0].answers
    others = [o.answers for o in found.outcomes if o.batch != best.batch]
    return Duel(
        name=name,
        lengths=lengths,
        prompts=count,
        new_tokens=new,
        dtype=spec.dtype,
        weights=weights,
        budget=bench.budget,
        loaded=loaded,
        sweep=found,
        peer=done,
        ours=ours,
        agreement=agreement(answers, ours[main][0].answers),
        noise=agreement(answers, others[-1] if others else {}),
    )


def _need_disk(scratch: Path, size: int) -> None:
    free = shutil.disk_usage(scratch).free
    if free < size * 1.05:
        raise InputError(
            f"{scratch} has {format_bytes(free)} free, but accelerate's offload folder needs "
            f"{format_bytes(size, up=True)}: free some space or pass --scratch"
        )


@dataclass(frozen=True, slots=True)
class Equality:
    """Answers of both sides in float32 on the trained demo checkpoint."""

    weights: int
    budget: int
    agreement: dict[str, float | int]


def equal_in_float32(bench: Bench) -> Equality:
    """Whether both sides generate the same tokens where rounding cannot flip a choice."""
    checkpoint = bench.place()
    write_demo(checkpoint)
    folder = ModelFolder.open(checkpoint)
    prompts = [folder.encode(line["prompt"]) for line in demo_prompts()]
    weights = weight_bytes(checkpoint)
    budget = weights * 3 // 4
    offload, main = bench.place(), bench.threads[0]
    spec = PeerSpec(DISK, str(checkpoint), "float32", budget, str(offload))
    with Peer(spec, bench.scratch / "peer.log") as peer:
        job = Job(dict(enumerate(prompts)), len(prompts), 24, main, "eager")
        theirs = bench.peers(peer, job).answers
    mine = bench.ours(checkpoint, prompts, 24, budget, main)
    bench.runs.remove(mine)
    shutil.rmtree(offload)
    shutil.rmtree(checkpoint)
    return Equality(weights, budget, agreement(theirs, mine.answers))
