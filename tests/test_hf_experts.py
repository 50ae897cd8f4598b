"""experts_implementation="dovetail": known after `import dovetail`, equal results, traceable."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.support import VOCAB, tiny_model
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import dovetail
from dovetail.doors.registration import register_when_imported
from dovetail.runtime import routed_experts
from dovetail.runtime.routed_experts import ExpertWeights, run_experts, run_experts_traced


def ids(seqs: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, VOCAB, (seqs, tokens), generator=generator)


def both(model: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits by transformers' loop and by our experts."""
    results = []
    for name in ("eager", "dovetail"):
        model.set_experts_implementation(name)
        with torch.no_grad():
            results.append(model(inputs).logits)
    return results[0], results[1]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_results_are_transformers(
    family: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routed_experts, "AT_ONCE_BYTES", 1 << 40 if at_once else 0)
    model = tiny_model(family, num_hidden_layers=2)
    for shape in ((1, 1), (3, 21)):
        expected, found = both(model, ids(*shape))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_16_bit_results_are_as_good_as_transformers() -> None:
    exact = tiny_model("olmoe", num_hidden_layers=1).model.layers[0].mlp.experts
    half = tiny_model("olmoe", torch.bfloat16, num_hidden_layers=1).model.layers[0].mlp.experts
    exact.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in x])
    weight = torch.rand(40, 4, generator=generator).bfloat16()
    errors = {}
    with torch.no_grad():
        exact.config._experts_implementation = "eager"
        expected = exact(x.float(), index, weight.float())
        for name in ("eager", "dovetail"):
            half.config._experts_implementation = name
            errors[name] = (half(x, index, weight).float() - expected).abs().mean().item()
    assert errors["dovetail"] <= 1.5 * errors["eager"]


def test_a_trace_has_no_break() -> None:
    model = tiny_model("gpt_oss", num_hidden_layers=1)
    expected, _ = both(model, ids(2, 9))
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(run(ids(2, 9)).logits, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_places_without_an_expert_add_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(3, 8, 8, generator=generator) for _ in range(2))
    x, weight = torch.randn(5, 8, generator=generator), torch.ones(5, 2)
    index = torch.tensor([[0, 3], [3, 3], [1, 2], [2, 3], [0, 1]])
    weights = ExpertWeights(up, down)
    expected = torch.zeros(5, 8)
    for token, chosen in enumerate(index.tolist()):
        for expert in chosen:
            if expert < 3:
                expected[token] += down[expert] @ (up[expert] @ x[token]).relu()
    for run in (run_experts, run_experts_traced):
        found = run(x, index, weight, weights, torch.relu)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_flow() -> None:
    generator = torch.Generator().manual_seed(2)
    up = torch.randn(2, 6, 4, generator=generator, requires_grad=True)
    down = torch.randn(2, 4, 6, generator=generator, requires_grad=True)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float32, requires_grad=True)
    index, weight = torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.rand(3, 2, generator=generator)
    y = run_experts(x, index, weight, ExpertWeights(up, down), torch.tanh).sum()
    y.backward()  # type: ignore[no-untyped-call]
    found = [leaf.grad.clone() for leaf in (x, up, down) if leaf.grad is not None]
    for leaf in (x, up, down):
        leaf.grad = None
    total = torch.zeros(())
    for token in range(3):
        for place in range(2):
            own = int(index[token, place])
            out = down[own] @ torch.tanh(up[own] @ x[token])
            total = total + (weight[token, place] * out).sum()
    total.backward()  # type: ignore[no-untyped-call]
    for a, b in zip(found, (x.grad, up.grad, down.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SCRIPT = """
import sys
import dovetail
assert "torch" not in sys.modules
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, experts_implementation="dovetail")
ids = torch.arange(3, 15)[None]
with torch.no_grad():
    found = model(ids).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
print("equal", model.config._experts_implementation)
"""


def test_from_pretrained_knows_the_name(tmp_path: Path) -> None:
    tiny_model("olmoe", num_hidden_layers=1).save_pretrained(tmp_path)
    script = SCRIPT.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["equal", "eager"], done.stderr


def test_the_name_is_known_at_once_where_transformers_is_loaded() -> None:
    known = ALL_EXPERTS_FUNCTIONS._global_mapping
    del known["dovetail"]
    register_when_imported()
    assert "dovetail" in known
    assert not any(
        type(finder).__module__ == "dovetail.doors.registration" for finder in sys.meta_path
    )


def test_capture_does_not_take_the_name() -> None:
    from dovetail.capture.seams import seams

    model = tiny_model("olmoe", num_hidden_layers=1)
    with seams(model):
        pass
    expected, found = both(model, ids(1, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_public_names_are_lazy() -> None:
    assert {"compile", "load"} <= set(dir(dovetail)) and callable(dovetail.load)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dovetail.nothing  # noqa: B018
