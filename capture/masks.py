"""What stands in for attention masks while a model is traced."""

from dataclasses import dataclass
from types import FunctionType
from typing import Any

from transformers import masking_utils

from dovetail.ir.errors import CaptureError


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Causal; limited to the last ``window`` positions, or to the query's own chunk of ``chunk``
    positions, where these are not 0."""

    window: int
    chunk: int = 0


def mask_rule(mask_function: Any) -> MaskRule:
    """The rule behind transformers' ``mask_function``; raises CaptureError for any other kind."""
    if mask_function is masking_utils.causal_mask_function:
        return MaskRule(0)
    parts = _closure(mask_function).get("mask_functions", ())
    if len(parts) == 2 and parts[1] is masking_utils.causal_mask_function:
        limits = _closure(parts[0])
        window, chunk = limits.get("sliding_window"), limits.get("chunk_size")
        kind = parts[0].__qualname__.split(".")[0]
        if type(window) is int and kind == "sliding_window_overlay":
            return MaskRule(window)
        if type(chunk) is int and kind == "chunked_overlay":
            return MaskRule(0, chunk)
    raise CaptureError(
        f"the model asks for the attention mask {_qualname(mask_function)}; dovetail knows causal, "
        "sliding-window and chunked causal masks; a model with another mask needs an adapter in "
        "capture/"
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
