"""A transformers model without data: on the meta device, with the dtypes it is loaded with."""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dovetail.ir.errors import CaptureError, CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def read_config(directory: Path) -> PretrainedConfig:
    """The model configuration in ``directory``, without running code from the folder."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no config.json; expected a Hugging Face model folder"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        return config
    except (ValueError, KeyError, OSError) as error:
        raise CaptureError(
            f"{directory / 'config.json'} cannot be understood: {error}. dovetail reads models "
            "whose code is in transformers itself"
        ) from error


def build_meta(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """The causal language model of ``config`` on the meta device, in evaluation mode."""
    config = copy.deepcopy(config)
    _refuse_quantised(config)
    config.output_router_logits = False
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=DTYPES[dtype], trust_remote_code=False
            )
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CaptureError(
            f"no causal language model can be built for model type {config.model_type!r}: {error}"
        ) from error
    _apply_dtype_plan(model, DTYPES[dtype])
    model.train(False)
    model.requires_grad_(False)
    return model


def _refuse_quantised(config: PretrainedConfig) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
    raise CaptureError(
        f"model type {config.model_type!r} holds weights quantised with {method!r}; dovetail reads "
        "float32, bfloat16 and float16 checkpoints: load it with transformers, dequantise "
        "(model.dequantize()) and save_pretrained it to a new folder"
    )


def default_dtype(config: PretrainedConfig, stored: Iterable[str]) -> str:
    """The dtype that transformers would load: the config's, else that of the ``stored`` tensors."""
    wanted = getattr(config, "dtype", None)
    name = str(wanted).removeprefix("torch.") if wanted is not None else None
    return check_dtype(name or next((s for s in stored if s in DTYPES), "float32"))


def check_dtype(dtype: str) -> str:
    """``dtype`` without a ``torch.`` prefix; raises CaptureError when models cannot run in it."""
    name = dtype.removeprefix("torch.")
    if name not in DTYPES:
        raise CaptureError(f"dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}")
    return name


def _apply_dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters that loading keeps in float32 that dtype, as from_pretrained does."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                fqn = f"{path}.{name}".removeprefix(".")
                kept = next(
                    (d for p, d in plan.items() if re.search(p.replace("*", ".*"), fqn)), None
                )
                if tensor is not None and kept is not None and tensor.is_floating_point():
                    held[name] = _retyped(tensor, kept)


def _retyped(tensor: Tensor, dtype: torch.dtype) -> Any:
    empty = torch.empty_like(tensor, dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def initialised_buffer(model: PreTrainedModel, fqn: str) -> Tensor:
    """The data of the non-persistent buffer ``fqn``, computed by the model's own code."""
    path, _, name = fqn.rpartition(".")
    owner = model.get_submodule(path)
    meta = dict(owner._buffers)
    for key, buffer in meta.items():
        if buffer is not None:
            filler = float("nan") if buffer.is_floating_point() else -1
            owner._buffers[key] = torch.full(buffer.shape, filler, dtype=buffer.dtype, device="cpu")
    try:
        with torch.no_grad(), torch.device("cpu"):
            model._init_weights(owner)  # type: ignore[no-untyped-call]
        data = owner._buffers[name]
        assert data is not None
    finally:
        owner._buffers.update(meta)
    if not data.is_floating_point() or bool(data.isnan().any()):
        raise CaptureError(
            f"buffer {fqn} is in no checkpoint and {type(owner).__name__} does not say how to "
            "compute it (_init_weights leaves it unset)"
        )
    return data.clone()
