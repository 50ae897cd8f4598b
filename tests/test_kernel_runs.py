"""A plan's kernels behind the GPU runtime's interface for experts, against torch's products.

Kernels run in Triton's interpreter, which needs a process of its own.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.ir_cases import captured
from tests.test_gpu_choose import MACHINE, WORKLOAD, sizes
from torch import Tensor

from dovetail.codegen.gate.cases import LAYERS
from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.choose import choose_ladder
from dovetail.codegen.kernels.layer import buffer_bytes
from dovetail.codegen.kernels.of_experts import packed
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.task_graph import Experts as ExpertSpec
from dovetail.ir.task_graph import ExpertTensor
from dovetail.kernels.experts import KernelExperts, Ladder, plan_experts
from dovetail.kernels.planned import with_kernels
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.choose import choose
from dovetail.runtime.gpu.experts import Routing, TorchExperts
from dovetail.runtime.gpu.weights import Packed

LAYER = dataclasses.replace(LAYERS["slots, gate and up apart"], x="fp32")
EXPERT_BYTES = 3 * 96 * 64 * 4


def expert(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """What an executor emits for such an expert."""
    h = torch.nn.functional.silu(x @ weights["gate"].T) * (x @ weights["up"].T)
    return h @ weights["down"].T


def views(slot: Tensor) -> dict[str, Tensor]:
    """The tensors of an expert in its slot, bytes."""
    shapes = [("gate", (64, 96), "float32"), ("up", (64, 96), "float32")]
    return Packed.of([*shapes, ("down", (96, 64), "float32")]).views(slot)


def made(others: Sequence[int] = ()) -> tuple[list[dict[str, Tensor]], Routing, Tensor]:
    """Experts in slots in no order, choices of 9 tokens from the third on, inputs of 14."""
    torch.manual_seed(0)
    pool = torch.zeros(9, EXPERT_BYTES, dtype=torch.uint8)
    pool.view(torch.float32).normal_(std=0.1)
    weights = [views(pool[slot]) for slot in (7, 0, 3, 8, 2, 5)]
    index = torch.multinomial(torch.ones(9, 6), 2)
    return weights, Routing(3, index, torch.rand(9, 2), 6), torch.randn(14, 96)


def ladder(layer: LayerSpec, *tokens: int) -> Ladder:
    return layer, choose_ladder(layer, ARCHS["sm_90"], tokens)


def compare(folder: Path) -> None:
    """Run by the interpreting process: pieces of a layer, in one batch and in several."""
    weights, routing, x = made()
    expected = torch.zeros_like(x)
    TorchExperts(1000).run(0, expert, range(6), weights, routing, x, expected)
    kind = ladder(LAYER, 4, 16)
    for nbytes in (1 << 30, buffer_bytes(LAYER, kind[1][:1], 5)):
        run = KernelExperts({0: kind}, "cpu", folder, nbytes, TorchExperts(7))
        assert run.nbytes <= nbytes
        sums = torch.zeros_like(x)
        for piece in ([5, 1], [], [0, 2, 3, 4]):
            run.run(0, expert, piece, [weights[e] for e in piece], routing, x, sums)
        assert torch.equal(sums[:3], torch.zeros(3, 96)) and torch.equal(sums[12:], sums[:2])
        torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-5)
        other = torch.zeros_like(x)  # a layer whose experts have no kernels
        run.run(1, expert, range(6), weights, routing, x, other)
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_add_what_torchs_products_add() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_kernel_runs"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_weights_at_other_places_are_refused(tmp_path: Path) -> None:
    weights, routing, x = made()
    run = KernelExperts({0: ladder(LAYER, 64)}, "cpu", tmp_path, 1 << 30, TorchExperts(7))
    moved = weights[0] | {"up": weights[1]["up"]}
    with pytest.raises(InputError, match="expert 0: its tensors lie at other places than the plan"):
        run.run(0, expert, [0], [moved], routing, x, torch.zeros_like(x))


def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"kernels' buffers for one token take .*, found 100 B"):
        KernelExperts({0: ladder(LAYER, 64)}, "cpu", tmp_path, 100, TorchExperts(7))


def test_a_plan_without_kernels_says_that_torch_runs_its_experts(tmp_path: Path) -> None:
    graph, budget = captured("olmoe"), sizes("olmoe", 0.6)
    plan = with_kernels(choose(graph, MACHINE, budget, WORKLOAD, "zigzag"), graph)
    notes: list[str] = []
    assert plan_experts(plan, apply_moves(graph, plan.moves), tmp_path, notes.append) is None
    assert notes[0].startswith("experts run as torch's products: the machine says no arch of paper")


@pytest.mark.parametrize("bias", [0, 16, 24])
def test_kernels_and_the_runtime_pack_an_expert_alike(bias: int) -> None:
    shapes = {
        "gate_up": (48, 16),
        "gate_up_bias": (48 + bias,),
        "down": (16, 24),
        "down_bias": (5,),
    }
    tensors = tuple(ExpertTensor(part, part, shape, "bfloat16") for part, shape in shapes.items())
    spec = ExpertSpec(4, 2, 16, 24, tensors, (), True)
    places = Packed.of([(t.part, t.shape, t.dtype) for t in tensors]).places
    assert packed(spec) == {name: at for name, (at, _, _) in places.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch))
