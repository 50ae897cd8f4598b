"""Modules of the model that run whole: transformers' own code, one sequence at a time.

State spaces, linear attention and unusual attention keep transformers' cache as the state of each
sequence. The modules are built without data from the checkpoint's config; every call lends them the
weights that the schedule has in memory.
"""

import copy
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.ir.errors import CheckpointError
from dovetail.ir.task_graph import Const, Op, Task, TaskGraph
from dovetail.runtime.group_state import GroupState
from dovetail.runtime.pools import TierBudget, torch_dtype
from dovetail.runtime.weight_store import Tensors

MODULE = "dovetail.module"


@dataclass(frozen=True, slots=True)
class Cache:
    """In an emitted call: the state of the sequence."""


@dataclass(frozen=True, slots=True)
class Mask:
    """In an emitted call: a causal mask, with a window and chunks where these are not 0."""

    window: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Carried:
    """In an emitted call: result ``index`` of the module that last gave one for the sequence."""

    index: int


@dataclass(frozen=True, slots=True)
class Part:
    """In an emitted call: the sequence's part of ``tensor``, whose axes ``seqs`` and ``tokens``
    (-1: none) count sequences and new tokens."""

    tensor: Tensor
    seqs: int
    tokens: int

    def of(self, row: int, first: int, last: int) -> Tensor:
        """New tokens ``first`` to ``last`` (exclusive) of a row, with an axis of one sequence."""
        own = self.tensor if self.seqs < 0 else self.tensor.narrow(self.seqs, row, 1)
        return own if self.tokens < 0 else own.narrow(self.tokens, first, last - first)


@dataclass(frozen=True, slots=True)
class _Place:
    """New tokens ``first`` to ``last`` (exclusive) of row ``row``, which holds ``held`` before;
    ``layer`` is the module's place in the cache."""

    row: int
    first: int
    last: int
    held: int
    layer: int = 0


@dataclass(slots=True)
class _Sequence:
    """The state of one sequence: transformers' cache, the layers that have written into it, and
    results that travel from layer to layer."""

    cache: Any
    begun: set[tuple[int, str]] = field(default_factory=set)
    carried: dict[int, Tensor] = field(default_factory=dict)


class Modules:
    """The whole modules of a model, and the states of the sequences in flight.

    ``nbytes`` are reserved for the states for as long as this is open. Raises CheckpointError when
    transformers cannot build the model from ``directory``'s config.
    """

    def __init__(
        self, graph: TaskGraph, directory: Path | None, budget: TierBudget, nbytes: int
    ) -> None:
        self._budget, self._nbytes = budget, nbytes
        if directory is None:
            raise CheckpointError(
                f"modules of {graph.model.get('model_type', 'this model')} run whole and are built "
                "from a checkpoint folder, but the weights are in memory: save_pretrained the "
                "model and load it from there"
            )
        budget.reserve(nbytes, "states")
        with torch.inference_mode(False):
            self._model = _without_data(directory, graph)
        self._config = self._model.config.get_text_config(decoder=True)
        self._kept, self._stepwise = _kept(graph), _stepwise(graph)
        self._own = threading.local()
        self._sequences: dict[int, _Sequence] = {}
        self._lock = threading.Lock()

    def run(
        self,
        g: GroupState,
        layer: int,
        path: str,
        weights: Tensors,
        wanted: tuple[int, ...],
        arguments: Mapping[str, Any],
    ) -> Any:
        """Run the module ``path`` of ``layer`` on every sequence of a group; returns the results
        ``wanted``, padded again, one alone or a tuple."""
        inner = self._module(layer, path)
        prefix = f"{path}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        outs: list[list[Tensor]] = [[] for _ in wanted]
        for row, (member, length) in enumerate(zip(g.group.members, g.group.lengths, strict=True)):
            state = self._sequence(member.index, member.held, layer, path)
            stepwise = path in self._stepwise and member.held
            pieces: list[list[Tensor]] = [[] for _ in wanted]
            for first in range(0, length, 1 if stepwise else length):
                last = first + 1 if stepwise else length
                place = _Place(row, first, last, member.held + first)
                results = self._call(inner, own, arguments, place, state)
                for pieces_of, index in zip(pieces, wanted, strict=True):
                    pieces_of.append(results[index])
            for whole, parts in zip(outs, pieces, strict=True):
                whole.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        joined = tuple(_joined(parts, g) for parts in outs)
        return joined[0] if len(joined) == 1 else joined

    def _call(
        self,
        inner: nn.Module,
        weights: Tensors,
        arguments: Mapping[str, Any],
        place: "_Place",
        state: _Sequence,
    ) -> tuple[Any, ...]:
        index = getattr(inner, "layer_idx", None)
        place = replace(place, layer=index if type(index) is int else 0)
        given = {k: self._given(v, place, state) for k, v in arguments.items()}
        with _seen(state.cache, place.held):
            result = torch.func.functional_call(inner, weights, (), given, strict=False)
        results = result if isinstance(result, tuple) else (result,)
        for index in self._kept:
            if index < len(results) and isinstance(results[index], Tensor):
                state.carried[index] = results[index]
        return results

    def leave(self, indices: list[int]) -> None:
        """Forget the states of sequences that have ended."""
        with self._lock:
            for index in indices:
                self._sequences.pop(index, None)

    def close(self) -> None:
        """Forget everything and give the memory back."""
        self._sequences.clear()
        self._budget.release(self._nbytes, "states")
        self._nbytes = 0

    def _module(self, layer: int, path: str) -> nn.Module:
        """This thread's own copy of a module: weights are lent to it while it runs."""
        made = self._own.__dict__.setdefault("made", {})
        if (layer, path) not in made:
            with torch.inference_mode(False):
                inner = copy.deepcopy(self._model.get_submodule(path.format(layer=layer)))
                _fill_buffers(self._model, inner)
            made[layer, path] = inner
        found: nn.Module = made[layer, path]
        return found

    def _sequence(self, index: int, held: int, layer: int, path: str) -> _Sequence:
        with self._lock:
            state = self._sequences.get(index)
            if state is None or (held == 0 and (layer, path) in state.begun):
                state = self._sequences[index] = _Sequence(self._new_cache())
            state.begun.add((layer, path))
            return state

    def _new_cache(self) -> Any:
        from transformers.cache_utils import Cache as AnyCache
        from transformers.cache_utils import DynamicCache

        name = type(self._model).__module__
        kinds = [kind for kind in vars(sys.modules[name]).values() if inspect.isclass(kind)]
        own = [k for k in kinds if issubclass(k, AnyCache) and k.__module__ == name]
        return own[0]() if own else DynamicCache(config=self._config)

    def _given(self, value: Any, place: "_Place", state: _Sequence) -> Any:
        match value:
            case Part():
                return value.of(place.row, place.first, place.last)
            case Cache():
                return state.cache
            case Mask(window, chunk):
                mask = _mask(place, window, chunk, self._model.dtype)
                return _seen_part(mask, state.cache, place)
            case Carried(index):
                return state.carried.get(index)
            case tuple():
                return tuple(self._given(item, place, state) for item in value)
            case dict():
                return {k: self._given(v, place, state) for k, v in value.items()}
        return value


