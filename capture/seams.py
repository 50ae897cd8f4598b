"""The operators that stay opaque while a model is traced, and how transformers is led to them.

Attention, the KV update and the routed experts become one operator each, so that the runtime can
supply them; ``dovetail::mark`` is an identity that leaves the borders of layers visible in the
traced graph. None of them ever runs: only their shapes are used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dovetail.ir.errors import CaptureError

NAME = "dovetail"
"""The name under which transformers' registries know our operators."""

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
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int
) -> Tensor:
    """Causal attention of ``q`` [seqs, heads, q_len, dim]; gives [seqs, q_len, heads, dim]."""
    raise NotImplementedError("dovetail::attention only exists while a model is captured")


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int) -> Tensor:
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


@dataclass(frozen=True, slots=True)
class MaskRule:
    """What stands in for a mask: causal, and limited to ``window`` positions if it is not 0."""

    window: int


def mask_rule(mask_function: Any) -> MaskRule:
    """The rule behind transformers' ``mask_function``; raises CaptureError for any other kind."""
    if mask_function is masking_utils.causal_mask_function:
        return MaskRule(0)
    parts = _closure(mask_function).get("mask_functions", ())
    if len(parts) == 2 and parts[1] is masking_utils.causal_mask_function:
        window = _closure(parts[0]).get("sliding_window")
        if type(window) is int and parts[0].__qualname__.startswith("sliding_window_overlay."):
            return MaskRule(window)
    raise CaptureError(
        f"the model asks for the attention mask {_qualname(mask_function)}; dovetail knows causal "
        "and sliding-window causal masks; a model with another mask needs an adapter in capture/"
    )


def _closure(function: Any) -> dict[str, Any]:
    if not isinstance(function, FunctionType) or function.__closure__ is None:
        return {}
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _qualname(function: Any) -> str:
    names = [
        getattr(part, "__qualname__", "?") for part in _closure(function).get("mask_functions", ())
    ]
    return " and ".join(names) or getattr(function, "__qualname__", repr(function))


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
    window = attention_mask.window
    return torch.ops.dovetail.attention(query, key, value, s_aux, float(scale), window), None


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


def kv_cache(layers: int, past: int) -> Cache:
    """A transformers cache over the ``kv_update`` seam; ``past`` may be symbolic."""
    return Cache(layers=[_KvLayer(past) for _ in range(layers)])


@contextmanager
def seams(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, ``model`` calls our operators for masks, attention and experts."""
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    config = model.config
    before = config._attn_implementation, config._experts_implementation
    holders = [(n, m) for n, m in model.named_modules() if hasattr(m, "_apply_gate")]
    for name, module in holders:
        setattr(module, FQN_ATTRIBUTE, name)
    config._attn_implementation = config._experts_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation, config._experts_implementation = before
        for _, module in holders:
            delattr(module, FQN_ATTRIBUTE)
