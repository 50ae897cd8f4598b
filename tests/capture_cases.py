"""Tiny configurations of model families, captured once for the tests of capture."""

from typing import Any

from transformers import AutoConfig

from dovetail.capture.capture import capture_config
from dovetail.capture.captured import Captured
from dovetail.ir.task_graph import Experts, TaskGraph

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "intermediate_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 64,
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": LOCAL | {"sliding_window": 5, "tie_word_embeddings": True},
    "qwen2_moe": QWEN | {"decoder_sparse_step": 2},
    "qwen3_moe": QWEN | {"head_dim": 32},
    "deepseek_v2": DEEPSEEK | {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": LOCAL | {"head_dim": 16, "sliding_window": 5},
    "llama": {},
}
_CAPTURED: dict[str, Captured] = {}


def config_of(model_type: str, **changes: Any) -> Any:
    """A tiny configuration of one family."""
    return AutoConfig.for_model(model_type, **COMMON | FAMILIES.get(model_type, {}) | changes)


def captured_of(model_type: str) -> Captured:
    """One family in float32, captured once."""
    if model_type not in _CAPTURED:
        _CAPTURED[model_type] = capture_config(config_of(model_type), "float32")
    return _CAPTURED[model_type]


def graph_of(model_type: str) -> TaskGraph:
    """The graph of one family in float32."""
    return captured_of(model_type).graph


def experts_of(graph: TaskGraph, body: int) -> Experts:
    """The experts of one body, which must have some."""
    task = graph.bodies[body].experts
    assert task is not None and task.experts is not None
    return task.experts


def entries_of(graph: TaskGraph) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A checkpoint that has exactly what ``graph`` reads."""
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    bodies = [(0, graph.prologue), (0, graph.epilogue)]
    bodies += [(layer, graph.body(layer)) for layer in range(len(graph.layers))]
    for layer, body in bodies:
        for task in body.tasks:
            for w in task.weights:
                entries[w.key.replace("{layer}", str(layer))] = (w.dtype, w.shape)
            for t in task.experts.tensors if task.experts else ():
                count = task.experts.count if task.experts else 0
                for expert in range(1 if t.stacked else count):
                    key = t.key.replace("{layer}", str(layer)).replace("{expert}", str(expert))
                    entries[key] = (t.dtype, (count, *t.shape) if t.stacked else t.shape)
    return entries
