"""The sample: the part of a workload that candidates run, short enough to be run many times."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dovetail.checkpoint import ModelFolder
from dovetail.ir.errors import InputError
from dovetail.ir.workload import Workload
from dovetail.prompts import read_prompts
from dovetail.workloads import check_context, load_workload

LEAST_NEW = 4
"""Fewest new tokens of a sample, so that its sequences decode as well as prefill."""
RUNS = 80
"""Runs of the sample that the budget of seconds should be enough for: pairs for the gate and some
dozens of candidates."""
LONG, NEARLY = 1.4, 2.5
"""A sample that runs this many times as long as it should is cut again; one of an earlier call is
taken over up to this factor, for the sake of its rows."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids, the new tokens of each, and where they come from."""

    ids: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    most_new: int
    source: str

    @property
    def workload(self) -> Workload:
        """What a plan needs to know of them."""
        return Workload.of([len(ids) for ids in self.ids], self.most_new)

    @property
    def tokens(self) -> int:
        """New tokens of all together."""
        return sum(self.new_tokens)

    def part(self, count: int, new_tokens: int) -> "Prompts":
        """Of every length alike, ``count`` of the prompts, with at most ``new_tokens`` each."""
        by_length = sorted(range(len(self.ids)), key=lambda i: (len(self.ids[i]), i))
        kept = sorted(by_length[(2 * k + 1) * len(self.ids) // (2 * count)] for k in range(count))
        return Prompts(
            tuple(self.ids[i] for i in kept),
            tuple(min(new_tokens, self.new_tokens[i]) for i in kept),
            min(new_tokens, self.most_new),
            self.source,
        )


def read_workload(
    folder: ModelFolder, text: str, new_tokens: int | None, skip_bad: bool, seed: int
) -> Prompts:
    """The prompts of a file (.jsonl), or random ones for a workload by name; raises InputError."""
    if text.endswith(".jsonl"):
        most = new_tokens or 64
        found = read_prompts(
            Path(text), folder.encode, folder.vocab, folder.context, most, skip_bad
        )
        ids = tuple(prompt.input_ids for prompt in found.prompts)
        each = tuple(min(most, folder.context - len(one)) for one in ids)
        return Prompts(ids, each, most, f"prompts:{found.digest}")
    if new_tokens is not None or skip_bad:
        raise InputError(
            f"--workload {text}: found --max-new-tokens or --skip-bad too, which go with a file of "
            "prompts (.jsonl); a workload says itself how many new tokens, as in 1024x512+256: "
            "leave the option out"
        )
    workload = load_workload(text)
    check_context(workload, folder.context)
    draw = random.Random(seed)
    ids = tuple(
        tuple(draw.randrange(folder.vocab) for _ in range(length)) for length in workload.each()
    )
    new = (workload.new_tokens,) * len(ids)
    return Prompts(ids, new, workload.new_tokens, f"random:{seed}")


def sample_of(
    prompts: Prompts, seqs: int, seconds: float, predicted: Callable[[Workload], float]
) -> Prompts:
    """The whole workload if it is ``predicted`` to run in ``seconds``; else fewer prompts, but no
    fewer than are in flight together, and then fewer new tokens."""
    whole = predicted(prompts.workload)
    if whole <= seconds:
        return prompts
    count, new = len(prompts.ids), prompts.most_new
    least = min(count, max(seqs, 1))
    count = max(least, int(count * seconds / whole))
    part = prompts.part(count, new)
    while new > LEAST_NEW and predicted(part.workload) > seconds:
        new = max(LEAST_NEW, new // 2)
        part = prompts.part(count, new)
    return part


def run_seconds(budget: float) -> float:
    """How long one run of the sample should take in a budget of seconds."""
    return min(60.0, max(0.3, budget / RUNS))
