"""GPU plans on the host device with the experts run by kernels: the greedy tokens of transformers.

Kernels run in Triton's interpreter, in a process of its own; weights come and go in the pools of a
real program, so every table of addresses is one that an executor makes.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tests.e2e import test_gpu_tokens as host
from tests.e2e.support import GREEDY
from tests.test_gpu_choose import MACHINE

from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.choose import choose_ladder
from dovetail.codegen.kernels.of_experts import layer_of_experts
from dovetail.gpu_execution import GpuPrograms, gpu_generation
from dovetail.ir.batching import Request
from dovetail.ir.placement import experts_of
from dovetail.kernels.experts import KernelExperts, Ladder
from dovetail.passes.apply_moves import Layout
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.runtime.gpu.host_device import HostDevice

# Few prompts, of five tokens and of one: the interpreter takes milliseconds for every program.
CASES = {
    "olmoe": ("hybrid_cpu_gpu", (4,)),
    "gpt_oss": ("zigzag", (5,)),
}
NEW = 2


class NoExperts:
    """What runs the experts of layers without kernels: there must be none."""

    nbytes, capturable = 0, False

    def run(self, *arguments: object) -> None:
        raise AssertionError("a layer's experts have no kernels")


def ladders(layout: Layout) -> dict[int, Ladder]:
    graph, found = layout.graph, {}
    for layer in range(len(graph.layers)):
        if (experts := experts_of(graph, layer)) is not None:
            spec = layer_of_experts("tiny", experts)
            found[layer] = spec, choose_ladder(spec, ARCHS["sm_90"], (8, 128))
    return found


def check(family: str, folder: Path) -> None:
    """Run by the interpreting process."""
    torch.set_num_threads(1)
    folder.mkdir()
    model = host.made(family, folder / "model")
    name, prompts = CASES[family]
    policy, shares, knobs = host.CASES[name]
    layout = host.layout_of(model.tiny, policy, shares, knobs)
    budget = dict(host.budget_of(model.tiny.weight_bytes, shares))
    costs = GpuCosts(MACHINE, model.tiny.captured.graph.dtype)
    programs = GpuPrograms(layout, costs, host.WORKLOAD, budget, {"policy": "test"}, None)
    experts = KernelExperts(ladders(layout), "cpu", folder, 1 << 24, NoExperts())
    captured, index = model.tiny.captured, model.tiny.index
    running = gpu_generation(programs, layout, captured, index, HostDevice, GREEDY, (), experts)
    requests = [Request(i, len(host.PROMPTS[i]), NEW) for i in prompts]
    found: dict[int, tuple[int, ...]] = {}
    with running:
        for report in running.steps(requests, host.PROMPTS.__getitem__):
            found |= {done.index: done.tokens for done in report.finished}
    expected = {i: model.tokens[i][:NEW] for i in prompts}
    assert found == expected, name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_tokens_are_those_of_transformers() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.e2e.test_gpu_kernel_tokens"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for each in CASES:
            check(each, Path(scratch) / each)