def state_nbytes(graph: TaskGraph, seqs: int, tokens: int) -> int:
    """Bytes that the states of ``seqs`` sequences with ``tokens`` tokens altogether take."""
    bodies = [graph.body(i) for i in range(len(graph.layers))]
    growing = sum(state.bytes_per_token for body in bodies for state in body.states)
    return seqs * graph.state_bytes_per_seq + tokens * growing


def _whole(graph: TaskGraph) -> Iterator[tuple[Task, Op]]:
    """The operators that run whole modules, with their tasks."""
    for body in graph.bodies:
        for task in body.tasks:
            yield from ((task, op) for op in task.ops if op.target == MODULE)


def _kept(graph: TaskGraph) -> set[int]:
    """The results that travel from layer to layer with a sequence."""
    given = [v for _, op in _whole(graph) for v in op.kwargs.values() if isinstance(v, Const)]
    words = [value.name.split() for value in given]
    return {int(w[1]) for w in words if w[0] == "carried"}


def _stepwise(graph: TaskGraph) -> set[str]:
    """The modules that take a prompt's later pieces token by token: not every state space of
    transformers goes on from its state with more than one token."""
    found = ((op.args[0], task.state) for task, op in _whole(graph))
    return {str(path) for path, state in found if state and not state.bytes_per_token}


def has_modules(graph: TaskGraph) -> bool:
    """Whether some module of the model runs whole."""
    return any(True for _ in _whole(graph))


def _without_data(directory: Path, graph: TaskGraph) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch_dtype(graph.dtype), attn_implementation="eager"
            )
    except (ValueError, KeyError, OSError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"{directory}: transformers cannot build the model whose modules run whole: {error}"
        ) from error
    return model.train(False).requires_grad_(False)


def _fill_buffers(model: Any, inner: nn.Module) -> None:
    """Compute the buffers that no checkpoint holds, by the model's own code."""
    for owner in inner.modules():
        missing = owner._non_persistent_buffers_set
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None and buffer.is_meta and name in missing:
                owner._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
        if missing:
            with torch.no_grad(), torch.device("cpu"):
                model._init_weights(owner)


@contextmanager
def _seen(cache: Any, held: int) -> Iterator[None]:
    """Within the block the cache says that it has seen ``held`` tokens, whichever layer is asked:
    layers with plain KV keep theirs elsewhere."""
    cache.get_seq_length = lambda layer_idx=0, *_: held
    try:
        yield
    finally:
        del cache.get_seq_length


def _mask(place: _Place, window: int, chunk: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a sequence's new queries, ``[1, 1, q, kv]``: transformers'
    form for its plain attention."""
    total = place.held + place.last - place.first
    query = torch.arange(place.held, total)[:, None]
    key = torch.arange(total)[None, :]
    hidden = key > query
    if window:
        hidden |= key <= query - window
    if chunk:
        hidden |= key // chunk != query // chunk
    mask = torch.zeros(hidden.shape, dtype=dtype)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]


def _seen_part(mask: Tensor, cache: Any, place: _Place) -> Tensor:
    """The columns of ``mask`` for the keys that the cache still has: one with a window forgets."""
    layers = cache.layers
    sizes = getattr(layers[place.layer], "get_mask_sizes", None) if layers else None
    if sizes is None or not getattr(layers[place.layer], "is_sliding", False):
        return mask
    length, offset = sizes(place.last - place.first)
    return mask[..., offset : offset + length]


def _joined(parts: list[Tensor], g: GroupState) -> Tensor:
    """Results of single sequences ``[1, length, ...]`` as one ``[seqs, q_len, ...]``."""
    if len(parts) == 1 and parts[0].shape[1] == g.q_len:
        return parts[0]
    out = torch.zeros((len(parts), g.q_len, *parts[0].shape[2:]), dtype=parts[0].dtype)
    for row, part in enumerate(parts):
        out[row, : part.shape[1]] = part[0]
    return out
