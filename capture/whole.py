"""Modules that stay whole: state spaces, linear attention, and attention that no seam describes.

Such a module becomes one operator, ``dovetail::module``, with its tensors as arguments; the runtime
runs transformers' own code for it, one sequence at a time, with transformers' own cache as the
sequence's state. What it returns and what it keeps is learnt from two dry runs on the meta device.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dovetail.capture.adapters.whole_classes import WHOLE
from dovetail.capture.layers import Carried, Stack
from dovetail.capture.masks import MaskRule
from dovetail.ir.errors import CaptureError
from dovetail.ir.task_graph import StateSpec

CACHE_ARGUMENTS = ("cache_params", "past_key_values", "past_key_value", "past_states")
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
_PLAIN_VALUES = (bool, int, float, str)
Sizes = Sequence[int | torch.SymInt]
Dims = tuple[int | str, ...]


@torch.library.custom_op("dovetail::module", mutates_args=())
def module(inputs: Sequence[Tensor], path: str, call: str) -> list[Tensor]:
    """Run the module named ``path``; ``call`` says, as JSON, which input is which argument."""
    raise NotImplementedError("dovetail::module only exists while a model is captured")


@module.register_fake
def _(inputs: Sequence[Tensor], path: str, call: str) -> list[Tensor]:
    shapes = json.loads(call)["outs"]
    sizes = dict(zip(("seqs", "q_len"), inputs[0].shape[:2], strict=True))
    return [
        inputs[0].new_empty(
            [sizes[s] if isinstance(s, str) else s for s in shape], dtype=getattr(torch, dtype)
        )
        for shape, dtype in shapes
    ]


@dataclass(slots=True)
class Whole:
    """A module that stays whole: ``form`` is what it returns, with numbers for the tensors of
    ``shapes`` (which are its results ``places``); ``state`` is what it keeps, ``why`` the reason
    where it is a fallback."""

    path: str
    why: str = ""
    form: Any = None
    shapes: list[tuple[Dims, str]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    state: StateSpec = field(default_factory=lambda: StateSpec(0, 0))
    runs: list[tuple[int, int, Any, int]] = field(default_factory=list)


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache of the kind that ``model`` makes for itself."""
    name = type(model).__module__
    kinds = [kind for kind in vars(sys.modules[name]).values() if inspect.isclass(kind)]
    own = [kind for kind in kinds if issubclass(kind, Cache) and kind.__module__ == name]
    return own[0]() if own else DynamicCache(config=model.config.get_text_config(decoder=True))


def cache_takers(model: PreTrainedModel, stack: Stack) -> dict[str, nn.Module]:
    """The outermost modules inside the traced layers that take a cache, by path."""
    found: dict[str, nn.Module] = {}
    for layer in stack.traced:
        root = f"{stack.path}.{layer}"
        for name, inner in model.get_submodule(root).named_modules():
            outer = any(f"{root}.{name}".startswith(f"{path}.") for path in found)
            if name and not outer and takes_cache(inner):
                found[f"{root}.{name}"] = inner
    return found


def _inside(model: PreTrainedModel, stack: Stack) -> Iterator[tuple[str, nn.Module]]:
    for layer in stack.traced:
        root = f"{stack.path}.{layer}"
        for name, inner in model.get_submodule(root).named_modules():
            yield f"{root}.{name}", inner


def takes_cache(inner: nn.Module) -> bool:
    """Whether a module's forward has a parameter for the cache."""
    return bool(set(CACHE_ARGUMENTS) & set(inspect.signature(type(inner).forward).parameters))


def find_whole(model: PreTrainedModel, stack: Stack) -> dict[str, Whole]:
    """The modules whose state is not a plain KV cache, by path."""
    layers = new_cache(model).layers
    layers = layers or DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    plain = [type(layer) in _PLAIN for layer in layers]
    found = {p: Whole(p) for p, m in _inside(model, stack) if type(m).__name__ in WHOLE}
    for path, inner in cache_takers(model, stack).items():
        layer = int(path.removeprefix(f"{stack.path}.").split(".")[0])
        index = getattr(inner, "layer_idx", layer)
        if type(index) is not int or index >= len(plain) or not plain[index]:
            found[path] = Whole(path)
    return found


@contextmanager
def stay_whole(model: PreTrainedModel, wholes: dict[str, Whole], *, dry: bool) -> Iterator[None]:
    """Within the block the modules in ``wholes`` are operators; in a ``dry`` run they run, and what
    they return and keep is noted."""
    travelling: dict[int, Tensor] = {}
    for path, whole in wholes.items():
        inner = model.get_submodule(path)
        run = _dry(model, inner, whole, travelling) if dry else _operator(inner, whole)
        inner.forward = run
    try:
        yield
    finally:
        for path in wholes:
            del model.get_submodule(path).forward


def _dry(
    model: PreTrainedModel, inner: nn.Module, whole: Whole, travelling: dict[int, Tensor]
) -> Callable[..., Any]:
    original = inner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal travelling
        given = _arguments(inner, args, kwargs)
        hidden = next(v for v in given.values() if isinstance(v, Tensor))
        seqs, q_len = hidden.shape[:2]
        cache = new_cache(model)
        real = {k: _real(v, cache, hidden, travelling) for k, v in given.items()}
        before = model.config._attn_implementation
        model.config._attn_implementation = "eager"
        try:
            out = original(**real)
        finally:
            model.config._attn_implementation = before
        whole.runs.append((int(seqs), int(q_len), _shape_of(out), _nbytes(cache)))
        if not isinstance(out, tuple):
            return out
        travelling |= {i: v for i, v in enumerate(out) if i and _travels(v)}
        return tuple(Carried(i) if i and _travels(v) else v for i, v in enumerate(out))

    return forward


