"""What tests of `dovetail run` share: a place to run in, prompts, and how refusals are read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli import main

NEW = 6
PROMPTS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "It is a truth"},
    {"prompt": "She"},
    {"id": 7, "input_ids": [72, 101, 32]},
    {"prompt": "Mr. Darcy looked just as he had been used to look in Hertfordshire, paid his"},
]
IDS = ["a", 1, 7, 3]


@dataclass(frozen=True)
class Place:
    """A folder to run in: the demo checkpoint, a machine file, and a prompt file."""

    folder: Path
    checkpoint: Path

    @property
    def prompts(self) -> Path:
        """The prompt file."""
        return self.folder / "in.jsonl"

    @property
    def out(self) -> Path:
        """The output file."""
        return self.folder / "out.jsonl"

    def write(self, lines: Sequence[object]) -> None:
        """Write the prompt file; a text is a line as it is."""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.prompts.write_text("\n".join(texts) + "\n", encoding="utf-8")

    def command(self, *options: str) -> list[str]:
        """`dovetail run` on the prompt file; later options win."""
        words = ["run", str(self.checkpoint), "--prompts", str(self.prompts), "--out"]
        words += [str(self.out), "--budget", "ram=64MiB", "--max-new-tokens", str(NEW)]
        return [*words, "--machine", str(self.folder / "machine.json"), *options]

    def run(self, *options: str) -> int:
        """Run the command in this process; returns its exit code."""
        return main(self.command(*options))

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the output file."""
        return [json.loads(line) for line in self.out.read_text(encoding="utf-8").splitlines()]


def complaint(capfd: pytest.CaptureFixture[str]) -> str:
    """What standard error says, checked to be a message for a person and nothing else."""
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err, captured.err
    message = f"\n{captured.err}".rpartition("\ndovetail: ")[2].strip()
    assert len(message) > 30
    return message
