"""What both sides run: prompts of random tokens, and how alike two sets of answers are."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

Answers = Mapping[int, Sequence[int]]
"""Generated tokens by prompt number."""
_FIRST_PLAIN_TOKEN = 3
"""Lower ids are padding and end-of-text in the demo's tokenizer."""


def random_prompts(
    count: int, shortest: int, longest: int, vocab: int, seed: int = 0
) -> list[list[int]]:
    """``count`` prompts of random tokens, lengths uniform from ``shortest`` to ``longest``."""
    source = random.Random(seed)
    return [
        [
            source.randrange(_FIRST_PLAIN_TOKEN, vocab)
            for _ in range(source.randint(shortest, longest))
        ]
        for _ in range(count)
    ]


def longest_first(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Prompt numbers by falling length: neighbours need the least padding."""
    return sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))


def write_prompts(prompts: Sequence[Sequence[int]], path: Path) -> None:
    """The prompts as a file for `dovetail run`; a prompt's id is its number."""
    lines = [json.dumps({"id": i, "input_ids": list(p)}) + "\n" for i, p in enumerate(prompts)]
    path.write_text("".join(lines), encoding="utf-8")


def read_answers(path: Path) -> dict[int, list[int]]:
    """The tokens in the output of `dovetail run`."""
    answers = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        answers[int(record["id"])] = [int(token) for token in record["tokens"]]
    return answers


def agreement(one: Answers, other: Answers) -> dict[str, float | int]:
    """How many prompts both answered, and the shares with equal first token and equal answer, as
    far as the shorter answer goes."""
    common = sorted(one.keys() & other.keys())
    if not common:
        return {"prompts": 0, "first_token": 0.0, "all_tokens": 0.0}
    firsts = sum(one[i][0] == other[i][0] for i in common)
    wholes = sum(all(a == b for a, b in zip(one[i], other[i], strict=False)) for i in common)
    return {
        "prompts": len(common),
        "first_token": firsts / len(common),
        "all_tokens": wholes / len(common),
    }
