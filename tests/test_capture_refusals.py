"""What capture refuses, and what it says then."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.capture_cases import config_of, entries_of, graph_of
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dovetail.capture.capture import capture_checkpoint, capture_config
from dovetail.ir.errors import CaptureError, CheckpointError


def test_missing_tensor_is_refused() -> None:
    entries = entries_of(graph_of("mixtral"))
    gone = "model.layers.3.block_sparse_moe.experts.5.w3.weight"
    del entries[gone]
    with pytest.raises(CheckpointError, match=f"no tensor {gone}; expected one of shape"):
        capture_config(config_of("mixtral"), "float32", entries)


def test_missing_kind_of_tensor_is_refused() -> None:
    entries = {k: v for k, v in entries_of(graph_of("olmoe")).items() if "k_norm" not in k}
    with pytest.raises(CheckpointError, match=r"no tensor for model.layers.0.self_attn.k_norm"):
        capture_config(config_of("olmoe"), "float32", entries)


def test_half_of_a_pair_is_refused() -> None:
    entries = {k: v for k, v in entries_of(graph_of("olmoe")).items() if "up_proj" not in k}
    with pytest.raises(CheckpointError, match=r"up_proj.*both are needed"):
        capture_config(config_of("olmoe"), "float32", entries)


def test_wrong_shape_is_refused() -> None:
    entries = entries_of(graph_of("olmoe"))
    entries["model.layers.2.self_attn.q_proj.weight"] = ("float32", (64, 32))
    with pytest.raises(CheckpointError, match=r"q_proj.weight has shape \[64, 32\], expected"):
        capture_config(config_of("olmoe"), "float32", entries)


def test_stored_dtype_without_a_config_for_it_is_refused() -> None:
    entries = entries_of(graph_of("olmoe"))
    entries["lm_head.weight"] = ("float8_e4m3fn", (256, 64))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is stored as float8_e4m3fn"):
        capture_config(config_of("olmoe"), "float32", entries)


def test_quantised_config_is_refused() -> None:
    config = config_of("deepseek_v3", quantization_config={"quant_method": "fp8"})
    with pytest.raises(CaptureError, match=r"quantised with 'fp8'.*dequantise"):
        capture_config(config)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        capture_checkpoint(tmp_path, {})


def test_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense_moe"}))
    with pytest.raises(CaptureError, match="nonsense_moe"):
        capture_checkpoint(tmp_path, {})


def test_model_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"no causal language model .* 'vit'"):
        capture_config(AutoConfig.for_model("vit"))


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(CaptureError, match="dtype 'int8' is not supported; expected one of float"):
        capture_config(config_of("olmoe"), "int8")


def test_layers_that_only_look_alike_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaDecoderLayer.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) * (1 + self.self_attn.layer_idx)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled)
    with pytest.raises(CaptureError, match=r"model.layers.3 have the same modules"):
        capture_config(config_of("llama"), "float32")


def test_layer_without_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaDecoderLayer.forward

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs | {"past_key_values": None})

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forgetful)
    with pytest.raises(CaptureError, match="calls attention alone, expected both or neither"):
        capture_config(config_of("llama"), "float32")
