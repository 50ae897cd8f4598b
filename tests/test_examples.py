"""Every example runs to its end, as its first lines say."""

import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tests.e2e.support import machine

from dovetail.demo import write_demo
from dovetail.machine_files import save_machine

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAYS = {
    "load_checkpoint.py": ("nothing has run yet", "12.00 MiB", "generated_text", "ms busy"),
    "compile_model.py": ("nothing has run yet", "ratio to eager", "'given'"),
    "compile_your_own.py": (
        "3 regions of 1 kinds",
        "function compiled by dovetail",
        "top 2 by softmax",
        "but runs as it is",
    ),
    "torch_compile.py": ("regions of routed experts are scheduled", "3 x 12"),
    "hf_experts.py": ("largest difference from eager",),
}
WITH_CHECKPOINT = ("load_checkpoint.py", "compile_model.py", "hf_experts.py")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A checkpoint and a machine file, so that nothing is calibrated."""
    place = tmp_path_factory.mktemp("examples")
    save_machine(machine(), place / "machine.json")
    return [str(write_demo(place / "checkpoint")), str(place / "machine.json")]


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(
    name: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DOVETAIL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [name, *(arguments if name in WITH_CHECKPOINT else [])])
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, "dovetail"):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr().out + caplog.text
    for text in SAYS[name]:
        assert text in said


def test_every_example_is_run() -> None:
    found = {path.name for path in EXAMPLES.glob("*.py")}
    # Training the demo model takes minutes; tests/test_demo.py checks what it made.
    assert found - {"train_demo.py"} == set(SAYS)
