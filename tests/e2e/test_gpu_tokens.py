"""GPU plans at work on the host device: the greedy tokens of transformers, for every policy."""

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.support import (
    GREEDY,
    Knobs,
    Tiny,
    ragged_prompts,
    save_tiny,
    tiny_model,
    transformers_tokens,
)
from tests.test_gpu_choose import MACHINE

from dovetail.gpu_execution import GpuPrograms, gpu_generation
from dovetail.ir.batching import Request
from dovetail.ir.errors import BudgetError, VerifyError
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.memory import tier_bytes
from dovetail.passes.policies.gpu import GPU_POLICIES, GpuSetting, moves
from dovetail.runtime.generate import Generation
from dovetail.runtime.gpu.host_device import HostDevice
from dovetail.runtime.gpu.runtime import GpuRuntime

FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3")
NEW = 4
PROMPTS = ragged_prompts((40, 33, 17, 9, 5, 1), seed=3)
WORKLOAD = Workload.of([len(prompt) for prompt in PROMPTS], NEW)
SHAPE: Knobs = {"seqs": 4, "rows": 2, "prefill_tokens": 80}
TIGHT, HALF, ROOMY = (0.3, 0.5), (0.9, 0.5), (1.5, 2.0)
"""hbm and ram as shares of the weights: less than either in hbm, and some on disk; most in hbm;
all of it there."""
CASES: dict[str, tuple[str, tuple[float, float], Knobs]] = {
    "eager": ("eager", ROOMY, {}),
    "weight_stream": ("weight_stream", HALF, {}),
    "model_batch": ("model_batch", HALF, {}),
    "zigzag": ("zigzag", HALF, {"kv_hbm": 0}),
    "zigzag, KV in two tiers": ("zigzag", HALF, {"kv_hbm": 40}),
    "cgopipe": ("cgopipe", HALF, {}),
    "module_batch": ("module_batch", TIGHT, {}),
    "module_batch, the CPU attends too": (
        "module_batch", TIGHT, {"attention_cpu": 50, "kv_hbm": 20}),
    "hybrid_cpu_gpu": ("hybrid_cpu_gpu", TIGHT, {"experts_cpu": 50}),
    "hybrid_cpu_gpu by load": ("hybrid_cpu_gpu", TIGHT, {"experts_cpu": 60, "by_load": True}),
    "nano_overlap": ("nano_overlap", HALF, {}),
    "chunked_prefill": ("chunked_prefill", TIGHT, {}),
    "layered_prefill": ("layered_prefill", TIGHT, {"layer_groups": 3}),
    "joint": ("joint", HALF, {"kv_hbm": 60, "experts_cpu": 40, "refill": True, "streams": 2}),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A tiny checkpoint and what transformers makes of the prompts."""

    tiny: Tiny
    tokens: list[tuple[int, ...]]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made(request.param, tmp_path_factory.mktemp(request.param))


def made(family: str, folder: Path) -> Model:
    tiny = save_tiny(tiny_model(family), folder)
    return Model(tiny, transformers_tokens(tiny.model, PROMPTS, NEW))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made("olmoe", tmp_path_factory.mktemp("olmoe"))


@functools.cache
def budget_of(weights: int, shares: tuple[float, float]) -> tuple[tuple[str, int], ...]:
    return ("hbm", int(shares[0] * weights) + (1 << 20)), ("ram", int(shares[1] * weights) + 2**21)


def layout_of(tiny: Tiny, policy: str, shares: tuple[float, float], knobs: Knobs) -> Layout:
    budget = dict(budget_of(tiny.weight_bytes, shares))
    setting = GpuSetting(tiny.captured.graph, MACHINE, budget["hbm"], budget["ram"], WORKLOAD)
    found = moves(setting, {**GPU_POLICIES[policy].fixed, **SHAPE, **knobs})
    assert found is not None
    return apply_moves(tiny.captured.graph, found)


def generation(
    tiny: Tiny, layout: Layout, budget: dict[str, int], folder: Path | None = None
) -> Generation[GpuRuntime]:
    costs = GpuCosts(MACHINE, tiny.captured.graph.dtype)
    programs = GpuPrograms(layout, costs, WORKLOAD, budget, {"policy": "test"}, folder)
    return gpu_generation(programs, layout, tiny.captured, tiny.index, HostDevice, GREEDY, ())


def tokens_of(running: Generation[GpuRuntime]) -> list[tuple[int, ...]]:
    requests = [Request(i, len(prompt), NEW) for i, prompt in enumerate(PROMPTS)]
    found = {
        done.index: done.tokens
        for report in running.steps(requests, PROMPTS.__getitem__)
        for done in report.finished
    }
    return [found[i] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(name: str, model: Model) -> None:
    policy, shares, knobs = CASES[name]
    layout = layout_of(model.tiny, policy, shares, knobs)
    budget = dict(budget_of(model.tiny.weight_bytes, shares))
    with generation(model.tiny, layout, budget) as running:
        assert tokens_of(running) == model.tokens
        used = {tier: b.breakdown() for tier, b in running.runtime.memory.budgets.items()}
        peaks = {tier: b.peak for tier, b in running.runtime.memory.budgets.items()}
    predicted = tier_bytes(layout, 1)
    for tier in ("hbm", "ram"):
        assert peaks[tier] <= budget[tier]
        # What is set aside is what was planned, part by part; KV buffers hold whole rows.
        assert used[tier].get("resident", 0) == predicted[tier]["resident"]
    assert used["hbm"].get("tokens", 0) <= predicted["hbm"]["tokens"]
    assert used["ram"].get("pool staging", 0) <= predicted["ram"]["staging"]
    assert used["ram"].get("pool cpu_experts", 0) <= predicted["ram"]["cpu_reads"]


def test_windows_and_sinks_too(tmp_path: Path) -> None:
    gpt = made("gpt_oss", tmp_path)
    for name in ("module_batch, the CPU attends too", "zigzag, KV in two tiers"):
        policy, shares, knobs = CASES[name]
        layout = layout_of(gpt.tiny, policy, shares, knobs)
        budget = dict(budget_of(gpt.tiny.weight_bytes, shares))
        with generation(gpt.tiny, layout, budget) as running:
            assert tokens_of(running) == gpt.tokens


def test_a_program_for_each_kind_of_step_is_left_to_be_read(olmoe: Model, tmp_path: Path) -> None:
    layout = layout_of(olmoe.tiny, "module_batch", TIGHT, {})
    budget = dict(budget_of(olmoe.tiny.weight_bytes, TIGHT))
    with generation(olmoe.tiny, layout, budget, tmp_path) as running:
        assert tokens_of(running) == olmoe.tokens
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "segments.py" in names and "executor_0_prefill.py" in names
    assert any(name.endswith("decode.py") for name in names)
    assert "def h2d(e):" in (tmp_path / "executor_0_prefill.py").read_text(encoding="utf-8")


def test_a_budget_that_is_too_small_is_refused_before_anything_runs(olmoe: Model) -> None:
    layout = layout_of(olmoe.tiny, "module_batch", TIGHT, {})
    budget = dict(budget_of(olmoe.tiny.weight_bytes, TIGHT))
    used = sum(tier_bytes(layout, 1)["hbm"].values())
    with pytest.raises(VerifyError, match=r"hbm holds .* of the budget"):
        generation(olmoe.tiny, layout, {**budget, "hbm": used - 200_000})
    resident = tier_bytes(layout, 1)["ram"]["resident"]
    running = generation(olmoe.tiny, layout, budget)
    running.runtime.memory.budgets["ram"].capacity = resident - 1
    with pytest.raises(BudgetError, match=f"ram budget: resident needs {resident} bytes"), running:
        pass


def test_columns_on_the_cpu_are_refused_as_planned_only(olmoe: Model) -> None:
    layout = layout_of(olmoe.tiny, "hybrid_cpu_gpu", TIGHT, {"linears_cpu": 30})
    budget = dict(budget_of(olmoe.tiny.weight_bytes, TIGHT))
    with pytest.raises(VerifyError, match=r"30 % of the columns.*plan again with linears_cpu=0"):
        generation(olmoe.tiny, layout, budget)
