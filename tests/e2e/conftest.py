"""Fixtures of the tests of `dovetail run`."""

from pathlib import Path

import pytest
import torch
from tests.e2e.cli_cases import NEW, PROMPTS, Place
from tests.e2e.support import machine, transformers_tokens
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from dovetail.demo import write_demo
from dovetail.machine_files import save_machine


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint."""
    return write_demo(tmp_path_factory.mktemp("demo") / "checkpoint")


@pytest.fixture
def place(tmp_path: Path, demo: Path) -> Place:
    """A fresh folder to run in, with good prompts."""
    save_machine(machine(), tmp_path / "machine.json")
    found = Place(tmp_path, demo)
    found.write(PROMPTS)
    return found


@pytest.fixture(scope="module")
def expected(demo: Path) -> list[tuple[int, ...]]:
    """Greedy tokens of ``PROMPTS`` by transformers."""
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    ids = [p.get("input_ids") or tokenizer.encode(p["prompt"]).ids for p in PROMPTS]
    return transformers_tokens(model, ids, NEW)
