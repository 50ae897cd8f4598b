"""The memory that a run takes stays within its budget, by the system's own count."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.support import (
    Tiny,
    generate,
    machine,
    plan_for,
    ragged_prompts,
    save_tiny,
    tiny_model,
)

from dovetail.ir.units import format_bytes, parse_bytes
from dovetail.machine_files import save_machine

NEW = 8
# A command of dovetail in this process, then what the process held at most and what it imported.
COMMAND = """
import json, sys
from dovetail.cli import main
from dovetail.runtime import memory

code = main(sys.argv[1:])
print(json.dumps({"code": code, "peak": memory.peak_rss_bytes(), "modules": sorted(sys.modules)}))
"""
# An interpreter that has imported the same and run each kind of kernel once, but no model.
BASELINE = """
import importlib, json, sys, threading

modules, dtype, threads = json.loads(sys.stdin.read())
for name in modules:
    if not name.startswith("__m"):
        importlib.import_module(name)
import torch
from dovetail.runtime import memory
from dovetail.runtime.warm_up import warm_up

imported = memory.rss_bytes()
together = threading.Barrier(threads + 1)

def engine():
    torch.set_num_threads(1)
    warm_up(getattr(torch, dtype))
    together.wait()
    together.wait()

for _ in range(threads):
    threading.Thread(target=engine).start()
together.wait()
print(json.dumps([imported, memory.rss_bytes()]))
together.wait()
"""
ENGINES = 3
"""Threads of a run: two workers of the made-up machine and the disk."""
LIBRARIES = 48 << 20
"""Most bytes that code and tables of the libraries may take beyond the imports."""

PARTS = {
    "resident": "resident",
    "ring": "rings",
    "kv": "kv",
    "tokens": "tokens",
    "embedding": "reserve",
}
"""The predicted part that each pool, by the first word of its name, belongs to."""


@dataclass(frozen=True)
class Large:
    """A folder with a checkpoint of ``nbytes``, ``prompts.jsonl`` and ``machine.json``."""

    folder: Path
    dtype: str
    nbytes: int

    def run(self, budget: str, *options: str) -> subprocess.CompletedProcess[str]:
        """`dovetail run` in a process of its own, anew, with its report as JSON."""
        for path in self.folder.glob("out.jsonl*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        command = ["run", ".", "--prompts", "prompts.jsonl", "--out", "out.jsonl"]
        command += ["--max-new-tokens", str(NEW), "--machine", "machine.json", "--ignore-eos"]
        return subprocess.run(
            [sys.executable, "-c", COMMAND, *command, "--json", "--budget", budget, *options],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def outputs(self) -> list[dict[str, Any]]:
        """The lines of the output file."""
        text = (self.folder / "out.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def large(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Large]:
    """A random OLMoE checkpoint of about 155 MB, removed at the end."""
    dtype: str = request.param
    folder = tmp_path_factory.mktemp(dtype)
    model = tiny_model(
        "olmoe",
        getattr(torch, dtype),
        hidden_size=256,
        intermediate_size=512,
        num_experts=32,
        num_hidden_layers=3 if dtype == "float32" else 6,
        vocab_size=512,
        max_position_embeddings=1024,
    )
    model.save_pretrained(folder)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert 120e6 < nbytes < 200e6
    del model
    save_machine(machine(dtype), folder / "machine.json")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 200, (48,), generator=generator).tolist()
    lines = [json.dumps({"input_ids": ids}) for ids in ragged_prompts(lengths)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    yield Large(folder, dtype, nbytes)
    shutil.rmtree(folder)


def results_of(done: subprocess.CompletedProcess[str]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The report of a run that worked, and what its process said of itself."""
    assert done.returncode == 0, done.stderr
    *report, last = done.stdout.splitlines()
    process: dict[str, Any] = json.loads(last)
    assert process["code"] == 0, done.stderr
    return json.loads("\n".join(report)), process


