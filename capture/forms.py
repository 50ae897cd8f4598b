"""How a module keeps its routed experts: names, shapes and the activation between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dovetail.ir.errors import CaptureError

_FORM = "_dovetail_form"


@dataclass(frozen=True, slots=True)
class ExpertsForm:
    """``count`` experts; ``tensors`` gives for each part (gate, up, gate_up, down, or their _bias)
    its name inside the module and the shape of one expert's share. ``activation`` takes what comes
    out of gate and up (``[rows, wide]``) to what goes into down. ``transposed`` parts are
    ``[in, out]``."""

    count: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    activation: Callable[[Tensor], Tensor]
    transposed: frozenset[str] = field(default_factory=frozenset)


def set_form(module: nn.Module, form: ExpertsForm) -> None:
    """Say how ``module`` keeps its experts."""
    object.__setattr__(module, _FORM, form)


def form_of(module: nn.Module, fqn: str) -> ExpertsForm:
    """The form of an experts module: what an adapter said, or transformers' own; raises
    CaptureError for other kinds."""
    said = getattr(module, _FORM, None)
    if said is not None:
        assert isinstance(said, ExpertsForm)
        return said
    own: Any = module
    if getattr(own, "has_post_expert_norm", False):
        raise CaptureError(f"{fqn} has a norm after each expert, which is not supported yet")
    up = "gate_up" if getattr(own, "has_gate", True) else "up"
    parts = [up, "down"]
    names = {part: f"{part}_proj" for part in parts}
    if own.has_bias:
        names |= {f"{part}_bias": f"{part}_proj_bias" for part in parts}
    shapes = {part: tuple(int(s) for s in getattr(own, n).shape[1:]) for part, n in names.items()}
    return ExpertsForm(
        int(own.down_proj.shape[0]),
        {part: (name, shapes[part]) for part, name in names.items()},
        own._apply_gate if up == "gate_up" else own.act_fn,
        frozenset(parts) if own.is_transposed else frozenset(),
    )
