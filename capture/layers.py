"""Kinds of layers: find the layer stack, tell which layers are alike, and trace one of each kind.

Layers of one kind compute the same function of their own weights, so only the first and the last
of each kind are traced (the last to check the claim); the others are stood in for by modules that
hand their input on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dovetail.ir.errors import CaptureError

_SIMPLE = (int, float, bool, str, type(None), torch.dtype)
_INDEX_NAMES = ("layer", "idx", "index")


@dataclass(frozen=True, slots=True)
class Carried:
    """Stands in for result ``place`` of a module that stays whole, which other layers get: it
    travels with the sequence's state, since its size may follow from the data."""

    place: int


@dataclass(frozen=True, slots=True)
class Stack:
    """The repeated layers: ``path`` of their ModuleList, the first layer of each kind in order,
    the last of those that have more than one, and for every layer the position of its kind."""

    path: str
    representatives: tuple[int, ...]
    witnesses: tuple[int, ...]
    kinds: tuple[int, ...]

    @property
    def traced(self) -> tuple[int, ...]:
        """The layers that are traced: representatives, and witnesses to compare them with."""
        return tuple(sorted({*self.representatives, *self.witnesses}))


def find_stack(model: PreTrainedModel, apart: frozenset[int] = frozenset()) -> Stack:
    """The stack of ``model``, the layers ``apart`` each of its own kind; raises CaptureError when
    it has no list of layers."""
    path, size = "", -1
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{o}.") for o in outer):
            continue
        outer.append(name)
        weight = sum(p.numel() for p in module.parameters())
        if len(module) and weight > size:
            path, size = name, weight
    if size <= 0:
        raise CaptureError(
            f"{type(model).__name__} has no ModuleList of layers; expected a decoder-only "
            "transformer with its layers in one list"
        )
    signatures = [
        (*_signature(layer, i, model.config.get_text_config()), i if i in apart else -1)
        for i, layer in enumerate(_modules(model, path))
    ]
    first = tuple(dict.fromkeys(signatures))
    kinds = tuple(first.index(s) for s in signatures)
    representatives = tuple(kinds.index(k) for k in range(len(first)))
    last = {kind: index for index, kind in enumerate(kinds)}
    return Stack(
        path, representatives, tuple(sorted(set(last.values()) - {*representatives})), kinds
    )


def _modules(model: nn.Module, path: str) -> nn.ModuleList:
    stack = model.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    return stack


def _signature(layer: nn.Module, index: int, config: Any) -> tuple[Any, ...]:
    """What decides what a layer computes: classes, plain attributes, shapes, config lists."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        parts.append((name, f"{type(module).__module__}.{type(module).__qualname__}"))
        for key, value in sorted(vars(module).items()):
            if (
                not key.startswith(("__", "_dovetail"))
                and not _is_index(key, value, index)
                and _is_plain(value)
            ):
                parts.append((name, key, repr(value)))
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        parts.append((name, tuple(tensor.shape), str(tensor.dtype)))
    count = getattr(config, "num_hidden_layers", None)
    for key, value in sorted(config.to_dict().items()):
        if isinstance(value, list | tuple) and len(value) == count and value[index] != index:
            parts.append((key, repr(value[index])))
    return tuple(parts)


def _is_index(key: str, value: Any, index: int) -> bool:
    """Whether an attribute is the layer's number; of two attentions in a layer it may be twice
    that number or one more."""
    numbers = (index, 2 * index, 2 * index + 1) if key == "layer_idx" else (index,)
    return type(value) is int and value in numbers and any(part in key for part in _INDEX_NAMES)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(item, _SIMPLE) for item in value)
    return isinstance(value, _SIMPLE)


class _PassThrough(nn.Module):
    """Stands in for a layer: hands its input on in the form that a real layer of the stack has."""

    def __init__(self, layer: nn.Module, forms: dict[int, int | None], kind: int) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that its parameters are not registered here
        self._forms = forms
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden state, alone or as the first of a tuple."""
        hidden = args[0] if args else kwargs["hidden_states"]
        width = self._forms[self._kind]
        if width is None:
            return hidden
        carried = [v for v in (*args, *kwargs.values()) if isinstance(v, Carried)]
        return (hidden, *(carried + [None] * width)[: width - 1])


@contextmanager
def one_of_each(model: PreTrainedModel, stack: Stack) -> Iterator[None]:
    """Within the block only ``stack.traced`` run, their borders marked in the traced graph.

    Marks are ``enter:<layer>`` and ``leave:<layer>`` on the carried hidden state and
    ``name:<text>`` on other tensors that come in.
    """
    modules = _modules(model, stack.path)
    originals = list(modules)
    forms: dict[int, int | None] = {}
    for index, layer in enumerate(originals):
        kind = stack.kinds[index]
        if index in stack.traced:
            layer.forward = _marked(layer, index, forms, kind)
        else:
            modules[index] = _PassThrough(layer, forms, kind)
    try:
        yield
    finally:
        for index, layer in enumerate(originals):
            modules[index] = layer
            if index in stack.traced:
                del layer.forward


def _marked(layer: nn.Module, index: int, forms: dict[int, int | None], kind: int) -> Any:
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_mark(args[0], f"enter:{index}"), *args[1:])
        else:
            kwargs["hidden_states"] = _mark(kwargs["hidden_states"], f"enter:{index}")
        named = {key: _named(value, key) for key, value in kwargs.items() if key != "hidden_states"}
        out = original(*args, **kwargs | named)
        return _leave(out, f"{index} ({type(layer).__name__})", index, forms, kind)

    return forward


def _leave(out: Any, name: str, index: int, forms: dict[int, int | None], kind: int) -> Any:
    if isinstance(out, Tensor):
        forms[kind] = None
        return _mark(out, f"leave:{index}")
    if (
        isinstance(out, tuple)
        and isinstance(out[0], Tensor)
        and all(o is None or isinstance(o, Carried) for o in out[1:])
    ):
        forms[kind] = len(out)
        return (_mark(out[0], f"leave:{index}"), *out[1:])
    further = out[1:] if isinstance(out, tuple) else ()
    what = [f"a tensor {list(o.shape)}" for o in further if isinstance(o, Tensor)]
    raise CaptureError(
        f"layer {name} returns {' and '.join(what) or type(out).__name__} besides the hidden "
        "state, expected the hidden state alone: tensors that travel from layer to layer are not "
        "supported unless a module that runs whole makes them; an adapter in capture/adapters can "
        "say which module that is"
    )


def _named(value: Any, key: str) -> Any:
    if key == "position_embeddings" and isinstance(value, tuple) and len(value) == 2:
        return tuple(_mark(v, f"name:{n}") for v, n in zip(value, ("cos", "sin"), strict=True))
    if isinstance(value, Tensor) and value.is_floating_point() | value.is_complex():
        return _mark(value, "name:rope" if key == "position_embeddings" else f"name:{key}")
    return value


def _mark(x: Tensor, label: str) -> Tensor:
    marked: Tensor = torch.ops.dovetail.mark(x, label)
    return marked
