"""A few model families from end to end, and the support table against transformers."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests import families
from tests.e2e import support
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaModel

from dovetail.capture.capture import capture_config
from dovetail.ir import codec
from dovetail.ir.errors import CaptureError
from dovetail.ir.task_graph import Const, Op, Role, TaskGraph
from dovetail.ir.verify_graph import verify_graph

ROOT = Path(__file__).resolve().parent.parent
RUN = ("llama4_text", "qwen3_next", "deepseek_v32", "longcat_flash", "nemotron_h", "dbrx")
CAPTURED = ("llama4_text", "kimi_linear")


def bench() -> ModuleType:
    """The script that writes the table."""
    spec = importlib.util.spec_from_file_location("families_bench", ROOT / "bench/families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_graph(family: str, **options: Any) -> TaskGraph:
    """The captured graph of a tiny config."""
    config = families.tiny_config(family)
    for name, value in options.items():
        setattr(config, name, value)
    return capture_config(config, "float32").graph


def ops(graph: TaskGraph, target: str) -> list[Op]:
    """All operators of one kind in the layers."""
    found = (op for body in graph.bodies for task in body.tasks for op in task.ops)
    return [op for op in found if op.target == target]


def test_table_has_every_family_of_the_installed_transformers() -> None:
    results, models = bench().read_results()
    advice = "run bench/families.py --families with the new ones"
    assert sorted(results) == sorted([*families.moe_model_types(), *families.DENSE]), advice
    assert list(models) == list(families.MODELS), "run bench/families.py --parts models"
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert text == bench().page(results, models), "run bench/families.py: the page is its output"


@pytest.mark.parametrize("family", RUN)
def test_tokens_equal_transformers_in_a_quarter_of_the_weights(family: str) -> None:
    figures = families.check_execution(family)
    assert (figures.differing, figures.first) == (0, -1)
    assert figures.share == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("family", CAPTURED)
def test_capture_at_real_size(family: str) -> None:
    figures = families.check_capture(family)
    assert figures.layers > 20 and figures.kinds <= 6 and figures.gigabytes > 50


def test_states_continue_through_pieces_of_a_prompt(tmp_path: Path) -> None:
    model = families.tiny_model("jamba")
    tiny = support.save_tiny(model, tmp_path)
    prompts = support.ragged_prompts((5, 23, 1, 17))
    expected = support.transformers_tokens(model, prompts, 6)
    knobs = {"chunk_tokens": 7, "seqs": 3, "rows": 3, "chunk": 4, "slots": 3}
    plan = support.plan_for(tiny, prompts, 6, 4 * tiny.weight_bytes, "chunked_prefill", knobs)
    outcome = support.generate(tiny, plan, dict(enumerate(prompts)), 6)
    assert [outcome.tokens[i] for i in range(len(prompts))] == expected


def test_mixers_are_tasks_with_a_state() -> None:
    graph = tiny_graph("jamba")
    verify_graph(graph)
    assert codec.decode(codec.encode(graph), TaskGraph) == graph
    tasks = [task for task in graph.bodies[0].tasks if task.role is Role.MIXER]
    (task,) = tasks
    assert task.state is not None and task.axes == ("seqs",)
    # A convolution's last 4 inputs and the state of 8 numbers, each for 128 channels.
    assert task.state.bytes_per_seq == 128 * (4 + 8) * 4 and task.state.bytes_per_token == 0
    (op,) = (op for op in task.ops if op.target == "dovetail.module")
    assert op.args[0] == "model.layers.{layer}.mamba" and op.args[2] == (0,)
    assert op.kwargs["cache_params"] == Const("cache")
    assert graph.state_bytes_per_seq == sum(
        state.bytes_per_seq for i in range(len(graph.layers)) for state in graph.body(i).states
    )


def test_unusual_attention_keeps_its_growing_state() -> None:
    graph = tiny_graph("deepseek_v32")
    task = next(t for t in graph.bodies[0].tasks if t.state is not None)
    # Compressed KV (32 and 16 numbers) and the indexer's key (32), in float32.
    assert task.role is Role.ATTENTION and task.state is not None
    assert task.state.bytes_per_token == (32 + 16 + 32) * 4
    assert task.state.bytes_per_token * 4 == graph.kv_bytes_per_token


def test_chunked_and_full_layers_are_two_kinds() -> None:
    found = {
        op.kwargs.get("chunk", 0) for op in ops(tiny_graph("llama4_text"), "dovetail.attention")
    }
    assert found == {0, 8}


def test_experts_without_a_gate_and_tall_matrices() -> None:
    nemotron = next(b.experts for b in tiny_graph("nemotron_h").bodies if b.experts)
    assert nemotron.experts is not None
    assert [t.part for t in nemotron.experts.tensors] == ["up", "down"]
    dbrx = tiny_graph("dbrx").bodies[0].experts
    assert dbrx is not None and dbrx.experts is not None
    flipped = {t.part: t.transposed for t in dbrx.experts.tensors}
    assert flipped == {"gate": False, "up": False, "down": True}


def test_llama4_with_two_experts_a_token_is_refused() -> None:
    with pytest.raises(CaptureError, match="feed_forward sends a token to 2 experts"):
        tiny_graph("llama4_text", num_experts_per_tok=2)


def test_positions_from_the_cache_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaModel.forward

    def counted(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        past = kwargs["past_key_values"].get_seq_length()
        positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        kwargs["position_ids"] = positions.unsqueeze(0).expand(input_ids.shape[0], -1)
        return original(self, input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    config = AutoConfig.for_model("llama", **support._COMMON)
    with pytest.raises(CaptureError, match="counts positions from the cache's length"):
        capture_config(config, "float32")


def test_experts_that_are_not_understood_run_dense_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("WARNING", "dovetail"):
        graph = tiny_graph("doge")
    assert all(body.experts is None for body in graph.bodies)
    assert "declares 4096 experts, but none go through transformers' experts" in caplog.text
