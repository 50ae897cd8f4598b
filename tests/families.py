"""The model families of the support table: which there are, their real and their tiny configs, and
what is checked of each. ``bench/families.py`` runs all of them, the tests a few."""

import inspect
import re
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.e2e import support
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dovetail.capture.capture import capture_config
from dovetail.ir.workload import Workload
from dovetail.passes.choose import smallest_budget

DENSE = ("llama", "qwen2", "qwen3", "mistral", "gemma2")
"""Families without experts that are in the table too."""
Options = Mapping[str, Any]

_GEMMA4: Options = {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}
REAL: Mapping[str, Options] = {
    "dbrx": {
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "max_seq_len": 32768,
        "vocab_size": 100352,
        "attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 10752,
            "moe_num_experts": 16,
            "moe_top_k": 4,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "deepseek_v2": {
        "first_k_dense_replace": 1,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 1536,
        "n_group": 8,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_attention_heads": 128,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 60,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "routed_scaling_factor": 16.0,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "vocab_size": 102400,
    },
    "dots1": {
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_hidden_layers": 62,
        "routed_scaling_factor": 2.5,
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "hunyuan_v1_moe": {
        "intermediate_size": 3072,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts": 64,
        "moe_topk": 8,
        "vocab_size": 128167,
        "max_position_embeddings": 32768,
    },
    "lfm2_moe": {"layer_types": (["conv", "conv", "full_attention", "conv"] * 8)[:32]},
}
"""What the families' default configs lack to be models of their real size: published figures."""

MODELS: Mapping[str, tuple[str, Options]] = {
    "DeepSeek-V3": ("deepseek_v3", {}),
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 1536,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
    "Mixtral-8x22B": (
        "mixtral",
        {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 56,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "vocab_size": 32768,
            "max_position_embeddings": 65536,
        },
    ),
    "gpt-oss-120b": ("gpt_oss", {}),
    "Llama-4-Maverick": (
        "llama4_text",
        {
            "num_local_experts": 128,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
            "max_position_embeddings": 1048576,
        },
    ),
}
"""Published models: family, and what differs from its default config."""

_BASE: Options = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4}
_LOCAL = {"num_local_experts": 16, "num_experts_per_tok": 4}
_ROUTED = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1}
_GROUPS = {"n_group": 1, "topk_group": 1}
_FIRST_DENSE = {"first_k_dense_replace": 1, "intermediate_size": 128}
_LATENT: dict[str, Any] = {
    **_ROUTED,
    **_GROUPS,
    **_FIRST_DENSE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
# Enough heads that no two keys tie at a score of zero, where the order would decide.
_INDEX = {"index_n_heads": 16, "index_head_dim": 32, "index_topk": 8}
_DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 48,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DENSE_SIZE = {
    "hidden_size": 128,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "head_dim": 32,
}
_MIXED = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
TINY: Mapping[str, Options] = {
    "afmoe": {**_EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 8},
    "aria_text": {"moe_num_experts": 16, "moe_topk": 4, "moe_num_shared_experts": 1},
    "axk1": _LATENT,
    "axk2": {**_LATENT, **_INDEX},
    "bailing_hybrid": {
        **_LATENT,
        **_EXPERTS,
        "num_shared_experts": 1,
        "layer_types": _MIXED,
    },
    "beam": _EXPERTS,
    "cohere2_moe": {**_EXPERTS, "sliding_window": 8},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT, "n_group": 4, "topk_group": 2},
    "deepseek_v32": {**_LATENT, **_INDEX},
    "deepseek_v4": {
        **_ROUTED,
        **_INDEX,
        "head_dim": 32,
        "q_lora_rank": 24,
        "o_lora_rank": 16,
        "o_groups": 2,
        "sliding_window": 8,
    },
    "doge": {"is_moe": True, "num_experts": 4096, "num_experts_per_tok": 4},
    "dots1": {**_ROUTED, **_GROUPS, **_FIRST_DENSE},
    "dots3_note_text": {**_LATENT, **_INDEX, "sliding_window": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 16,
        "moe_k": 4,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
        "intermediate_size": 128,
    },
    "exaone_moe": {
        **_EXPERTS,
        **_GROUPS,
        **_FIRST_DENSE,
        "num_shared_experts": 1,
        "sliding_window": 8,
    },
    "flex_olmo": {**_EXPERTS, "num_key_value_heads": 4},
    "flint": {**_EXPERTS, "sliding_window": 8, "num_hidden_layers": 6},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 4,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 8,
        "intermediate_size": 128,
    },
    "glm4_moe": {**_ROUTED, **_GROUPS, **_FIRST_DENSE},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": {**_LATENT, **_INDEX},
    "gpt_oss": {**_LOCAL, "sliding_window": 8, "rope_parameters": _ROPE},
    "granitemoe": _LOCAL,
    "granitemoe_swa": {**_LOCAL, "sliding_window": 8},
    "granitemoehybrid": {
        **_LOCAL,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
    },
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 64},
    "hunyuan_v1_moe": {**_EXPERTS, "moe_topk": 4},
    "hy_v3": {**_EXPERTS, **_FIRST_DENSE, "num_shared_experts": 1},
    "hy_v4": {**_LATENT, **_INDEX, "num_experts": 16},
    "inkling_text": {**_ROUTED, "sliding_window": 8, "num_hidden_layers": 6},
    "jamba": {
        **_EXPERTS,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
        "num_hidden_layers": 6,
    },
    "jetmoe": {"num_local_experts": 16, "num_experts_per_tok": 2, "kv_channels": 16},
    "kimi_linear": {
        **_LATENT,
        **_EXPERTS,
        "num_shared_experts": 1,
        "layer_types": _MIXED,
    },
    "kolibri1": {**_EXPERTS, "sliding_window": 8},
    "laguna": {**_EXPERTS, "shared_expert_intermediate_size": 64, "sliding_window": 8},
    "lfm2_moe": {
        **_EXPERTS,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "llama4_text": {
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "floor_scale": 4,
        "attn_scale": 0.3,
    },
    "longcat_flash": {
        **_LATENT,
        "expert_ffn_hidden_size": 512,
        "ffn_hidden_size": 128,
        "zero_expert_num": 4,
        "moe_topk": 4,
        "num_layers": 4,
    },
    "mellum": _EXPERTS,
    "mimo_v2_flash": {**_ROUTED, **_GROUPS, "v_head_dim": 16, "sliding_window": 8},
    "minimax": {**_LOCAL, "block_size": 16},
    "minimax_m2": {**_LOCAL, "rotary_dim": 16},
    "minimax_m3_vl_text": {**_LOCAL, "rotary_dim": 16},
    "mixtral": {**_LOCAL, "sliding_window": None},
    "nemotron_h": {
        **_ROUTED,
        **_GROUPS,
        "moe_shared_expert_intermediate_size": 64,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "layers_block_type": ["mamba", "moe", "attention", "moe", "mamba", "moe", "moe"],
        "num_hidden_layers": 7,
    },
    "olmoe": {**_EXPERTS, "num_key_value_heads": 4},
    "phimoe": {**_LOCAL, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 96},
    "qwen3_5_moe_text": {**_EXPERTS, **_DELTA},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_DELTA},
    "solar_open": {**_ROUTED, **_GROUPS},
    "llama": _DENSE_SIZE,
    "qwen2": _DENSE_SIZE,
    "qwen3": _DENSE_SIZE,
    "mistral": {**_DENSE_SIZE, "sliding_window": 8},
    "gemma2": {**_DENSE_SIZE, "sliding_window": 8},
}
"""Small configs with random weights, wide in their experts, on which tokens are compared."""
NESTED = {
    "dots3_note": "dots3_note_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
"""Families whose config holds that of another one's text model."""
RUNNABLE = frozenset({*TINY, *NESTED, "dbrx"})
"""The families that have a tiny config."""
_KEPT = ("A_log", "dt_bias", ".D", "dt_proj.bias")
"""Weights of state spaces that keep their first values: others make the state explode."""
PROMPTS = support.ragged_prompts((5, 40, 1, 17, 9, 33, 3, 22))
NEW_TOKENS = 10


def moe_model_types() -> list[str]:
    """The causal language models of the installed transformers whose code has experts."""
    found = []
    for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = architecture if isinstance(architecture, str) else architecture[0]
        file = inspect.getsourcefile(getattr(transformers, name, None) or type(None))
        text = Path(file).read_text(encoding="utf-8") if file else ""
        own = re.search(r"class \w*(Experts|MoE|Moe|SparseMoeBlock)\w*\(nn\.Module\)", text)
        if own or "use_experts_implementation" in text:
            found.append(model_type)
    return sorted(found)


def real_config(family: str) -> PretrainedConfig:
    """The family's default config, completed with published figures where it lacks some."""
    config: PretrainedConfig = AutoConfig.for_model(family, **REAL.get(family, {}))
    return config


def tiny_config(family: str) -> PretrainedConfig:
    """A config with a few million weights."""
    if family == "dbrx":
        options: dict[str, Any] = {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 4,
            "max_seq_len": 256,
            "vocab_size": 256,
            "pad_token_id": 0,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {
                "ffn_hidden_size": 512,
                "moe_num_experts": 16,
                "moe_top_k": 4,
                "ffn_act_fn": {"name": "silu"},
            },
        }
    elif family in NESTED:
        options = {"text_config": {**_BASE, **TINY[NESTED[family]]}}
    else:
        options = {**_BASE, **TINY[family]}
    config: PretrainedConfig = AutoConfig.for_model(family, **options)
    return config


def tiny_model(family: str) -> PreTrainedModel:
    """A random float32 model whose activations and routing keep their variety."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        tiny_config(family), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    persistent = model.state_dict()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            kept = name.endswith(_KEPT) or not tensor.is_floating_point()
            if kept or name not in persistent:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise * 1.8 / tensor.shape[-1] ** 0.5)
            else:
                tensor.copy_(noise * 0.1 + ("norm" in name))
    model.train(False)
    return model


@dataclass(frozen=True, slots=True)
class CaptureFigures:
    """Capture at real size: layers and their kinds, gigabytes of bfloat16 weights, CPU seconds,
    and the most memory of the process, in MB."""

    layers: int
    kinds: int
    gigabytes: float
    seconds: float
    megabytes: int


def check_capture(name: str) -> CaptureFigures:
    """Capture the real config of a family or of one of ``MODELS`` without weights."""
    family, options = MODELS.get(name, (name, None))
    config = real_config(family) if options is None else AutoConfig.for_model(family, **options)
    begin = time.process_time()
    graph = capture_config(config, "bfloat16").graph
    seconds = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return CaptureFigures(
        len(graph.layers), len(graph.bodies), graph.weight_bytes / 1e9, seconds, peak
    )


@dataclass(frozen=True, slots=True)
class ExecutionFigures:
    """Generation in a quarter of the weights' bytes: prompts whose tokens differ from those of
    transformers' ``generate``, the first new token that does, and the budget as a share."""

    differing: int
    first: int
    share: float


def check_execution(family: str, share: float = 0.25) -> ExecutionFigures:
    """Generate greedily for ragged prompts with the tiny model in ``share`` of its weights, or the
    smallest budget that works if that is more."""
    model = tiny_model(family)
    with tempfile.TemporaryDirectory() as folder:
        tiny = support.save_tiny(model, Path(folder))
        lengths = [len(prompt) for prompt in PROMPTS]
        workload = Workload.of(lengths, NEW_TOKENS)
        least = smallest_budget(tiny.captured.graph, support.machine(), workload)
        budget = max(int(share * tiny.weight_bytes), int(1.02 * least))
        expected = support.transformers_tokens(model, PROMPTS, NEW_TOKENS)
        plan = support.plan_for(tiny, PROMPTS, NEW_TOKENS, budget)
        found = support.generate(tiny, plan, dict(enumerate(PROMPTS)), NEW_TOKENS).tokens
    places = [
        next(i for i, (a, b) in enumerate(zip(found[p], want, strict=True)) if a != b)
        for p, want in enumerate(expected)
        if found[p] != want
    ]
    return ExecutionFigures(len(places), min(places, default=-1), budget / tiny.weight_bytes)
