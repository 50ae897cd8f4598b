"""A user's own Mixture-of-Experts blocks: recognised whatever their loop, refused with a reason."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dovetail.capture.user_model import trace_user_module
from dovetail.capture.user_moe import find_user_moe, looped_experts, routed_forward
from dovetail.ir.errors import CaptureError

WIDTH, COUNT = 24, 6


class Mlp(nn.Module):
    """One expert."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, width]`` to the same."""
        return self.down(F.silu(self.up(x)))  # type: ignore[no-any-return]


class LoopMoe(nn.Module):
    """A loop with ``torch.where`` and ``index_add_``, as Mixtral was first published."""

    def __init__(self, top_k: int = 2, count: int = COUNT, width: int = WIDTH) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(Mlp(width) for _ in range(count))

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts of every token."""
        weight, index = torch.topk(logits.softmax(-1), self.top_k, -1)
        return weight / weight.sum(-1, keepdim=True), index

    def forward(self, hidden: Tensor) -> Any:
        """``[seqs, tokens, width]`` to the same."""
        x = hidden.reshape(-1, hidden.shape[-1])
        weight, index = self.route(self.gate(x))
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(index == number)
            y.index_add_(0, token, expert(x[token]) * weight[token, place, None])
        return y.view(hidden.shape)


class SigmoidShared(LoopMoe):
    """Sigmoid scores times a factor, a shared expert, and a loop that asks for data."""

    def __init__(self) -> None:
        super().__init__()
        self.always = Mlp()

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weight, index = torch.topk(logits.sigmoid(), self.top_k, -1)
        return weight * 2.5, index

    def forward(self, hidden: Tensor) -> Any:
        x = hidden.reshape(-1, hidden.shape[-1])
        logits = self.gate(x)
        weight, index = self.route(logits)
        y = torch.zeros_like(x)
        for number in (index == torch.arange(COUNT)[:, None, None]).any(-1).any(-1).nonzero():
            at = int(number.item())
            token, place = torch.where(index == at)
            y[token] += self.experts[at](x[token]) * weight[token, place, None]
        return y.view(hidden.shape) + self.always(hidden), logits


class Threshold(LoopMoe):
    """Every expert above a threshold: a different number for every token."""

    def forward(self, hidden: Tensor) -> Any:
        x = hidden.reshape(-1, hidden.shape[-1])
        weight = self.gate(x).softmax(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (token,) = torch.where(weight[:, number] > 1 / COUNT)
            y.index_add_(0, token, expert(x[token]) * weight[token, number, None])
        return y.view(hidden.shape)


class Layers(nn.Module):
    """A small model around a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.moe = block

    def forward(self, x: Tensor) -> Tensor:
        """``[seqs, tokens, width]`` to the same."""
        out = self.moe(self.first(x))
        y: Tensor = out[0] if isinstance(out, tuple) else out
        return x + y


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def targets(graph: Any) -> list[str]:
    """The operators of a traced graph."""
    return [str(n.target) for n in graph.program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (LoopMoe(), ("softmax", True, 1.0, "", False)),
        (LoopMoe(top_k=1), ("softmax", True, 1.0, "", False)),
        (LoopMoe(count=40), ("softmax", True, 1.0, "", False)),
        (SigmoidShared(), ("sigmoid", False, 2.5, "always", True)),
    ],
)
def test_loops_are_recognised(block: LoopMoe, expected: tuple[object, ...]) -> None:
    before = {name: value.clone() for name, value in block.state_dict().items()}
    (moe,), notes = find_user_moe(Layers(block))
    assert notes == []
    found = (moe.scores, moe.normalised, pytest.approx(moe.scale), moe.shared, moe.gives_logits)
    assert found == expected
    assert (moe.path, moe.experts, moe.router, moe.top_k) == ("moe", "experts", "gate", block.top_k)
    x = torch.randn(3, 7, WIDTH)
    ours, own = routed_forward(block, moe, looped_experts(block, moe))(x), block(x)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (ours, own)), strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("block", [LoopMoe(), SigmoidShared()])
def test_a_loop_is_one_experts_operator(block: LoopMoe) -> None:
    graph = trace_user_module(Layers(block).eval(), torch.randn(3, 7, WIDTH))
    assert targets(graph).count("dovetail.experts.default") == 1
    assert not graph.coarse and graph.experts[0].path == "moe"
    assert not any("nonzero" in target for target in targets(graph))


def test_unknown_routing_runs_as_one_task_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dovetail"):
        graph = trace_user_module(Layers(Threshold()).eval(), torch.randn(3, 7, WIDTH))
    assert list(graph.coarse) == ["moe"] or "dovetail.experts.default" not in targets(graph)
    assert "moe (Threshold) has 6 experts of one shape in 'experts'" in caplog.text
    assert "expected the same number for each" in caplog.text


class Decides(nn.Module):
    """Control flow by data."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` or twice that."""
        return x * 2 if float(x.sum()) > 0 else x


def test_control_flow_in_a_submodule_becomes_a_coarse_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "dovetail"):
        graph = trace_user_module(Layers(Decides()).eval(), torch.randn(3, 7, WIDTH))
    assert list(graph.coarse) == ["moe"]
    assert targets(graph).count("dovetail.module.default") == 1
    assert "module moe (Decides) runs as one coarse task" in caplog.text


def test_trace_refuses_control_flow_of_the_whole_module() -> None:
    with pytest.raises(CaptureError, match=r"Decides cannot be traced.*move that part into a sub"):
        trace_user_module(Decides(), torch.randn(3, 7))


def test_trace_refuses_hooks() -> None:
    model = Layers(LoopMoe()).eval()
    model.moe.gate.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    with pytest.raises(CaptureError, match=r"module moe.gate \(Linear\) has hooks.*remove them"):
        trace_user_module(model, torch.randn(3, 7, WIDTH))


def test_trace_refuses_buffers_that_change() -> None:
    with pytest.raises(CaptureError, match=r"module moe \(BatchNorm1d\) changes its buffers"):
        trace_user_module(Layers(nn.BatchNorm1d(7)), torch.randn(3, 7, WIDTH))


class Pools(nn.Module):
    """Control flow by data, and another shape."""

    def forward(self, x: Tensor) -> Tensor:
        """The mean or the sum over tokens."""
        return x.mean(1, keepdim=True) if float(x.sum()) > 0 else x.sum(1, keepdim=True)


def test_trace_refuses_coarse_tasks_of_another_shape() -> None:
    with pytest.raises(CaptureError, match=r"module moe \(Pools\).*expected one tensor like its"):
        trace_user_module(Layers(Pools()).eval(), torch.randn(3, 7, WIDTH))
