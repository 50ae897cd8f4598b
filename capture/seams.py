"""The operators that stay opaque while a model is traced, and how transformers is led to them.

Attention, the KV update and the routed experts become one operator each, so that the runtime can
supply them; ``dovetail::mark`` is an identity that leaves the borders of layers visible in the
traced graph. None of them ever runs: only their shapes are used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dovetail.capture.masks import MaskRule, mask_rule
from dovetail.capture.whole import new_cache
from dovetail.ir.errors import CaptureError

NAME = "dovetail_capture"
"""The name under which transformers' registries know our operators; ``dovetail`` itself is the name
of the experts that run (``dovetail.doors.hf_experts``)."""

FQN_ATTRIBUTE = "_dovetail_fqn"
_HARMLESS = frozenset({"position_ids", "cache_position"})


@torch.library.custom_op("dovetail::kv_update", mutates_args=())
def kv_update(k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """Append ``k``, ``v`` ``[seqs, heads, q_len, dim]`` and return all ``past + q_len`` of each."""
    raise NotImplementedError("dovetail::kv_update only exists while a model is captured")


@kv_update.register_fake
def _(k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:
    def grown(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1], past + x.shape[2], x.shape[3])

    return grown(k), grown(v)


@torch.library.custom_op("dovetail::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    *,
    chunk: int = 0,
) -> Tensor:
    """Causal attention of ``q`` [seqs, heads, q_len, dim]; gives [seqs, q_len, heads, dim].

    With ``window`` a query sees the last so many positions, with ``chunk`` those of its own chunk.
    """
    raise NotImplementedError("dovetail::attention only exists while a model is captured")


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    *,
    chunk: int = 0,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("dovetail::experts", mutates_args=())
def experts(x: Tensor, idx: Tensor, w: Tensor, module: str) -> Tensor:
    """Routed experts of the module named ``module`` over tokens ``x`` ``[tokens, hidden]``."""
    raise NotImplementedError("dovetail::experts only exists while a model is captured")


@experts.register_fake
def _(x: Tensor, idx: Tensor, w: Tensor, module: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dovetail::mark", mutates_args=())
def mark(x: Tensor, label: str) -> Tensor:
    """The identity, with a label that capture reads back from the graph."""
    raise NotImplementedError("dovetail::mark only exists while a model is captured")


@mark.register_fake
def _(x: Tensor, label: str) -> Tensor:
    return torch.empty_like(x)


def _mask(*, mask_function: Any = masking_utils.causal_mask_function, **_: Any) -> MaskRule:
    return mask_rule(mask_function)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    where = f"{type(module).__name__}, layer {getattr(module, 'layer_idx', '?')}"
    if not isinstance(attention_mask, MaskRule):
        raise CaptureError(
            f"{where}: attention got the mask {type(attention_mask).__name__}, expected the causal "
            "rule of transformers' mask registry; this model builds its own masks"
        )
    if sliding_window and sliding_window != attention_mask.window:
        raise CaptureError(
            f"{where}: attention has sliding_window={sliding_window} but its mask has a window of "
            f"{attention_mask.window or 'no limit'}; the two must agree"
        )
    odd = sorted(
        name
        for name, given in kwargs.items()
        if (name == "softcap" and given is not None)
        or (name == "is_causal" and given is False)
        or (isinstance(given, Tensor) and name not in _HARMLESS)
    )
    if odd:
        raise CaptureError(f"{where}: attention with {', '.join(odd)} is not supported yet")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = attention_mask
    given = (query, key, value, s_aux, float(scale), rule.window)
    chunk = {"chunk": rule.chunk} if rule.chunk else {}
    return torch.ops.dovetail.attention(*given, **chunk), None


def _experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    y: Tensor = torch.ops.dovetail.experts(
        hidden_states, top_k_index, top_k_weights, getattr(self, FQN_ATTRIBUTE)
    )
    return y


class _KvLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A cache layer whose update is the ``kv_update`` seam."""

    is_sliding = False
    is_compileable = False

    def __init__(self, past: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.past = past
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the executor owns the storage."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Append and return everything, as the ``kv_update`` operator."""
        return torch.ops.dovetail.kv_update(key_states, value_states, self.past)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """KV length and offset."""
        return self.past + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens already held."""
        return self.past

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def kv_cache(model: PreTrainedModel, past: int) -> Cache:
    """A cache of the kind that ``model`` asks for, over the ``kv_update`` seam; ``past`` may be
    symbolic."""
    indices = [getattr(module, "layer_idx", -1) for module in model.modules()]
    count = max((i for i in indices if type(i) is int), default=-1) + 1
    layers: list[Any] = [_KvLayer(past) for _ in range(count)]
    cache = new_cache(model)
    if isinstance(cache, DynamicCache) and type(cache) is not DynamicCache:
        cache.layers = layers
        return cache
    return Cache(layers=layers)


@contextmanager
def seams(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, ``model`` calls our operators for masks, attention and experts."""
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    config = model.config
    before = config._attn_implementation, config._experts_implementation
    holders = [(n, m) for n, m in model.named_modules() if hasattr(m, "has_gate")]
    for name, module in holders:
        setattr(module, FQN_ATTRIBUTE, name)
    config._attn_implementation = config._experts_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation, config._experts_implementation = before
        for _, module in holders:
            delattr(module, FQN_ATTRIBUTE)