def _travels(result: Any) -> bool:
    """Whether a further result is not simply one row for each token."""
    return isinstance(result, Tensor) and not (result.dim() == 3 and result.is_floating_point())


def _arguments(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, without those that are None where they may be left out."""
    signature = inspect.signature(type(inner).forward)
    bound = signature.bind(inner, *args, **kwargs).arguments
    del bound[next(iter(signature.parameters))]
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    needed = {n for n, p in signature.parameters.items() if p.default is inspect.Parameter.empty}
    return {name: value for name, value in bound.items() if value is not None or name in needed}


def _real(value: Any, cache: Cache, hidden: Tensor, travelling: dict[int, Tensor]) -> Any:
    if isinstance(value, Cache):
        return cache
    if isinstance(value, Carried):
        return travelling[value.place]
    if isinstance(value, MaskRule):
        seqs, q_len = hidden.shape[:2]
        return hidden.new_empty(seqs, 1, q_len, q_len)
    if isinstance(value, tuple):
        return tuple(_real(item, cache, hidden, travelling) for item in value)
    if isinstance(value, dict):
        return {key: _real(item, cache, hidden, travelling) for key, item in value.items()}
    return value


def _shape_of(out: Any) -> Any:
    """A result with (shape, dtype) in the place of each tensor and None for what is no tensor."""
    if isinstance(out, Tensor):
        return [[int(s) for s in out.shape], str(out.dtype).removeprefix("torch.")]
    if isinstance(out, tuple):
        return tuple(_shape_of(item) for item in out)
    return None


def _nbytes(value: Any, depth: int = 0) -> int:
    """Bytes of all tensors that a cache holds."""
    if isinstance(value, Tensor):
        return int(value.numel()) * value.element_size()
    if isinstance(value, dict):
        return sum(_nbytes(v, depth + 1) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_nbytes(v, depth + 1) for v in value)
    inside = depth < 4 and type(value).__module__.startswith("transformers.")
    return _nbytes(vars(value), depth + 1) if inside and hasattr(value, "__dict__") else 0


def learn(whole: Whole) -> None:
    """Settle what ``whole`` returns and keeps from two dry runs of different sizes."""
    (seqs, q_len, first, held), (seqs2, q_len2, second, held2) = whole.runs
    single = not isinstance(first, tuple)
    results = [(first, second)] if single else list(zip(first, second, strict=True))
    sizes = {(seqs, seqs2): "seqs", (q_len, q_len2): "q_len"}
    form: list[int | Carried | None] = []
    for place, (one, two) in enumerate(results):
        dims = _dims(one, two, sizes)
        if place and one is not None and (dims is None or not _tokenwise(dims, one[1])):
            form.append(Carried(place))
        elif dims is None:
            if place == 0:
                raise CaptureError(
                    f"module {whole.path} returns {one} for {seqs} sequences of {q_len} tokens and "
                    f"{two} for {seqs2} of {q_len2}; expected a tensor with sizes that are "
                    "constant or one of these two"
                )
            form.append(None)
        else:
            whole.shapes.append((dims, one[1]))
            whole.places.append(place)
            form.append(len(whole.shapes) - 1)
    whole.form = form[0] if single else tuple(form)
    per_token = max(0, (held2 // seqs2 - held // seqs) // (q_len2 - q_len))
    whole.state = StateSpec(max(0, held // seqs - per_token * q_len), per_token)


def _dims(one: Any, two: Any, sizes: dict[tuple[int, int], str]) -> Dims | None:
    if one is None or isinstance(one, tuple):
        return None
    found: list[int | str] = []
    for pair in zip(one[0], two[0], strict=True):
        if pair not in sizes and pair[0] != pair[1]:
            return None
        found.append(sizes.get(pair, pair[0]))
    return tuple(found)


def _tokenwise(dims: Dims, dtype: str) -> bool:
    return dims[:2] == ("seqs", "q_len") and len(dims) == 3 and "float" in dtype


def _operator(inner: nn.Module, whole: Whole) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs: list[Tensor] = []
        call = {
            name: _described(value, inputs, whole.path, name)
            for name, value in _arguments(inner, args, kwargs).items()
        }
        text = json.dumps({"call": call, "outs": whole.shapes, "places": whole.places})
        outs = torch.ops.dovetail.module(inputs, whole.path, text)
        return _filled(whole.form, outs)

    return forward


def _filled(form: Any, outs: list[Tensor]) -> Any:
    if isinstance(form, tuple):
        return tuple(_filled(item, outs) for item in form)
    return outs[form] if isinstance(form, int) else form


def _described(value: Any, inputs: list[Tensor], path: str, name: str) -> Any:
    """An argument as JSON: tensors by their place among ``inputs``."""
    if isinstance(value, Tensor):
        inputs.append(value)
        return {"tensor": len(inputs) - 1}
    if isinstance(value, Cache):
        return {"special": "cache"}
    if isinstance(value, MaskRule):
        return {"special": f"mask {value.window} {value.chunk}"}
    if isinstance(value, Carried):
        return {"special": f"carried {value.place}"}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        items = {k: _described(v, inputs, path, f"{name}[{k!r}]") for k, v in value.items()}
        return {"mapping": items}
    if isinstance(value, tuple | list):
        return [_described(item, inputs, path, name) for item in value]
    if value is None or isinstance(value, _PLAIN_VALUES):
        return value
    raise CaptureError(
        f"module {path} gets {name} of type {type(value).__name__}; expected tensors, numbers, "
        "words, a mask or the cache, since it runs as a whole"
    )
