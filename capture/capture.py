"""Capture: a Hugging Face causal language model -> its task graph, without any weights."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, fx
from transformers import PretrainedConfig, PreTrainedModel

from dovetail.capture.adapters import adapt
from dovetail.capture.bodies import BodyBuilder
from dovetail.capture.build import (
    build_meta,
    check_dtype,
    default_dtype,
    initialised_buffer,
    read_config,
)
from dovetail.capture.captured import Captured
from dovetail.capture.checkpoint_names import CheckpointNames, Entries
from dovetail.capture.clean import clean
from dovetail.capture.experts import describe
from dovetail.capture.export import Traced, trace
from dovetail.capture.latent import with_latent_attention
from dovetail.capture.layers import Stack, find_stack
from dovetail.ir.errors import CaptureError
from dovetail.ir.task_graph import Body, Experts, TaskGraph, Value, Weight

_LOG = logging.getLogger(__name__)
_MOST_APART = 2
"""Layers that may turn out to be of a kind of their own."""


def capture_checkpoint(directory: Path, entries: Entries) -> Captured:
    """Capture the model folder ``directory``; ``entries`` is checkpoint key -> (dtype, shape).

    Raises CheckpointError when tensors are missing or have other shapes than config.json says,
    CaptureError when the model is of a kind that dovetail does not understand.
    """
    return capture_config(read_config(directory), entries=entries)


def capture_config(
    config: PretrainedConfig, dtype: str | None = None, entries: Entries | None = None
) -> Captured:
    """Capture the causal language model of ``config`` in ``dtype`` (the config's by default).

    Without ``entries`` checkpoint keys are those that transformers itself would save. Raises like
    ``capture_checkpoint``.
    """
    start = time.perf_counter()
    stored = (d.removeprefix("torch.") for d, _ in (entries or {}).values())
    name = check_dtype(dtype) if dtype is not None else default_dtype(config, stored)
    model = build_meta(config, name)
    adapt(model)
    apart: frozenset[int] = frozenset()
    while True:
        stack = find_stack(model, apart)
        traced = trace(model, stack)
        clean(traced.graph)
        names = CheckpointNames(model, stack.path, stack.traced, entries)
        try:
            return _assemble(model, name, stack, traced, names, start)
        except _UnlikeError as error:
            # A first layer that gets nothing from a layer before it is a kind of its own.
            if len(apart) == _MOST_APART:
                raise
            apart |= {error.first}


def _assemble(
    model: PreTrainedModel,
    dtype: str,
    stack: Stack,
    traced: Traced,
    names: CheckpointNames,
    start: float,
) -> Captured:
    weights = _Weights(model, stack, names)
    builder = BodyBuilder(traced, stack, weights.weight, weights.experts, weights.of_module)
    prologue = builder.prologue()
    bodies = tuple(builder.layer(i) for i in stack.representatives)
    for witness in stack.witnesses:
        _check_alike(bodies[stack.kinds[witness]], builder.layer(witness), stack, witness)
    bodies = tuple(with_latent_attention(body) for body in bodies)
    epilogue = builder.epilogue()
    _check_experts_seen(model, bodies)
    weights.check(prologue, bodies, epilogue)
    constants = _constants(model, traced, builder.constants)
    text = model.config.get_text_config()
    graph = TaskGraph(
        model={
            "model_type": str(model.config.model_type),
            "architecture": type(model).__name__,
            "num_layers": len(stack.kinds),
        },
        dtype=dtype,
        hidden=_size(text, "hidden_size"),
        vocab=_size(text, "vocab_size"),
        context=_size(text, "max_position_embeddings"),
        prologue=prologue,
        bodies=bodies,
        layers=stack.kinds,
        epilogue=epilogue,
        shared=builder.shared,
        constants={
            k: Value(traced.symbols.shape(v), str(v.dtype).removeprefix("torch."))
            for k, v in constants.items()
        },
    )
    return Captured(graph, constants, time.perf_counter() - start)


class _UnlikeError(CaptureError):
    """Layer ``first`` and a later one of its kind compute different things."""

    def __init__(self, first: int, message: str) -> None:
        super().__init__(message)
        self.first = first


class _Weights:
    """Looks weights up by model name and checks them against the checkpoint."""

    def __init__(self, model: PreTrainedModel, stack: Stack, names: CheckpointNames) -> None:
        self._model = model
        self._stack = stack
        self._names = names
        self._state: Mapping[str, Tensor] = model.state_dict()

    def weight(self, fqn: str, layer: int | None) -> Weight:
        prefix = f"{self._stack.path}.{layer}."
        if layer is not None and not fqn.startswith(prefix):
            raise CaptureError(
                f"layer {layer} reads {fqn}, which is not its own; weights shared between layers "
                "are not supported yet"
            )
        source = self._names.source(fqn, layer)
        keys = source.keys
        if "{expert}" in keys[0] or source.interleaved:
            raise CaptureError(
                f"{fqn} is stored in pieces ({', '.join(keys)}), which is supported for routed "
                "experts only"
            )
        name = (
            f"{self._stack.path}.{{layer}}.{fqn.removeprefix(prefix)}" if layer is not None else fqn
        )
        tensor = self._state[fqn]
        dtype = str(tensor.dtype).removeprefix("torch.")
        pieces = keys if len(keys) > 1 else ()
        return Weight(name, keys[0], tuple(int(s) for s in tensor.shape), dtype, pieces)

    def of_module(self, path: str) -> list[str]:
        """The names of all weights inside the module ``path``."""
        return [name for name in self._state if name.startswith(f"{path}.")]

    def experts(self, node: fx.Node, layer: int) -> Experts:
        idx, fqn = node.args[1], node.args[3]
        assert isinstance(idx, fx.Node) and isinstance(fqn, str)
        top_k = int(idx.meta["val"].shape[-1])
        return describe(self._model.get_submodule(fqn), fqn, top_k, layer, self._names)

    def check(self, prologue: Body, bodies: tuple[Body, ...], epilogue: Body) -> None:
        """Raise CheckpointError unless the checkpoint holds everything that the bodies read."""
        for kind, body in [(None, prologue), *enumerate(bodies), (None, epilogue)]:
            layers = [i for i, k in enumerate(self._stack.kinds) if k == kind]
            for task in body.tasks:
                for weight in (w for w in task.weights if not w.pieces):
                    self._names.check(weight.key, weight.shape, layers, 1, weight.dtype)
                for tensor in task.experts.tensors if task.experts else ():
                    count = task.experts.count if task.experts else 0
                    shape = (count, *tensor.shape) if tensor.stacked else tensor.shape
                    self._names.check(tensor.key, shape, layers, count, tensor.dtype)


def _size(config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if type(value) is not int:
        raise CaptureError(
            f"the configuration of model type {config.model_type!r} has {name} = {value!r}, "
            "expected a whole number; add it to config.json"
        )
    return value


def _check_alike(body: Body, other: Body, stack: Stack, witness: int) -> None:
    if body != other:
        first = stack.representatives[stack.kinds[witness]]
        raise _UnlikeError(
            first,
            f"{stack.path}.{first} and {stack.path}.{witness} have the same modules, attributes "
            "and shapes but compute different things; what tells them apart needs an adapter in "
            "capture/",
        )


def _check_experts_seen(model: PreTrainedModel, bodies: tuple[Body, ...]) -> None:
    config = model.config.get_text_config()
    fields = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    declared = max((getattr(config, f, None) or 0 for f in fields), default=0)
    if declared > 1 and all(body.experts is None for body in bodies):
        _LOG.warning(
            "model type %r declares %d experts, but none go through transformers' experts "
            "interface: they run as dense tasks, all of their weights in every step; an adapter in "
            "capture/adapters would make them one experts task",
            config.model_type,
            declared,
        )


def _constants(
    model: PreTrainedModel, traced: Traced, used: Mapping[str, fx.Node]
) -> dict[str, Tensor]:
    data: dict[str, Tensor] = {}
    for name, node in used.items():
        if node.name in traced.buffers:
            data[name] = initialised_buffer(model, traced.buffers[node.name])
            continue
        lifted = traced.lifted[node.name]
        if lifted.device.type == "meta":
            raise CaptureError(
                f"the model makes the constant {name} while it runs and its data is lost on the "
                "meta device; this family needs an adapter in capture/"
            )
        data[name] = torch.as_tensor(lifted).clone()
    return data
