"""Results that tests of the journal write and read back."""

import json
from pathlib import Path

from dovetail.journal_lines import JSON, Record

RUN: dict[str, JSON] = {"prompts": "ab12", "generation": {"max_new_tokens": 4, "eos": (1, 2)}}


def record(index: int) -> Record:
    """The one result of prompt ``index``."""
    return Record(index, f"p{index}", 3, (index, 7), f"tëxt {index}", "length")


def records(*indices: int) -> list[Record]:
    return [record(index) for index in indices]


def indices_in(out: Path) -> list[int]:
    """The indices in a complete output, each of its lines checked against its record."""
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    for row in rows:
        expected = record(row["index"])
        assert row == {name: getattr(expected, name) for name in row} | {"tokens": [*row["tokens"]]}
        assert row["tokens"] == [*expected.tokens]
    return [row["index"] for row in rows]
