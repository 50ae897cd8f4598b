"""Decode steps that are captured once and replayed, on the host device: when, and the tokens."""

from collections.abc import Sequence

import pytest
import torch
from tests.e2e.support import GREEDY
from tests.e2e.test_gpu_tokens import (
    CASES,
    NEW,
    PROMPTS,
    WORKLOAD,
    Model,
    budget_of,
    layout_of,
    made,
)
from tests.test_gpu_choose import MACHINE
from torch import Tensor

from dovetail.gpu_execution import GpuPrograms, gpu_generation
from dovetail.ir.batching import Request
from dovetail.ir.errors import VerifyError
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.runtime.generate import Generation
from dovetail.runtime.gpu import steady
from dovetail.runtime.gpu.experts import ExpertFunction, Experts, Routing, TorchExperts
from dovetail.runtime.gpu.host_device import HostDevice
from dovetail.runtime.gpu.host_graph import HostGraph
from dovetail.runtime.gpu.runtime import GpuRuntime
from dovetail.runtime.weight_store import Tensors


class AllExperts:
    """Every expert on every token, weighted by 0 where it was not chosen: no count is read."""

    nbytes = 0
    capturable = True

    def run(
        self,
        layer: int,
        function: ExpertFunction,
        experts: Sequence[int],
        weights: Sequence[Tensors],
        routing: Routing,
        x: Tensor,
        sums: Tensor,
    ) -> None:
        rows = slice(routing.start, routing.start + len(routing.index))
        for expert, tensors in zip(experts, weights, strict=True):
            share = (routing.weight * (routing.index == expert)).sum(1, keepdim=True)
            sums[rows] += function(x[rows], tensors).to(sums.dtype) * share


class Counting(TorchExperts):
    """Says that it can be captured, and reads counts on the host."""

    capturable = True


@pytest.fixture(scope="module", params=("olmoe", "deepseek_v3"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made(request.param, tmp_path_factory.mktemp(request.param))


def running(model: Model, case: str, experts: Experts, **more: bool) -> Generation[GpuRuntime]:
    policy, shares, knobs = CASES[case]
    layout = layout_of(model.tiny, policy, shares, knobs)
    budget = dict(budget_of(model.tiny.weight_bytes, shares))
    costs = GpuCosts(MACHINE, model.tiny.captured.graph.dtype)
    programs = GpuPrograms(layout, costs, WORKLOAD, budget, {"policy": "test"}, None)
    return gpu_generation(
        programs, layout, model.tiny.captured, model.tiny.index, HostDevice, GREEDY, (), experts,
        **more,
    )  # fmt: skip


def counted(generation: Generation[GpuRuntime]) -> tuple[list[tuple[int, ...]], int, int, int]:
    """The tokens, and how many steps decode, were captured, and were replayed."""
    requests = [Request(i, len(prompt), NEW) for i, prompt in enumerate(PROMPTS)]
    found: dict[int, tuple[int, ...]] = {}
    decoding = 0
    for report in generation.steps(requests, PROMPTS.__getitem__):
        decoding += all(not group.prefill for group in report.step.groups)
        found |= {done.index: done.tokens for done in report.finished}
    made = generation.runtime.steady
    captures, replays = (made.captures, made.replays) if made else (0, 0)
    return [found[i] for i in range(len(PROMPTS))], decoding, captures, replays


def test_steps_of_one_shape_are_captured_once(model: Model) -> None:
    with running(model, "eager", AllExperts(), graphs=True) as generation:
        tokens, decoding, captures, replays = counted(generation)
    assert tokens == model.tokens
    assert replays == decoding > captures > 0


def test_a_shape_that_changes_is_captured_anew(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model, "eager", AllExperts(), graphs=True) as generation:
        few = counted(generation)[2]
    monkeypatch.setattr(steady, "WIDTH", 1)
    monkeypatch.setattr(steady, "KEPT", 1)
    with running(model, "eager", AllExperts(), graphs=True) as generation:
        tokens, decoding, captures, replays = counted(generation)
        assert generation.runtime.steady is not None
    assert tokens == model.tokens
    assert few < captures == replays == decoding


@pytest.mark.parametrize("case", ["weight_stream", "zigzag", "nano_overlap"])
def test_steps_with_transfers_or_two_streams_are_not_captured(model: Model, case: str) -> None:
    with running(model, case, AllExperts(), graphs=True) as generation:
        tokens, decoding, captures, replays = counted(generation)
    assert tokens == model.tokens and decoding > 0 == captures == replays


def test_nothing_is_captured_unless_asked_for_and_possible(model: Model) -> None:
    for experts, graphs in ((AllExperts(), False), (TorchExperts(2), True)):
        with running(model, "eager", experts, graphs=graphs) as generation:
            assert generation.runtime.steady is None


def test_experts_whose_counts_the_host_reads_are_refused(model: Model) -> None:
    with (
        running(model, "eager", Counting(2), graphs=True) as generation,
        pytest.raises(VerifyError, match=r"calls aten.bincount.*run it without graphs"),
    ):
        counted(generation)


def test_a_replay_reads_what_is_there_then_and_writes_where_it_wrote() -> None:
    x, total = torch.ones(3), torch.zeros(3)
    with HostGraph() as graph:
        y = (x * 2).view(3, 1)[:, 0]
        total += y
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [10, 10, 10] and total.tolist() == [12, 12, 12]
    with HostGraph(), pytest.raises(VerifyError, match=r"calls aten.lift_fresh"):
        torch.tensor([1, 2])
    with HostGraph(), pytest.raises(VerifyError, match=r"calls aten._local_scalar_dense"):
        x.sum().item()
