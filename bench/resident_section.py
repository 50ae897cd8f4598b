"""Ours against plain transformers where memory holds everything."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import host
from dovetail_run import Run
from harness import SHORT, SWEEP_TOKENS, Bench, batch_sizes, dtype_of, middle_job, weight_bytes
from peers import EXPERTS, RESIDENT, Job, Outcome, Peer, PeerSpec, Sweep, sweep
from workloads import agreement, longest_first, random_prompts

from dovetail.checkpoint import ModelFolder
from dovetail.ir.errors import InputError
from dovetail.ir.units import format_bytes


@dataclass(frozen=True, slots=True)
class Resident:
    """Ours against plain transformers, everything in memory; ``pairs`` ran one after the other."""

    prompts: int
    lengths: tuple[int, int]
    new_tokens: int
    dtype: str
    weights: int
    budget: int
    sweep: Sweep
    pairs: list[tuple[Run, Outcome]]
    agreement: dict[str, float | int]

    def ratios(self) -> dict[str, float]:
        """Ours over theirs: of the median rates, and the least and most of any pair."""
        ours = [mine.loaded_rate for mine, _ in self.pairs]
        theirs = [peer.tokens_per_second for _, peer in self.pairs]
        each = [a / b for a, b in zip(ours, theirs, strict=True)]
        return {
            "of_medians": statistics.median(ours) / statistics.median(theirs),
            "min": min(each),
            "max": max(each),
        }

    def as_dict(self) -> dict[str, Any]:
        """The section as JSON data."""
        plain = ("prompts", "lengths", "new_tokens", "dtype", "weights", "budget", "agreement")
        data = {name: getattr(self, name) for name in plain}
        data["sweep"] = self.sweep.as_dict()
        data["ours"] = [mine.as_dict() for mine, _ in self.pairs]
        data["peer"] = [peer.as_dict() for _, peer in self.pairs]
        return data | {"ratios": self.ratios()}


def resident_budget(checkpoint: Path) -> int:
    """A budget that holds everything. Raises InputError if the machine cannot hold the weights
    for both sides at once."""
    weights, budget = weight_bytes(checkpoint), host.memory_bytes() * 6 // 10
    if weights > budget // 2:
        raise InputError(
            f"{checkpoint} has {format_bytes(weights)} of weights, too much for this machine to "
            "hold for two sides at once: pass a smaller checkpoint with --small"
        )
    return budget


def resident(bench: Bench) -> Resident:
    """Both sides with all weights in memory, in turns."""
    count, new = bench.prompts["resident"], bench.new_tokens["resident"]
    checkpoint, budget = bench.small, resident_budget(bench.small)
    prompts = random_prompts(count, *SHORT, ModelFolder.open(checkpoint).vocab)
    main = bench.threads[0]
    everything = {i: prompts[i] for i in longest_first(prompts)}
    pairs = []
    spec = PeerSpec(RESIDENT, str(checkpoint), dtype_of(checkpoint))
    with Peer(spec, bench.scratch / "peer.log") as peer:
        # The first pass through a model is slower; it is not the peer's to pay.
        peer.run(middle_job(prompts, min(16, count), SWEEP_TOKENS, main, EXPERTS[0]))
        found = sweep(
            peer,
            lambda batch, experts: middle_job(prompts, batch, min(8, new), main, experts),
            batch_sizes(bench, count),
            bench.experts,
            new,
        )
        best = found.best
        for _ in range(bench.repeats["resident"]):
            mine = bench.ours(checkpoint, prompts, new, budget, main)
            job = Job(everything, best.batch, new, main, best.experts)
            pairs.append((mine, bench.peers(peer, job)))
    answers = agreement(pairs[0][0].answers, pairs[0][1].answers)
    weights = weight_bytes(checkpoint)
    return Resident(count, SHORT, new, spec.dtype, weights, budget, found, pairs, answers)
