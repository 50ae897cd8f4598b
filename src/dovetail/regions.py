"""Regions of a module in memory: submodules that can be computed in more than one way.

Today these are the routed experts of transformers' models and of modules in their interface.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.hf_experts import experts_forward

log = logging.getLogger(__name__)
BATCHED_TOKENS = 8
"""Above so many tokens the batched implementation, which copies every token's experts, is not
tried: it takes ten times as long as the others and that much memory."""
Implementation = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Region:
    """A submodule at ``path`` of some ``kind`` (regions of a kind share choices)."""

    path: str
    kind: str
    module: nn.Module

    @property
    def layer(self) -> int:
        """The number of the layer that it is in, -1 outside of layers."""
        return next((int(part) for part in self.path.split(".") if part.isdigit()), -1)

    def implementations(self, tokens: int) -> Mapping[str, Implementation]:
        """Ways to compute it other than its own, by name, called as ``(module, *inputs)``."""
        from transformers.integrations import moe

        config: Any = self.module.config
        own = config._experts_implementation
        found: dict[str, Implementation] = {
            "dovetail": experts_forward,
            "grouped_mm": moe.grouped_mm_experts_forward,
        }
        if tokens <= BATCHED_TOKENS:
            found["batched_mm"] = moe.batched_mm_experts_forward
        return {name: run for name, run in found.items() if name != own}


def find_regions(module: nn.Module) -> tuple[list[Region], list[str]]:
    """The regions of ``module``, and what looks like routed experts but is not understood."""
    found = [
        Region(path, _kind(child), child)
        for path, child in module.named_modules()
        if path and hasattr(child, "_apply_gate") and hasattr(child, "is_transposed")
    ]
    known = {region.path for region in found}
    notes = [
        f"{path or 'the module itself'} ({type(child).__name__}): {why}"
        for path, child in module.named_modules()
        if path not in known and (why := _unrecognised(child)) is not None
    ]
    return found, notes


def _kind(module: nn.Module) -> str:
    shapes = ", ".join(f"{n} {list(p.shape)}" for n, p in module.named_parameters())
    first = next(module.parameters())
    threads = torch.get_num_threads()
    act = type(getattr(module, "act_fn", None)).__name__
    return (
        f"{type(module).__name__}({shapes}) {str(first.dtype).removeprefix('torch.')} on "
        f"{first.device.type}, {act}, {threads} threads"
    )


def _unrecognised(module: nn.Module) -> str | None:
    """Why a module that has experts, as far as one can see, runs as it is."""
    for name, experts in module.named_children():
        if not isinstance(experts, nn.ModuleList) or len(experts) < 2:
            continue
        count = len(experts)
        routers = [
            other
            for other, linear in module.named_children()
            if isinstance(linear, nn.Linear) and linear.out_features == count
        ]
        if routers and len({_shape(expert) for expert in experts}) == 1:
            return (
                f"{count} modules of {type(experts[0]).__name__} in {name!r} and the router "
                f"{routers[0]!r} look like routed experts behind a Python loop"
            )
    return None


def _shape(module: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return type(module), shapes


def inputs_of(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among a region's inputs."""
    yield from (value for value in (*arguments, *options.values()) if isinstance(value, Tensor))


def tokens_of(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> int:
    """Rows of the region's first input."""
    first = next(inputs_of(arguments, options))
    return first.numel() // first.shape[-1]


def agrees(found: Tensor, expected: Tensor) -> str | None:
    """Why ``found`` cannot stand for ``expected``, or None if it can.

    Sums in another order differ by rounding: allowed is a few units of the dtype's precision times
    the largest value.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return (
            f"gives {found.dtype} {list(found.shape)} where eager gives {expected.dtype} "
            f"{list(expected.shape)}"
        )
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    worst = float((found.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    allowed = 32 * torch.finfo(expected.dtype).eps * scale
    if not worst <= allowed:
        return f"differs from eager by up to {worst:.3g}, more than rounding ({allowed:.3g})"
    return None
