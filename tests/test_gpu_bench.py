"""The GPU bench where there is no GPU: it says so, and a dry run without time says what it left."""

import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernel_tune_cases import FakeBench

from dovetail.codegen.gate.suite import QWEN3_30B
from dovetail.codegen.kernels.arch import ARCHS

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu" / "run.py"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script and keep what it says."""
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_refuses_a_machine_without_a_gpu(tmp_path: Path) -> None:
    done = run("--part", "1", "--out", str(tmp_path / "out.md"))
    assert done.returncode == 2
    assert "torch sees no GPU; --dry tries the script without one" in done.stderr


@needs_triton
def test_a_dry_run_with_no_time_left_lists_what_it_left_out(tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    done = run("--part", "1", "--dry", "--minutes", "0", "--out", str(out))
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert "layer Mixtral-8x7B" in text and "numbers of up bf16, 13 tokens" in text
    data = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert data["layers"] == [] and len(data["skipped"]) > 40


@needs_triton
def test_a_dry_run_checks_numbers_and_layers(tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    done = run("--part", "2", "--dry", "--minutes", "0.02", "--out", str(out))
    assert done.returncode == 0, done.stderr
    answers = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["answers"]
    assert {answer["question"] for answer in answers} == {"launch floor"}


@needs_triton
def test_tuned_kernels_stand_beside_the_models_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench: Any = importlib.import_module("tuned")
    monkeypatch.setattr(bench, "host_bench", lambda rung, scratch: FakeBench())
    rows, layer = tmp_path / "rows.db", dataclasses.replace(QWEN3_30B, experts=16)
    decided = bench.tune_layer(layer, (16, 256), ARCHS["sm_90"], 60.0, rows, True)
    assert [one.rung.space.bucket for one in decided] == [(2, 16), (65, 256)]
    page: Any = importlib.import_module("report").Report({}, tuned=decided)
    text = page.text()
    assert "## Tuned kernels" in text
    assert text.count("tuned kernels take 0.") == 2
    page.write(tmp_path / "out.md")
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["tuned"]
    assert all(one["measured"]["ratio"] < 0.95 for one in found)


def test_whole_models_run_dry_by_the_executor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench: Any = importlib.import_module("end_to_end")
    made = bench.EndToEnd(bench.SHAPES[0], True, tmp_path)
    machine = bench.bench_machine(True)
    rows = [made.transformers(), made.ours("resident", machine), made.ours("offloaded", machine)]
    assert [row.tokens for row in rows] == [9, 9, 9]
    assert rows[0].same is None and rows[1].same == rows[2].same == 1.0
    assert rows[1].link == 0 < rows[2].link and rows[2].predicted > 0
    with pytest.raises(RuntimeError, match="no step was captured"):
        made.ours("resident", machine, graphs=True)


def test_a_whole_model_that_does_not_fit_in_the_time_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench: Any = importlib.import_module("end_to_end")
    assert list(bench.measure_model(bench.SHAPES[0], True, tmp_path, lambda *_: False)) == []