def baselines(modules: Sequence[str], dtype: str, threads: int) -> tuple[int, int]:
    """Bytes that an interpreter holds after the imports, and with the libraries at work."""
    done = subprocess.run(
        [sys.executable, "-c", BASELINE],
        input=json.dumps([modules, dtype, threads]),
        capture_output=True,
        text=True,
        check=True,
    )
    imported, working = json.loads(done.stdout)
    return imported, working


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_peak_memory_within_the_budget(large: Large, share: float) -> None:
    budget = int(share * large.nbytes)
    report, process = results_of(large.run(f"ram={budget}"))
    assert report["budget"] == budget
    assert report["pool_bytes"] <= report["predicted_peak_bytes"] <= budget
    assert 0 < report["rss_bytes"] <= budget
    # The same by a baseline from another process.
    imported, working = baselines(process["modules"], large.dtype, ENGINES)
    assert process["peak"] - working <= budget
    assert working - imported <= LIBRARIES
    assert [line["index"] for line in large.outputs()] == list(range(48))
    assert {len(line["tokens"]) for line in large.outputs()} == {NEW}


def test_budget_too_small_is_refused_and_the_one_named_works(large: Large) -> None:
    refused = large.run("ram=1MiB")
    assert json.loads(refused.stdout)["code"] == 1
    assert "a budget of ram=1.00 MiB is too small" in refused.stderr
    named = refused.stderr.split("needs ram=")[1].split(";")[0]
    assert not (large.folder / "out.jsonl").exists()
    assert not list(large.folder.glob("out.jsonl.dovetail/executor.py")), "nothing has run"

    below = large.run(f"ram={int(parse_bytes(named) * 0.98)}")
    assert json.loads(below.stdout)["code"] == 1
    assert f"needs ram={named};" in below.stderr

    (large.folder / "few.jsonl").write_text(
        max((large.folder / "prompts.jsonl").read_text().splitlines(), key=len) + "\n"
    )
    report, _ = results_of(large.run(f"ram={named}", "--prompts", "few.jsonl"))
    assert report["budget"] == parse_bytes(named)
    assert 0 < report["rss_bytes"] <= report["budget"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A DeepSeek-V3 checkpoint: dense and sparse layers, latent KV, shared experts."""
    return save_tiny(tiny_model("deepseek_v3"), tmp_path_factory.mktemp("deepseek_v3"))


@pytest.mark.parametrize(
    ("policy", "share"),
    [
        ("auto", 4.0),
        ("auto", 0.25),
        ("eager", 4.0),
        ("model_batch", 4.0),
        ("model_batch", 0.7),
        ("module_batch", 4.0),
        ("module_batch", 0.6),
        ("module_batch", 0.25),
        ("weight_stream", 4.0),
        ("weight_stream", 0.25),
    ],
)
def test_pools_take_no_more_than_each_predicted_part(tiny: Tiny, policy: str, share: float) -> None:
    prompts, new = ragged_prompts((5, 40, 1, 17, 9, 33, 3, 22)), 6
    plan = plan_for(tiny, prompts, new, int(share * tiny.weight_bytes), policy)
    predicted = plan.prediction.bytes
    outcome = generate(tiny, plan, dict(enumerate(prompts)), new)
    held = dict.fromkeys(predicted, 0)
    for what, nbytes in outcome.pools.items():
        held[PARTS[what.split()[0]]] += nbytes
    # Blocks of direct reads and whole pages come on top, which the reserve is there for.
    for part in set(PARTS.values()):
        assert held[part] <= predicted[part] + predicted["reserve"], part
    assert sum(held.values()) <= outcome.pools_peak <= plan.prediction.peak_bytes


def test_named_budget_is_read_back_as_at_least_what_is_needed() -> None:
    for nbytes in (885_239, 24_340_113, 43_300_001, (1 << 34) + 1):
        assert parse_bytes(format_bytes(nbytes, up=True)) >= nbytes
