"""torch.compile(backend="dovetail"): found by name, experts scheduled, no further graphs."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.support import VOCAB, tiny_model
from tests.test_compile import Block
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from dovetail.doors import torch_backend
from dovetail.doors.region_choice import EAGER, Choice
from dovetail.doors.traced_experts import match_experts
from dovetail.ir.errors import InputError

FAMILIES = ("olmoe", "gpt_oss")


@pytest.fixture(autouse=True)
def _own_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DOVETAIL_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """Always take ours; says what was decided."""
    seen: list[Choice] = []

    def measure(kind: str, tokens: int, runs: Any, refused: Any) -> Choice:
        name = torch_backend.SCHEDULED if torch_backend.SCHEDULED in runs else EAGER
        seen.append(Choice(kind, tokens, name, {each: (1.0,) for each in runs}, refused))
        return seen[-1]

    monkeypatch.setattr(torch_backend, "measure", measure)
    return seen


def ids(seqs: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, VOCAB, (seqs, tokens), generator=generator)


def compiled(module: nn.Module, backend: str, inputs: list[Any]) -> tuple[list[Any], int, int]:
    """Results, graph breaks and graphs of a module under a backend."""
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(module, backend=backend, dynamic=True)
    with torch.no_grad():
        results = [run(each) for each in inputs]
    return results, sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_run_with_no_more_graphs_and_their_experts_scheduled(
    family: str, ran: list[Choice]
) -> None:
    model = tiny_model(family, num_hidden_layers=1)
    inputs = [ids(2, 7), ids(3, 30)]
    _, breaks, graphs = compiled(model, "aot_eager", inputs)
    results, our_breaks, our_graphs = compiled(model, "dovetail", inputs)
    assert our_breaks <= breaks and our_graphs <= graphs
    with torch.no_grad():
        for one, expected in zip(results, (model(each) for each in inputs), strict=True):
            torch.testing.assert_close(one.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert {choice.tokens for choice in ran} == {16, 128}
    assert {choice.winner for choice in ran} == {torch_backend.SCHEDULED}


# What transformers calls to compare versions is cached, which Dynamo sees through.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_16_bit_experts_are_scheduled(ran: list[Choice]) -> None:
    model = tiny_model("olmoe", torch.bfloat16, num_hidden_layers=1)
    (result,), _, _ = compiled(model, "dovetail", [ids(2, 9)])
    with torch.no_grad():
        expected = model(ids(2, 9)).logits
    torch.testing.assert_close(result.logits, expected, rtol=5e-2, atol=5e-2)
    assert [choice.winner for choice in ran] == [torch_backend.SCHEDULED]


def test_training_goes_through_the_traced_nodes(ran: list[Choice]) -> None:
    model = tiny_model("olmoe", num_hidden_layers=1)
    run = torch.compile(model, backend="dovetail")
    run(ids(1, 5)).logits.sum().backward()
    found = model.model.layers[0].mlp.experts.down_proj.grad.clone()
    model.zero_grad()
    model(ids(1, 5)).logits.sum().backward()
    torch.testing.assert_close(found, model.model.layers[0].mlp.experts.down_proj.grad)
    assert not ran


def test_other_modules_run_as_they_are(ran: list[Choice]) -> None:
    inputs = [torch.randn(5, 16), torch.randn(9, 16)]
    for module in (nn.Sequential(nn.Linear(16, 8), nn.ReLU()), Block().eval()):
        expected, breaks, graphs = compiled(module, "aot_eager", inputs)
        found, our_breaks, our_graphs = compiled(module, "dovetail", inputs)
        assert (our_breaks, our_graphs) <= (breaks, graphs)
        torch.testing.assert_close(found, expected)
    assert not ran


def test_a_grouped_product_elsewhere_is_left_and_named(caplog: pytest.LogCaptureFixture) -> None:
    def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        out: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, ends)
        return out.relu()

    import transformers.integrations.moe  # noqa: F401  # makes the operator

    x, weight, ends = torch.randn(6, 4), torch.randn(2, 4, 3), torch.tensor([2, 6])
    with caplog.at_level(logging.WARNING):
        found = torch.compile(product, backend="dovetail")(x, weight, ends)
    torch.testing.assert_close(found, product(x, weight, ends))
    assert "is not in a region I know: the first product's rows are not gathered" in caplog.text


def test_values_that_leave_a_region_keep_it_as_it_is() -> None:
    model = tiny_model("olmoe", num_hidden_layers=1)
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: object) -> Any:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep)(ids(1, 5))
    graph = graphs[0].graph
    (matched,), notes = match_experts(graph)
    assert not notes and matched.top_k == 4
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((*output.args[0], matched.up),)
    found, notes = match_experts(graph)
    assert not found and "is also read by output" in notes[0]


def test_options_are_refused() -> None:
    run = torch.compile(nn.Linear(2, 2), backend="dovetail", options={"budget": 3})
    with pytest.raises(BackendCompilerFailed, match="takes no options, found") as caught:
        run(torch.randn(1, 2))
    assert isinstance(caught.value.inner_exception, InputError)


def test_no_import_is_needed() -> None:
    script = (
        "import sys, torch\n"
        "assert 'dovetail' not in sys.modules\n"
        "f = torch.compile(torch.nn.Linear(3, 2), backend='dovetail')\n"
        "with torch.no_grad(): print(f(torch.ones(1, 3)).shape[1], 'dovetail' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "True"], done.stderr
